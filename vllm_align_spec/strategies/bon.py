"""Best-of-N, and InfAlign's calibration of rewards (arXiv 2412.19792, section 4.2). Steering: it changes what is said.

N responses are sampled from the model as the request asks, the judges score each, and the best one is the response::

    score(y) = sum_g w_g r_g(x, y)          as they are, or calibrated by m further samples of the same prompt:
    score(y) = sum_g w_g C_g(x, y)          C(x, y) = (#{r_j < r} + #{r_j = r} / 2) / m

C says how many of the model's own answers a response beats, whatever scale the judge has. It makes judges that have
nothing in common add up, and it says when a response is good enough to stop: the first one, in the order of sampling,
whose weighted mean of C reaches q. Of one judge alone C changes nothing but the stop: ties in it are broken by the
reward itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from vllm_align_spec.options import BonOptions, OptionError
from vllm_align_spec.rewards import JudgeError
from vllm_align_spec.strategies.base import Chunk, Engine, EngineFacts, Notes, Request
from vllm_align_spec.strategies.candidates import Seeds, in_order, judges, weights

_HONOURED = frozenset(
    {
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "bad_words",
        "allowed_token_ids",
        "thinking_token_budget",
    }
)
"""What bends the distribution in a sample just as in any response."""


def calibrated(reward: float, reference: Sequence[float]) -> float:
    """C: the share of the reference rewards that a reward beats, equal ones counting half.

    Args:
        reward: r.
        reference: rewards of m samples that are not among the candidates, m at least 1.
    """
    return sum(1.0 if r < reward else 0.5 if r == reward else 0.0 for r in reference) / len(reference)


@dataclass(frozen=True)
class _Sample:
    """One whole response, and what each judge thinks of it."""

    token_ids: list[int]
    logprobs: list[Any]
    last: Chunk
    rewards: list[float]
    cut: bool
    """Whether a stop string ended it."""


class BonStrategy:
    """Best-of-N."""

    method: ClassVar[str] = "bon"
    control: ClassVar[bool] = False
    structured: ClassVar[bool] = True
    adapters: ClassVar[bool] = True

    def admit(self, request: Request, engine: EngineFacts) -> None:
        """Refuses what samples of one prompt cannot honour.

        Raises:
            OptionError: names what stands in the way and what would be accepted.
        """
        options: BonOptions = request.option(BonOptions)
        weights("bon", options.bon_weights, judges("bon", options.bon_reward, engine))
        for what, instead in request.bends.items():
            if what.partition("=")[0] not in _HONOURED:
                raise OptionError(f"{what} cannot be combined with bon; {instead}", what.partition("=")[0])
        if request.temperature <= 0 and options.bon + options.bon_reference > 1:
            raise OptionError(
                f"temperature={request.temperature:g} makes all samples of bon={options.bon} the same; accepted: "
                "temperature > 0, or bon=1 without bon_reference",
                "temperature",
            )
        if options.bon_stop < 1 and not options.bon_reference:
            raise OptionError(
                f"bon_stop={options.bon_stop:g} is a share of the reference, of which there is none; accepted: "
                "bon_reference >= 1, or drop bon_stop",
                "bon_stop",
            )

    async def run(self, request: Request, engine: Engine, notes: Notes) -> AsyncGenerator[Chunk, None]:
        """One choice; nothing leaves before the best sample is known.

        Raises:
            JudgeError: a judge failed, and ``bon_fallback`` asks for an error then.
        """
        options: BonOptions = request.option(BonOptions)
        notes |= {"judge_calls": 0, "sampled": 0, "samples": [], "stopped": False}
        seeds = Seeds(request.seed)
        first: asyncio.Future[_Sample] = asyncio.get_running_loop().create_future()

        async def launch(place: int) -> _Sample:
            # References come first: the earliest candidate may already be good enough. It has the choice's own seed,
            # so that best of one is what the request would have brought anyway.
            own = place == options.bon_reference
            sample = await _sample(request, engine, notes, None if own else seeds.integer(place))
            if place == 0:
                first.set_result(sample)
            return await _judged(sample, options, engine, notes)

        try:
            chosen = await _best(launch, options, notes)
        except JudgeError as error:
            notes["error"] = str(error)
            if options.bon_fallback == "error":
                raise
            # Errors come in the order of the samples, so the first one is there.
            chosen = await first
        finish = None if chosen.cut else chosen.last.finish_reason
        yield Chunk(
            chosen.token_ids, chosen.logprobs or None, finish, chosen.last.stop_reason, source=chosen.last.source
        )

    def report(
        self, notes: Notes, workers: Sequence[Mapping[str, Any] | None], tokens: int, emitted: int
    ) -> dict[str, Any]:
        """The rewards and score of each sample, which one was taken, and what all of them cost."""
        if not notes:
            return {}  # cancelled before it began
        report = {
            "samples": notes["samples"],
            "taken": notes.get("taken"),
            "stopped_early": notes["stopped"],
            "judge_calls": notes["judge_calls"],
            "sampled_tokens": notes["sampled"],
        }
        return report | ({"error": notes["error"], "reason": "failed"} if "error" in notes else {})

    def conclude(self, reports: Sequence[dict[str, Any]]) -> None:
        """Choices have nothing in common."""


async def _best(launch: Callable[[int], Coroutine[Any, Any, _Sample]], options: BonOptions, notes: Notes) -> _Sample:
    """The first sample that is good enough to stop, or the best of all, the earliest on ties."""
    m = options.bon_reference
    reference: list[list[float]] = []
    best: tuple[tuple[float, float], _Sample] | None = None
    async with aclosing(in_order(launch, m + options.bon, options.bon_parallel)) as samples:
        async for sample in samples:
            if len(reference) < m:
                reference.append(sample.rewards)
                continue
            weight = options.bon_weights or [1.0] * len(sample.rewards)
            raw = sum(w * r for w, r in zip(weight, sample.rewards, strict=True))
            score = raw
            if m:
                of_judges = zip(*reference, strict=True)
                shares = [calibrated(r, others) for r, others in zip(sample.rewards, of_judges, strict=True)]
                score = sum(w * c for w, c in zip(weight, shares, strict=True))
            notes["samples"].append({"rewards": sample.rewards, "score": score, "tokens": len(sample.token_ids)})
            if best is None or (score, raw) > best[0]:
                best = ((score, raw), sample)
                notes["taken"] = len(notes["samples"]) - 1
            if options.bon_stop < 1 and score >= options.bon_stop * sum(weight):
                notes["stopped"] = len(notes["samples"]) < options.bon
                notes["taken"] = len(notes["samples"]) - 1
                return sample
    assert best is not None
    return best[1]


async def _sample(request: Request, engine: Engine, notes: Notes, seed: int | None) -> _Sample:
    token_ids: list[int] = []
    logprobs: list[Any] = []
    inner = engine.generate(
        request.prompt_token_ids, max_tokens=request.max_tokens, min_tokens=request.min_tokens, seed=seed
    )
    last = Chunk([], None, "abort")
    cut = None
    async with aclosing(inner) as chunks:
        async for last in chunks:
            token_ids += last.token_ids
            logprobs += last.logprobs or ()
            notes["sampled"] += len(last.token_ids)
            cut = engine.stop_at(token_ids)
            if cut is not None:
                break
    return _Sample(token_ids[:cut], logprobs[:cut], last, [], cut is not None)


async def _judged(sample: _Sample, options: BonOptions, engine: Engine, notes: Notes) -> _Sample:
    names = options.bon_reward or [""]
    notes["judge_calls"] += len(names)
    found = await asyncio.gather(*(engine.judge(name, [sample.token_ids]) for name in names))
    return replace(sample, rewards=[reward for (reward,) in found])
