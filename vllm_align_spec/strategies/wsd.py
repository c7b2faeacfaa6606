"""Weak-to-strong decoding, the request's side (arXiv 2506.07434, section 3). Steering: it changes what the model says.

A small aligned pilot drafts the opening of a response; the large base model takes over at the first draft token i where
the geometric mean of its own probabilities of the last w draft tokens reaches gamma (`processors.wsd.switch_index`).

``shared``: the engine's draft model is the pilot and the worker finds the switch. A drafter runs only after the target
has sampled, so the prompt's last token is held back, forced as the first output, and dropped here.

``handover``: any two models. The pilot answers the conversation at its own endpoint, in its own chat format; the base
model scores the draft so far *as text in its own tokens*, and continues from the tokens that were kept.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import cache
from typing import Any, ClassVar

from vllm_align_spec.options import MAX_STOP_IDS, OptionError, WsdOptions
from vllm_align_spec.processors.wsd import switch_index
from vllm_align_spec.strategies.base import Chunk, Engine, EngineFacts, Notes, PilotError, Request

logger = logging.getLogger(__name__)

LAST_WORD_CHARACTERS = 24
"""What counts as a draft's last word at most: scripts without spaces have none, and tokens are shorter than this."""

PLAIN = frozenset({"wsd_fallback"})
"""Options that the worker does not need."""


class WsdStrategy:
    """Both modes of weak-to-strong decoding."""

    method: ClassVar[str] = "wsd"
    control: ClassVar[bool] = False
    structured: ClassVar[bool] = False
    adapters: ClassVar[bool] = False

    def admit(self, request: Request, engine: EngineFacts) -> None:
        """Refuses requests and engines with which the opening would not be the pilot's, or p not the base model's.

        Raises:
            OptionError: names what stands in the way and what would be accepted.
        """
        options: WsdOptions = request.option(WsdOptions)
        if options.wsd == "shared":
            _admit_shared(request, engine)
        elif not engine.pilot:
            raise OptionError(
                "wsd='handover' needs a pilot: start the engine with --additional-config "
                '\'{"align_spec": {"wsd": {"pilot": {"url": "http://host:port/v1", "model": "name"}}}}\', '
                "or use wsd='shared'",
                "wsd",
            )
        elif not engine.scores_are_logprobs:
            raise OptionError(
                "wsd='handover' reads the base model's log-probabilities, but this engine reports logits; "
                "accepted: --logprobs-mode raw_logprobs or processed_logprobs, or wsd='shared'",
                "wsd",
            )
        elif request.messages and request.messages[-1].get("role") == "assistant":
            raise OptionError(
                "wsd='handover' needs a conversation that the pilot can answer, but its last message is the "
                "assistant's; accepted: one that ends with the user's, or wsd='shared'",
                "messages",
            )
        elif request.logprobs_of_ids:
            raise OptionError(
                "logprob_token_ids cannot be combined with wsd='handover'; drop it, or use logprobs",
                "logprob_token_ids",
            )
        for what, instead in request.bends.items():
            raise OptionError(f"{what} cannot be combined with wsd; {instead}", what.partition("=")[0])
        if request.max_tokens < options.wsd_window:
            raise OptionError(
                f"max_tokens={request.max_tokens} is smaller than wsd_window={options.wsd_window}, so the base model "
                f"could never take over; accepted: max_tokens >= {options.wsd_window}, or a smaller wsd_window",
                "max_tokens",
            )

    def run(self, request: Request, engine: Engine, notes: Notes) -> AsyncGenerator[Chunk, None]:
        """One choice; ``notes`` hold the mode and, after a hand-over, what `report` needs."""
        options: WsdOptions = request.option(WsdOptions)
        notes["mode"] = options.wsd
        run = _shared if options.wsd == "shared" else _handover
        return run(request, options, engine, notes)

    def conclude(self, reports: Sequence[dict[str, Any]]) -> None:
        """Choices have nothing in common."""

    def report(
        self, notes: Notes, workers: Sequence[Mapping[str, Any] | None], tokens: int, emitted: int
    ) -> dict[str, Any]:
        """Reason and place of the switch, where each token came from, and what it cost in target forwards.

        ``origins`` runs over all response tokens: ``opening`` (the pilot's), ``draft`` (accepted after the switch),
        ``base`` (the base model's own; also whatever follows a hand-over), ``unknown`` (not itemised).
        """
        mode = notes["mode"]
        worker = workers[-1] if workers else None
        found = notes if mode == "handover" else worker or {}
        kept, reason = found.get("kept"), found.get("reason")
        if kept is not None and kept > tokens:  # a stop string or max_tokens cut the opening short
            kept, reason = tokens, reason if reason == "failed" else "drafting"
        report: dict[str, Any] = {
            "mode": mode,
            "reason": reason,
            "switch_index": kept - 1 if kept else None,
            "draft_tokens_kept": kept,
            "target_forwards": None,
            "tokens_per_forward": None,
            "origins": origins(kept if mode == "handover" else None, None, tokens, emitted),
        }
        if mode == "handover":
            report |= {key: notes[key] for key in ("pilot_ms", "scorings") if key in notes}
        elif worker is not None and "steps" in worker:
            forwards = worker["steps"] + 1
            report |= {
                "target_forwards": forwards,
                "tokens_per_forward": round(tokens / forwards, 3),
                "origins": origins(kept, worker, tokens, emitted),
            }
        error = found.get("error")
        if error:
            report["error"] = error
        return report


def origins(kept: int | None, worker: Mapping[str, Any] | None, tokens: int, emitted: int) -> list[tuple[str, int]]:
    """Where each response token came from, run-length encoded.

    Args:
        kept: tokens of the opening; None if nobody knows.
        worker: the processor's report (``starts``, ``steps``); None after a hand-over.
        tokens: response tokens, which the runs add up to.
        emitted: tokens that the engine sent, the surplus after a stop string included.

    A step after the switch emits accepted drafts and then one token of the base model's own. The last step of a
    response may have been cut inside its drafts; its last token counts as the base model's all the same.
    """
    if kept is None:
        return [("unknown", tokens)] if tokens else []
    labels = ["opening"] * min(kept, emitted)
    if worker is None:
        labels += ["base"] * (emitted - len(labels))
    else:
        starts = list(worker["starts"])
        # Beyond its table a worker notes the latest start only: what lies between is nobody's to tell.
        gap = len(starts) - 2 if worker["steps"] > len(starts) else None
        for j, end in enumerate([*starts[1:], emitted]):
            new = end - len(labels)
            if new > 0:
                labels += ["unknown"] * new if j == gap else ["draft"] * (new - 1) + ["base"]
    runs: list[tuple[str, int]] = []
    for label in labels[:tokens]:
        if runs and runs[-1][0] == label:
            runs[-1] = (label, runs[-1][1] + 1)
        else:
            runs.append((label, 1))
    return runs


def _admit_shared(request: Request, engine: EngineFacts) -> None:
    if engine.draft_method is None:
        raise OptionError(
            "wsd='shared' needs the pilot as the engine's draft model: start it with --speculative-config "
            '\'{"method": "draft_model", "model": "...", "num_speculative_tokens": 5}\', or use wsd=\'handover\'',
            "wsd",
        )
    if engine.draft_method != "draft_model":
        _warn_about_drafter(engine.draft_method)
    for name, value, accepted, bad in (
        ("draft_sample_method", engine.draft_sampling, "'greedy'", engine.draft_sampling != "greedy"),
        ("rejection_sample_method", engine.rejection_method, "'standard'", engine.rejection_method != "standard"),
        ("draft length per step", "adaptive", "a fixed one", not engine.fixed_draft_length),
        ("enable_batch_sharded_sampling", True, "False", engine.shards_sampling),
    ):
        if bad:
            raise OptionError(f"wsd='shared' cannot run on this engine: {name}={value!r}; accepted: {accepted}", "wsd")
    if len(request.prompt_token_ids) < 2:
        raise OptionError(
            f"wsd='shared' needs a prompt of at least 2 tokens, got {len(request.prompt_token_ids)}; "
            "accepted: a longer prompt, or wsd='handover'",
            "prompt",
        )
    if request.prompt_token_ids[-1] in request.stop_token_ids:
        raise OptionError(
            f"wsd='shared' cannot start from a prompt that ends with the stop token {request.prompt_token_ids[-1]}; "
            "accepted: a prompt that ends with another token, or wsd='handover'",
            "prompt",
        )
    if len(request.stop_token_ids) > MAX_STOP_IDS:
        raise OptionError(
            f"wsd='shared' with {len(request.stop_token_ids)} stop token ids, those of the model included; "
            f"accepted: at most {MAX_STOP_IDS}",
            "stop_token_ids",
        )


@cache
def _warn_about_drafter(method: str) -> None:
    logger.warning(
        "wsd='shared' takes the engine's drafter for its pilot, but the drafter is %r and not a draft_model: "
        "it was trained to agree with the base model, so openings will hardly be better aligned.",
        method,
    )


async def _shared(request: Request, options: WsdOptions, engine: Engine, notes: Notes) -> AsyncGenerator[Chunk, None]:
    *head, first = request.prompt_token_ids
    arguments = {
        **options.model_dump(exclude=set(PLAIN)),
        "align_spec_first_token": first,
        "align_spec_stop_ids": list(request.stop_token_ids),
    }
    held_back = 1
    inner = engine.generate(
        head,
        max_tokens=request.max_tokens + 1,
        min_tokens=request.min_tokens + 1 if request.min_tokens else 0,
        arguments=arguments,
    )
    async with aclosing(inner) as chunks:
        async for chunk in chunks:
            dropped = min(held_back, len(chunk.token_ids))
            held_back -= dropped
            chunk = chunk.drop(dropped) if dropped else chunk
            if chunk.token_ids or chunk.finish_reason:
                yield chunk


async def _handover(request: Request, options: WsdOptions, engine: Engine, notes: Notes) -> AsyncGenerator[Chunk, None]:
    # The last token of a full context could not be scored.
    bound = min(options.wsd_max_draft, request.max_tokens, request.room - 1)
    opening = _Opening(request, options, engine, bound)
    reason = None
    waited = time.monotonic()
    notes |= {"kept": 0, "reason": "drafting", "pilot_ms": 0.0, "scorings": 0}
    try:
        text = ""
        async with aclosing(engine.draft(request)) as pieces:
            async for piece in pieces:
                notes["pilot_ms"] += (time.monotonic() - waited) * 1e3
                text += piece
                reason = await opening.advance(text, final=False)
                if released := opening.release(notes):
                    yield released
                if reason:
                    break
                waited = time.monotonic()
        if reason is None:
            reason = await opening.advance(text, final=True)
    except PilotError as error:
        notes["error"] = str(error)
        notes["reason"] = reason = "failed"
        if options.wsd_fallback == "error":
            raise
    if released := opening.release(notes):
        yield released
    kept = opening.released
    if kept == request.max_tokens:
        # With a switch on the very last token, or without one, nothing is left for the base model.
        notes["reason"] = "switched" if reason == "switched" else "drafting"
        yield Chunk([], None, "length")
        return
    notes["reason"] = reason
    rest = engine.generate(
        [*request.prompt_token_ids, *opening.token_ids[:kept]],
        max_tokens=request.max_tokens - kept,
        min_tokens=max(0, request.min_tokens - kept),
    )
    async with aclosing(rest) as chunks:
        async for chunk in chunks:
            yield chunk


class _Opening:
    """The pilot's draft so far in the base model's tokens, what it thinks of them, and how much of it is final."""

    def __init__(self, request: Request, options: WsdOptions, engine: Engine, bound: int) -> None:
        self._request, self._options, self._engine, self._bound = request, options, engine, bound
        self.token_ids: list[int] = []
        self._ends: list[int] = []
        self._probabilities: list[float] = []
        self._logprobs: list[Any] | None = None
        self._final = 0
        self._scorings = 0
        self.released = 0

    async def advance(self, text: str, final: bool) -> str | None:
        """Scores what is new in the draft and looks for the switch.

        Args:
            text: the whole draft.
            final: whether the pilot ended here; otherwise its last word may still grow.

        Returns:
            why the opening ended, or None.
        """
        token_ids, ends = self._encode(text)
        stop = next((i for i, token in enumerate(token_ids) if token in self._request.stop_token_ids), len(token_ids))
        stable = len(token_ids) if final else _before_last_word(text, ends)
        usable = min(stable, stop, self._bound)
        known = _common_prefix(token_ids, self.token_ids, len(self._probabilities))
        self.token_ids, self._ends = token_ids, ends
        del self._probabilities[known:]
        if self._logprobs is not None:
            del self._logprobs[known:]
        if usable > known:
            prompt = self._request.prompt_token_ids
            scored = await self._engine.score([*prompt, *token_ids[:usable]], len(prompt) + known)
            self._scorings += 1
            self._probabilities += scored.probabilities
            if scored.logprobs is not None:
                self._logprobs = [*(self._logprobs or ()), *scored.logprobs]
        probabilities = self._probabilities[:usable]
        # The sentinel can be in no window that reaches gamma, so an index before it is a switch and no end of a draft.
        index = switch_index([*probabilities, 0.0], gamma=self._options.wsd_gamma, window=self._options.wsd_window)
        if index < len(probabilities):
            self._final = index + 1
            return "switched"
        self._final = usable
        if usable == self._bound:
            return "max_draft"
        return "pilot_end" if final or usable == stop < len(token_ids) else None

    def release(self, notes: Notes) -> Chunk | None:
        """The tokens that became final since the last call."""
        new = slice(self.released, self._final)
        self.released = self._final
        notes["kept"], notes["scorings"] = self._final, self._scorings
        logprobs = None if self._logprobs is None else self._logprobs[new]
        return Chunk(self.token_ids[new], logprobs) if new.start < new.stop else None

    def _encode(self, text: str) -> tuple[list[int], list[int]]:
        prompt = self._request.prompt_token_ids
        token_ids, ends = self._engine.encode(prompt, text)
        final = self.token_ids[: self.released]
        if token_ids[: self.released] == final:
            return token_ids, ends
        # Later text changed how earlier text splits. What the client has stays; the rest is encoded after it.
        done = self._ends[self.released - 1]
        more_ids, more_ends = self._engine.encode([*prompt, *final], text[done:])
        return [*final, *more_ids], [*self._ends[: self.released], *(done + end for end in more_ends)]


def _before_last_word(text: str, ends: list[int]) -> int:
    """How many tokens end before the last word begins; the space in front of it belongs to the word."""
    start = len(text)
    while start > 0 and not text[start - 1].isspace() and len(text) - start < LAST_WORD_CHARACTERS:
        start -= 1
    start = len(text[:start].rstrip())
    return sum(end <= start for end in ends)


def _common_prefix(a: list[int], b: list[int], limit: int) -> int:
    limit = min(len(a), len(b), limit)
    return next((i for i in range(limit) if a[i] != b[i]), limit)
