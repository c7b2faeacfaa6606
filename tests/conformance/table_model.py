"""A language model whose next-token law is a given table, as stock Llama weights: engines and transformers load it.

The law depends on the latest token. One layer that adds nothing lets the embedding, a unit vector a token, through to
the final norm; the head is the table.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<end>"
SPECIAL = [END, "<reserved_0>", "<reserved_1>", "<reserved_2>", "<bos>"]
HIDDEN = 64


def write(folder, words, logits):
    """Writes model and tokenizer.

    Args:
        folder: where to.
        words: texts of the ordinary tokens; their ids follow those of ``SPECIAL``.
        logits: [V, V] logits of the next token (column) after each token (row).
    """
    vocabulary = [*SPECIAL, *words]
    size = len(vocabulary)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=SPECIAL.index("<bos>"),
        eos_token_id=0,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, HIDDEN))
        norm = (1 / HIDDEN + config.rms_norm_eps) ** -0.5
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :size] = torch.as_tensor(logits, dtype=torch.float32).T / norm
    model.save_pretrained(folder)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=END))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        bos_token="<bos>",
        extra_special_tokens=SPECIAL[1:4],
    )
    tokenizer.save_pretrained(folder)
    return folder
