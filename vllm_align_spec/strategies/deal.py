"""DeAL (arXiv 2402.06147, section 3): the next token is chosen by where it leads. Steering: it changes what is said.

For each of the k likeliest next tokens a the model goes on greedily for l tokens, and what comes of it is judged::

    score(a) = log p(y_1..t a | x) + sum_g w_g h_g(y_1..t a + l greedy tokens, cut at the end of sequence)

The token of the best score is the next one, the likeliest on ties; its lookahead is thrown away. A step costs k l
tokens of the model and k answers of each judge: this is for short responses and cheap judges.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

from vllm_align_spec.options import DealOptions, OptionError
from vllm_align_spec.rewards import JudgeError
from vllm_align_spec.strategies.base import Chunk, Engine, EngineFacts, Notes, Request
from vllm_align_spec.strategies.candidates import in_order, judges, refuse_bends, weights


def best_token(
    log_probabilities: Sequence[float], heuristics: Sequence[Sequence[float]], weights: Sequence[float]
) -> int:
    """The place of the candidate with the highest score, the first on ties.

    Args:
        log_probabilities: [k] log p(a | x, y) of the candidates; what precedes them is the same for all.
        heuristics: [judges][k] h of each candidate's lookahead.
        weights: [judges] w, DeAL's lambda included.
    """
    scores = list(log_probabilities)
    for w, h in zip(weights, heuristics, strict=True):
        scores = [score + w * one for score, one in zip(scores, h, strict=True)]
    return max(range(len(scores)), key=scores.__getitem__)


class DealStrategy:
    """Token by token, each looked behind."""

    method: ClassVar[str] = "deal"
    control: ClassVar[bool] = False
    structured: ClassVar[bool] = False
    adapters: ClassVar[bool] = False

    def admit(self, request: Request, engine: EngineFacts) -> None:
        """Refuses what a choice of each single token cannot honour.

        Raises:
            OptionError: names what stands in the way and what would be accepted.
        """
        options: DealOptions = request.option(DealOptions)
        weights("deal", options.deal_weights, judges("deal", options.deal_reward, engine))
        refuse_bends("deal", request, engine)
        if request.temperature > 0:
            raise OptionError(
                f"temperature={request.temperature:g} cannot be combined with deal, which takes the best token; "
                "accepted: temperature=0",
                "temperature",
            )
        if not engine.scores_are_logprobs:
            raise OptionError(
                "deal reads the model's log-probabilities, but this engine reports logits; accepted: --logprobs-mode "
                "raw_logprobs or processed_logprobs",
                "deal",
            )
        if 0 <= engine.max_logprobs < options.deal_top_k:
            raise OptionError(
                f"deal_top_k={options.deal_top_k} is more than this engine tells; accepted: at most "
                f"{engine.max_logprobs} (--max-logprobs)",
                "deal_top_k",
            )
        for name, value, is_set in (
            ("logprobs", True, request.logprobs),
            ("ignore_eos", True, request.ignore_eos),
            ("min_tokens", request.min_tokens, request.min_tokens > 0),
        ):
            if is_set:
                raise OptionError(f"{name}={value!r} cannot be combined with deal; drop it", name)

    async def run(self, request: Request, engine: Engine, notes: Notes) -> AsyncGenerator[Chunk, None]:
        """One choice; each token leaves when it is chosen.

        Raises:
            JudgeError: a judge failed, and ``deal_fallback`` asks for an error then.
        """
        options: DealOptions = request.option(DealOptions)
        names = options.deal_reward or [""]
        notes |= {"judge_calls": 0, "sampled": 0, "changed": 0}
        response: list[int] = []
        while len(response) < request.max_tokens:
            try:
                token = await _next_token(request, options, names, engine, notes, response)
            except JudgeError as error:
                notes["error"] = str(error)
                if options.deal_fallback == "error":
                    raise
                break
            response.append(token)
            ends = token in request.stop_token_ids
            finish = "stop" if ends else "length" if len(response) == request.max_tokens else None
            # vLLM gives no reason for the first of them, the end of sequence.
            yield Chunk([token], None, finish, token if token in request.stop_token_ids[1:] else None)
            if finish:
                return
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
        """How many tokens are not the model's likeliest, and what the lookaheads cost."""
        if not notes:
            return {}  # cancelled before it began
        report = {
            "changed_tokens": notes["changed"],
            "judge_calls": notes["judge_calls"],
            "sampled_tokens": notes["sampled"],
        }
        if "error" in notes:
            report |= {"error": notes["error"], "reason": "failed"}
        if "fallback_at" in notes:
            report["fallback_at"] = notes["fallback_at"]
        return report

    def conclude(self, reports: Sequence[dict[str, Any]]) -> None:
        """Choices have nothing in common."""


async def _next_token(
    request: Request,
    options: DealOptions,
    names: Sequence[str],
    engine: Engine,
    notes: Notes,
    response: Sequence[int],
) -> int:
    prefix = [*request.prompt_token_ids, *response]
    found = await engine.candidates(prefix, options.deal_top_k)
    notes["sampled"] += 1
    tokens, log_probabilities = zip(*found, strict=True)
    ahead = min(options.deal_lookahead, request.max_tokens - len(response) - 1)

    async def look(place: int) -> list[int]:
        token = tokens[place]
        seen = [*response, token]
        if ahead and token not in request.stop_token_ids:
            inner = engine.generate([*prefix, token], max_tokens=ahead, min_tokens=0, temperature=0.0)
            async with aclosing(inner) as chunks:
                async for chunk in chunks:
                    seen += chunk.token_ids
                    notes["sampled"] += len(chunk.token_ids)
        return seen

    async with aclosing(in_order(look, len(tokens), len(tokens))) as looks:
        seen = [response_ahead async for response_ahead in looks]
    notes["judge_calls"] += len(seen) * len(names)
    heuristics = await asyncio.gather(*(engine.judge(name, seen) for name in names))
    place = best_token(log_probabilities, heuristics, options.deal_weights or [1.0] * len(names))
    notes["changed"] += place > 0
    chosen: int = tokens[place]
    return chosen
