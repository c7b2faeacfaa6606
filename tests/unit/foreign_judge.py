"""A reward model with another tokenizer than the lab's base: random weights, so every token matters."""

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from vllm_align_spec import lab


def save(folder):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(lab.model_path("pilot-other"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=1, initializer_range=0.2, max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer
