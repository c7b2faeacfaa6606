"""Companions of an engine: loaded in its workers, known by name and limits in its front end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_align_spec.companion.model import Companion, load_config
from vllm_align_spec.options import CompanionOptions, EngineOptions, OptionError
from vllm_align_spec.strategies.base import CompanionFacts

PROBE = 'The 3 quick foxes said: "naïve café" — {"x": [1, 2.50]}\n\t日本語 🙂'


def load(config: Any, options: EngineOptions, device: torch.device, rows: int, entries: int) -> Mapping[str, Companion]:
    """The companions of a worker; none where rows are not sampled.

    Args:
        config: vLLM's.
        options: ours.
        device: of the worker.
        rows: most rows of a request in one step.
        entries: as in `processors.rows.Layout`.

    Raises:
        OptionError: one cannot be loaded, does not fit, or has other tokens than the target.
    """
    if not options.companions or not options.enabled:
        return {}
    parallel = config.parallel_config
    if (
        parallel.rank // parallel.tensor_parallel_size % parallel.pipeline_parallel_size
        < parallel.pipeline_parallel_size - 1
    ):
        return {}
    for name, one in options.companions.items():
        _same_tokens(config.model_config, name, one)
    return {
        name: Companion(
            name,
            one,
            device=device,
            dtype=config.model_config.dtype,
            slots=config.scheduler_config.max_num_seqs,
            rows=rows,
            entries=entries,
            max_len=config.model_config.max_model_len,
        )
        for name, one in options.companions.items()
    }


def facts(config: Any, options: EngineOptions) -> dict[str, CompanionFacts]:
    """What admission must know about the companions."""
    found = {}
    for name, one in options.companions.items():
        text = load_config(name, one).get_text_config()
        limit = min(config.model_config.max_model_len, one.max_len or 2**62, text.max_position_embeddings)
        found[name] = CompanionFacts(one.role, limit, one.max_candidates, one.max_slots)
    return found


def render(options: CompanionOptions, persona: str, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """A conversation as the companion's chat template writes it, with a system prompt of its own.

    Raises:
        OptionError: the companion has no chat template, or it cannot write this conversation.
    """
    tokenizer = _tokenizer(options.model, options.revision)
    conversation = [{"role": "system", "content": persona}, *(m for m in messages if m.get("role") != "system")]
    try:
        rendered = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True)
    except Exception as error:  # templates raise what they like
        raise OptionError(
            f"pad_persona: the companion's chat template cannot write this conversation ({error}); "
            "accepted: a companion with a chat template that knows system prompts",
            "pad_persona",
        ) from None
    return list(rendered["input_ids"] if isinstance(rendered, Mapping) else rendered)


def _tokenizer(model: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)


def _same_tokens(model_config: Any, name: str, options: CompanionOptions) -> None:
    """Refuses a companion that would read other text into the target's token ids.

    Raises:
        OptionError: names both sides.
    """
    where = f"additional_config.align_spec.companions.{name}.model={options.model!r}"
    try:
        if model_config.skip_tokenizer_init:
            raise OSError
        ours = _tokenizer(model_config.tokenizer, model_config.tokenizer_revision)
        theirs = _tokenizer(options.model, options.revision)
    except (OSError, ValueError):
        # Without tokenizers on both sides there is only the size to compare.
        vocabulary = load_config(name, options).get_text_config().vocab_size
        if vocabulary != model_config.get_vocab_size():
            raise OptionError(
                f"{where} has a vocabulary of {vocabulary}, the served model one of {model_config.get_vocab_size()}, "
                "and not both have a tokenizer; accepted: a companion with the served model's tokenizer"
            ) from None
        return
    if ours.get_vocab() != theirs.get_vocab() or ours.encode(PROBE) != theirs.encode(PROBE):
        raise OptionError(
            f"{where} reads text in other tokens ({len(theirs)} of them) than {model_config.tokenizer!r} "
            f"({len(ours)}); accepted: a companion with the served model's tokenizer"
        )
