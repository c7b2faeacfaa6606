"""Companions of an engine: loaded in its workers, known by name and limits in its front end."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from vllm_align_spec.options import CompanionOptions, EngineOptions, OptionError
from vllm_align_spec.strategies.base import CompanionFacts, Request

if TYPE_CHECKING:
    # Loads transformers' models: only where there is a companion.
    from vllm_align_spec.companion.bridge import BridgedCompanion
    from vllm_align_spec.companion.model import Companion

PROBE = 'The 3 quick foxes said: "naïve café" — {"x": [1, 2.50]}\n\t日本語 🙂'


def load(
    config: Any, options: EngineOptions, device: torch.device, rows: int, entries: int
) -> Mapping[str, Companion | BridgedCompanion]:
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
    return {
        name: _load(name, one, config, device=device, rows=rows, entries=entries)
        for name, one in options.companions.items()
    }


def _load(
    name: str, options: CompanionOptions, config: Any, *, device: torch.device, rows: int, entries: int
) -> Companion | BridgedCompanion:
    from vllm_align_spec.companion.bridge import BridgedCompanion, pieces
    from vllm_align_spec.companion.model import Companion

    def make(fed: int) -> Companion:
        return Companion(
            name,
            options,
            device=device,
            dtype=config.model_config.dtype,
            slots=config.scheduler_config.max_num_seqs,
            rows=fed,
            entries=entries,
            max_len=config.model_config.max_model_len,
            graphs=not config.model_config.enforce_eager,
        )

    tokenizers = _other_tokens(config.model_config, name, options)
    if tokenizers is None:
        return make(rows)
    return BridgedCompanion(pieces(*tokenizers, config.model_config.get_vocab_size()), rows, entries, make)


def facts(config: Any, options: EngineOptions) -> dict[str, CompanionFacts]:
    """What admission must know about the companions."""
    if not options.companions:
        return {}
    from vllm_align_spec.companion.model import load_config

    found = {}
    for name, one in options.companions.items():
        text = load_config(name, one).get_text_config()
        limit = min(one.max_len or config.model_config.max_model_len, text.max_position_embeddings)
        bridged = _other_tokens(config.model_config, name, one) is not None
        found[name] = CompanionFacts(one.role, limit, one.max_candidates, bridged, one.max_slots)
    return found


def render(model_config: Any, options: CompanionOptions, persona: str | None, request: Request) -> list[int]:
    """A request's prompt as a companion reads it: the conversation in its chat template, or else the text.

    Args:
        model_config: vLLM's.
        options: the companion's.
        persona: system prompt in place of the conversation's own.
        request: the client's.

    Raises:
        OptionError: its chat template cannot write this conversation.
    """
    tokenizer = _tokenizer(options.model, options.revision)
    if request.messages is None or (persona is None and not tokenizer.chat_template):
        text = request.prompt_text
        if text is None:
            text = _tokenizer(model_config.tokenizer, model_config.tokenizer_revision).decode(request.prompt_token_ids)
        return list(tokenizer.encode(text)) or [tokenizer.bos_token_id or tokenizer.eos_token_id or 0]
    conversation = list(request.messages)
    if persona is not None:
        conversation = [{"role": "system", "content": persona}, *(m for m in conversation if m.get("role") != "system")]
    try:
        rendered = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True)
    except Exception as error:  # templates raise what they like
        raise OptionError(
            f"the companion's chat template cannot write this conversation ({error}); accepted: a conversation, or a "
            "companion with a chat template, that goes with it",
            "pad_persona" if persona is not None else "unknown",
        ) from None
    return list(rendered["input_ids"] if isinstance(rendered, Mapping) else rendered)


@cache
def _tokenizer(model: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)


def _other_tokens(model_config: Any, name: str, options: CompanionOptions) -> tuple[Any, Any] | None:
    """Tokenizers of target and companion, if they cut text differently; None if the companion can read the target's
    tokens.

    Raises:
        OptionError: it cannot, and there is no bridge either; names both sides.
    """
    where = f"additional_config.align_spec.companions.{name}.model={options.model!r}"
    try:
        if model_config.skip_tokenizer_init:
            raise OSError
        ours = _tokenizer(model_config.tokenizer, model_config.tokenizer_revision)
        theirs = _tokenizer(options.model, options.revision)
    except (OSError, ValueError):
        # Without tokenizers on both sides there is only the size to compare.
        from vllm_align_spec.companion.model import load_config

        vocabulary = load_config(name, options).get_text_config().vocab_size
        if vocabulary != model_config.get_vocab_size():
            raise OptionError(
                f"{where} has a vocabulary of {vocabulary}, the served model one of {model_config.get_vocab_size()}, "
                "and not both have a tokenizer; accepted: a companion with the served model's tokenizer"
            ) from None
        return None
    if ours.get_vocab() == theirs.get_vocab() and ours.encode(PROBE) == theirs.encode(PROBE):
        return None
    if options.role == "lm":
        raise OptionError(
            f"{where} cuts text into other tokens ({len(theirs)} of them) than {model_config.tokenizer!r} "
            f"({len(ours)}): their logits cannot be combined; accepted: a companion with the served model's tokenizer"
        )
    return ours, theirs
