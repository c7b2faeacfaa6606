"""Control ids: token ids that no text contains, by which a processor ends a request on purpose.

Admission names them in the request (`KEY`) and in its ``stop_token_ids``, so the engine ends the request where a
processor forces one, and the id comes back in band as the stop reason. A grammar never hears of them: it is built from
vLLM's own set of stop ids, and what a forced one would make of it is kept away here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from vllm_align_spec.processors.rows import Control

KEY = "align_spec_control_ids"
NAMES = tuple(word.name.lower() for word in Control)
"""What each id says; see `processors.rows.Control`."""


def choose(tokenizer: Any, vocab_size: int, stop_ids: Collection[int]) -> tuple[int, ...] | None:
    """Ids that no text of this model contains, in the order of `NAMES`; None if it has too few.

    First those that the model's vocabulary has beyond the tokenizer's, then special tokens that are reserved by name,
    then padding and unknown tokens.

    Args:
        tokenizer: the engine's; None if it has none.
        vocab_size: rows of the model's output.
        stop_ids: ids that end a response anyway.
    """
    if tokenizer is None:
        return None
    added = getattr(tokenizer, "added_tokens_decoder", {})
    reserved = [i for i, token in added.items() if token.special and _reserved(token.content)]
    spare = [tokenizer.pad_token_id, getattr(tokenizer, "unk_token_id", None)]
    found = [*range(len(tokenizer), vocab_size)[: len(NAMES)], *sorted(reserved), *spare]
    usable = list(dict.fromkeys(i for i in found if i is not None and i < vocab_size and i not in stop_ids))
    return tuple(usable[: len(NAMES)]) if len(usable) >= len(NAMES) else None


def _reserved(token: str) -> bool:
    return any(word in token.lower() for word in ("reserved", "unused", "extra_id", "placeholder", "control_"))


def without(request: Any, new_token_ids: Sequence[int]) -> Sequence[int]:
    """Fills patch ``grammar_control``: what the grammar of a request shall hear of its new tokens."""
    params = request.sampling_params
    extra = params.extra_args if params is not None else None
    if extra and new_token_ids and new_token_ids[-1] in extra.get(KEY, ()):
        return new_token_ids[:-1]
    return new_token_ids
