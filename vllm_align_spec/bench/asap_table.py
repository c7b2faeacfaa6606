"""A language model whose next-token law is a given table, as stock Llama weights: a law that can be written down.

The law depends on the latest token. One layer that adds nothing lets the embedding, a unit vector a token, through to
the final norm; the head is the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

WORDS = ("<end>", "<reserved_0>", "<reserved_1>", "<reserved_2>", "<bos>", "0", "1", "a", "b")
END_ID, CONTROL_IDS, BOS_ID, ZERO_ID = 0, (1, 2, 3), 4, 5
NEVER = -30.0
"""Logit of tokens that no text contains."""
HIDDEN = 64

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def table(seed: int, spread: float) -> Floats:
    """[V, V] logits of the next token (column) after each token (row)."""
    logits = np.random.default_rng(seed).standard_normal((len(WORDS), len(WORDS))) * spread
    logits[:, [*CONTROL_IDS, BOS_ID]] = NEVER
    return logits


def write(folder: Path, logits: Floats) -> str:
    """Model and tokenizer in a folder, whose name is returned."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    size = len(WORDS)
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
        bos_token_id=BOS_ID,
        eos_token_id=END_ID,
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
        model.lm_head.weight[:, :size] = torch.from_numpy(logits).float().T / norm
    model.save_pretrained(folder)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[END_ID]))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=WORDS[END_ID],
        bos_token=WORDS[BOS_ID],
        extra_special_tokens=[WORDS[i] for i in CONTROL_IDS],
    ).save_pretrained(folder)
    return str(folder)


def rows_of(logits: Floats, sentences: Sequence[str]) -> dict[str, Floats]:
    """log P of the next token, [V], after each prefix of strings of bits."""
    rows = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    prefixes = {sentence[:i] for sentence in sentences for i in range(len(sentence) + 1)}
    return {u: rows[ZERO_ID + int(u[-1]) if u else BOS_ID] for u in prefixes}
