"""Cascade reward sampling, the request's side (arXiv 2406.16306, section 4.2). Steering: it changes what is said.

A response grows by segments, which end where the model is no longer sure of what follows (`processors.cards`). Of each
segment candidates are sampled from the model (temperature beta, top-k) until the judge likes one::

    accept with probability min(1, exp((r - tau) / beta))         r the reward of prompt + response so far + candidate
    tau(t) = min(r0 + t (r* - r0) / n, r*)                         t response tokens, the candidate's included
    r0 = (1 - alpha) r(x) + alpha r*                               r(x) the reward of the prompt, n most tokens

The last of the tries is not tested: the best of all is taken, the earliest on ties. Several candidates are under way at
once, but each is judged, tested against a uniform number of its own and accepted strictly in the order of its index:
given the prefix they are independent, so the law is that of one try after the other, and the surplus is thrown away.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_align_spec.options import CardsOptions, OptionError
from vllm_align_spec.processors.cards import LONGEST
from vllm_align_spec.rewards import JudgeError
from vllm_align_spec.strategies.base import Chunk, Engine, EngineFacts, Notes, Request
from vllm_align_spec.strategies.candidates import Seeds, in_order, judges, refuse_bends


def threshold(length: int, *, prompt_reward: float, target_reward: float, alpha: float, max_tokens: int) -> float:
    """tau(t), the reward at which a candidate is accepted with certainty.

    Args:
        length: t, tokens of the response with the candidate.
        prompt_reward: r(x), the judge's reward of the prompt alone.
        target_reward: r*.
        alpha: how near r* the threshold begins, in [0, 1].
        max_tokens: n, tokens of the response at most.
    """
    first = (1 - alpha) * prompt_reward + alpha * target_reward
    return min(first + length * (target_reward - first) / max_tokens, target_reward)


def acceptance(reward: float, threshold: float, beta: float) -> float:
    """The probability that a candidate of this reward is accepted; ``beta`` is positive."""
    return math.exp(min(0.0, (reward - threshold) / beta))


@dataclass(frozen=True)
class _Candidate:
    """One way to go on: its tokens, how it ended, and what the judge thinks of the response with it."""

    token_ids: list[int]
    logprobs: list[Any]
    last: Chunk
    finish: str | None
    """vLLM's word for why the response ends with it; None if it goes on."""
    reward: float


class CardsStrategy:
    """Segments, judged."""

    method: ClassVar[str] = "cards"
    control: ClassVar[bool] = True
    structured: ClassVar[bool] = False
    adapters: ClassVar[bool] = False

    def admit(self, request: Request, engine: EngineFacts) -> None:
        """Refuses what resubmitted segments cannot honour.

        Raises:
            OptionError: names what stands in the way and what would be accepted.
        """
        options: CardsOptions = request.option(CardsOptions)
        judges("cards", [options.cards_reward], engine)
        refuse_bends("cards", request, engine)
        if request.temperature <= 0:
            raise OptionError(
                f"temperature={request.temperature:g} cannot be combined with cards, which samples at the temperature "
                "cards_beta; accepted: temperature > 0, or drop cards",
                "temperature",
            )
        if request.min_tokens:
            # A segment's end is a stop id too, and vLLM would mask it.
            raise OptionError(
                f"min_tokens={request.min_tokens} cannot be combined with cards; accepted: 0 (or ignore_eos)",
                "min_tokens",
            )
        for name, found, accepted, bad in (
            ("rejection_sample_method", engine.rejection_method, "'standard'", engine.rejection_method != "standard"),
            ("enable_batch_sharded_sampling", True, "False", engine.shards_sampling),
            ("control ids", "none to spare", "additional_config.align_spec.control_ids", not engine.control_ids),
        ):
            if bad:
                raise OptionError(f"cards cannot run on this engine: {name}={found!r}; accepted: {accepted}", "cards")

    async def run(self, request: Request, engine: Engine, notes: Notes) -> AsyncGenerator[Chunk, None]:
        """One choice; a segment leaves when it is accepted.

        Raises:
            JudgeError: the judge failed, and ``cards_fallback`` asks for an error then.
        """
        options: CardsOptions = request.option(CardsOptions)
        notes |= {"segments": [], "judge_calls": 0, "sampled": 0, "prompt_reward": None}
        notes["candidates"] = dict.fromkeys(("accepted", "best", "rejected", "surplus"), 0)
        response: list[int] = []
        try:
            async with aclosing(_segments(request, options, engine, notes, response)) as segments:
                async for chunk in segments:
                    yield chunk
            return
        except JudgeError as error:
            notes["error"] = str(error)
            if options.cards_fallback == "error":
                raise
        notes["fallback_at"] = len(response)
        rest = engine.generate(
            [*request.prompt_token_ids, *response], max_tokens=request.max_tokens - len(response), min_tokens=0
        )
        async with aclosing(rest) as chunks:
            async for chunk in chunks:
                notes["sampled"] += len(chunk.token_ids)
                yield chunk

    def report(
        self, notes: Notes, workers: Sequence[Mapping[str, Any] | None], tokens: int, emitted: int
    ) -> dict[str, Any]:
        """Each segment with its reward, threshold and tries, and what all candidates cost.

        ``entropies``, one a token, is there where nothing was tested (``cards_max_tries=1``): for `calibrate`.
        """
        if not notes:
            return {}  # cancelled before it began
        report: dict[str, Any] = {
            "prompt_reward": notes["prompt_reward"],
            "segments": notes["segments"],
            "candidates": notes["candidates"],
            "judge_calls": notes["judge_calls"],
            "sampled_tokens": notes["sampled"],
        }
        if workers:
            report["entropies"] = [
                round(entropy, 3)
                for segment, worker in zip(notes["segments"], workers, strict=False)
                for entropy in (worker or {}).get("entropies", ())[: segment["tokens"]]
            ]
        if "error" in notes:
            report["error"] = notes["error"]
        if "fallback_at" in notes:
            report |= {"reason": "failed", "fallback_at": notes["fallback_at"]}
        return report

    def conclude(self, reports: Sequence[dict[str, Any]]) -> None:
        """Choices have nothing in common."""


async def _segments(
    request: Request, options: CardsOptions, engine: Engine, notes: Notes, response: list[int]
) -> AsyncGenerator[Chunk, None]:
    """Accepted segments until the response ends; ``response`` grows with them."""
    seeds = Seeds(request.seed)
    notes["judge_calls"] += 1
    prompt_reward = asyncio.ensure_future(engine.judge(options.cards_reward, [[]]))
    # Where a candidate fails first, nobody else asks what became of it.
    prompt_reward.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        while True:
            found = await _segment(request, options, engine, notes, response, seeds, prompt_reward)
            response += found.token_ids
            finish = found.finish or ("length" if len(response) >= request.max_tokens else None)
            stop_reason = found.last.stop_reason if found.finish else None
            yield Chunk(found.token_ids, found.logprobs or None, finish, stop_reason, source=found.last.source)
            if finish:
                return
    finally:
        prompt_reward.cancel()


async def _segment(
    request: Request,
    options: CardsOptions,
    engine: Engine,
    notes: Notes,
    response: Sequence[int],
    seeds: Seeds,
    prompt_reward: asyncio.Future[list[float]],
) -> _Candidate:
    """The first candidate, by index, that is accepted; after the last try the best one."""
    segment = len(notes["segments"])
    tries = options.cards_max_tries
    launched = 0

    async def launch(index: int) -> _Candidate:
        nonlocal launched
        launched += 1
        return await _candidate(request, options, engine, notes, response, seeds.integer(segment, index))

    taken = best = None
    tau = 0.0
    index = -1
    async with aclosing(in_order(launch, tries, options.cards_candidates)) as candidates:
        async for candidate in candidates:
            index += 1
            (notes["prompt_reward"],) = await prompt_reward
            if best is None or candidate.reward > best.reward:
                best = candidate
            tau = threshold(
                len(response) + len(candidate.token_ids),
                prompt_reward=notes["prompt_reward"],
                target_reward=options.cards_threshold,
                alpha=options.cards_alpha,
                max_tokens=request.max_tokens,
            )
            if index == tries - 1:
                break  # not tested
            if seeds.uniform(segment, index) < acceptance(candidate.reward, tau, options.cards_beta):
                taken = candidate
                break
    assert best is not None
    fates: dict[str, int] = notes["candidates"]
    fates["best" if taken is None else "accepted"] += 1
    fates["rejected"] += index
    fates["surplus"] += launched - index - 1
    chosen = taken or best
    notes["segments"].append(
        {
            "tokens": len(chosen.token_ids),
            "tries": index + 1,
            "reward": chosen.reward,
            "threshold": tau,
            "accepted": taken is not None,
        }
    )
    return chosen


async def _candidate(
    request: Request, options: CardsOptions, engine: Engine, notes: Notes, response: Sequence[int], seed: int
) -> _Candidate:
    longest = min(LONGEST, request.max_tokens - len(response))
    token_ids: list[int] = []
    logprobs: list[Any] = []
    inner = engine.generate(
        [*request.prompt_token_ids, *response],
        max_tokens=longest,
        min_tokens=0,
        arguments={"cards": "on", "cards_entropy": options.cards_entropy},
        temperature=options.cards_beta,
        top_k=options.cards_top_k,
        seed=seed,
        reported=options.cards_max_tries == 1,
    )
    last = Chunk([], None, "abort")
    async with aclosing(inner) as chunks:
        async for last in chunks:
            token_ids += last.token_ids
            logprobs += last.logprobs or ()
            notes["sampled"] += len(last.token_ids)
    finish = None if last.finish_reason == "length" else last.finish_reason
    cut = engine.stop_at([*response, *token_ids])
    if cut is not None and cut > len(response):
        # Whoever turns tokens into text ends the response there.
        token_ids, logprobs, finish = token_ids[: cut - len(response)], logprobs[: cut - len(response)], None
    notes["judge_calls"] += 1
    (reward,) = await engine.judge(options.cards_reward, [[*response, *token_ids]])
    return _Candidate(token_ids, logprobs, last, finish, reward)
