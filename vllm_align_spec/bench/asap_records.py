"""Bench `asap` on the lab's JSON records (throughput, truncation), and how far samplers of records and of arithmetic
are from the model's own law."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vllm_align_spec.bench.asap_engine import Answer, Ask, drive, host_ms, products, records, steady
from vllm_align_spec.bench.asap_steps import exactly
from vllm_align_spec.bench.measure import Result, mean, median, ratios

if TYPE_CHECKING:
    from vllm_align_spec.engine.offline import LLM

LANES = (1, 16, 64)
TOKENS = 96
SHORT_TOKENS = 48
"""A record takes 15 to 45 tokens."""
PROMPTS = {True: 4, False: 6}
"""Quick or not: prompts whose samples are weighed."""
ATTEMPTS = 256


def throughput(engine: LLM, result: Result, quick: bool, tick: Callable[[], None]) -> None:
    """Requests answered per second, and tokens received: vLLM's structured outputs alone (a) and `adaptive` (b), as
    a b b a.

    The two differ because the mask alone also delivers what the bound on the length cut off: many tokens, of no use.
    """
    requests = {1: 8, 16: 80, 64: 192} if quick else {1: 20, 16: 160, 64: 448}
    rounds = {1: 2, 16: 2, 64: 2} if quick else {1: 8, 16: 12, 64: 6}
    known = records(engine)
    for mode in (None, "adaptive"):  # compiles grammars, loads the method
        drive(engine, [Ask(prompt, grammar, i, TOKENS, mode) for i, (prompt, grammar) in enumerate(known)], 16)
    tick()
    taken: dict[str, dict[str, Any]] = result.samples.setdefault("throughput", {})
    for lanes in LANES:
        ways: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in ("masking", "adaptive")}
        for turn in range(rounds[lanes]):
            for way in ("masking", "adaptive", "adaptive", "masking"):
                asks = [
                    Ask(prompt, grammar, 10_000 * (turn + 1) + i, TOKENS, "adaptive" if way == "adaptive" else None)
                    for i, (prompt, grammar) in enumerate(
                        known[(i + 7 * turn) % len(known)] for i in range(requests[lanes])
                    )
                ]
                seconds, answers = drive(engine, asks, lanes)
                tokens = sum(len(answer.token_ids) for answer in answers)
                counted, window = steady(answers, lanes)
                for name, value in (
                    ("requests_per_second", len(counted) / window),
                    ("tokens_per_second", sum(len(answer.token_ids) for answer in counted) / window),
                    ("valid_per_second", sum(map(valid, counted)) / window),
                    ("seconds", seconds),
                    ("tokens", tokens),
                    ("host_ms", host_ms(answers)),
                    ("rows", sum(answer.report.get("rows", 0) for answer in answers)),
                    ("attempts", sum(answer.report.get("attempts", 0) for answer in answers)),
                    ("exhausted", sum(answer.error is not None for answer in answers)),
                ):
                    ways[way][name].append(float(value))
            tick()
        taken[str(lanes)] = ways
        a, b = ways["masking"], ways["adaptive"]
        target = ">= 0.9" if lanes > 1 else ""
        result.figures[f"throughput_ratio_{lanes}"] = median(
            ratios(b["tokens_per_second"], a["tokens_per_second"]), target
        )
        result.figures[f"requests_ratio_{lanes}"] = median(
            ratios(b["requests_per_second"], a["requests_per_second"]), target
        )
        result.figures[f"valid_ratio_{lanes}"] = median(ratios(b["valid_per_second"], a["valid_per_second"]))
        shares = [ms / 1e3 / seconds for ms, seconds in zip(b["host_ms"], b["seconds"], strict=True)]
        result.figures[f"host_share_{lanes}"] = median(shares)
        result.figures[f"rows_per_token_{lanes}"] = median(ratios(b["rows"], b["tokens"]))
    result.setting["throughput"] = {
        "counted": "tokens that clients received, the end token included and those of abandoned attempts left out, "
        "from when as many requests have ended as there are lanes until the last one is launched",
        "max_tokens": TOKENS,
        "requests": requests,
        "rounds": rounds,
    }


def device_shares(result: Result) -> None:
    """What the device part of a step would take of the time of `adaptive`, by the microbenchmark's samples."""
    for lanes, rows in ((1, 1), (64, 64)):
        step = statistics.median(result.samples["step_us"][f"vocabulary 4096, {rows} rows"]["device"]) / 1e6
        ways = result.samples["throughput"][str(lanes)]["adaptive"]
        shares = [step * n / lanes / seconds for n, seconds in zip(ways["rows"], ways["seconds"], strict=True)]
        result.figures[f"device_share_{lanes}"] = median(shares)


def valid(answer: Answer) -> bool:
    """Whether a response ended by itself and is JSON."""
    try:
        json.loads(answer.text)
    except ValueError:
        return False
    return answer.finish_reason == "stop"


def truncation(engine: LLM, result: Result, quick: bool, tick: Callable[[], None]) -> None:
    """Share of responses that are cut off, with whitespace as free as vLLM's default and a modest ``max_tokens``."""
    count, repeats = (30, 4) if quick else (60, 10)
    known = records(engine)[:count]
    found: dict[str, Any] = {}
    for way in ("masking", "adaptive", "exact"):
        asks = [
            Ask(prompt, grammar, 777 + i * count + j, SHORT_TOKENS, None if way == "masking" else way, "truncation")
            for i in range(repeats)
            for j, (prompt, grammar) in enumerate(known)
        ]
        _, answers = drive(engine, asks, 16)
        delivered = [answer for answer in answers if answer.error is None]
        bad = [float(not valid(answer)) for answer in delivered]
        exhausted = [float(answer.error is not None) for answer in answers]
        example = next((answer.text for answer in delivered if not valid(answer)), None)
        found[way] = {
            "responses": len(delivered),
            "invalid": sum(bad),
            "ended_by_length": sum(answer.finish_reason == "length" for answer in delivered),
            "exhausted": sum(exhausted),
            "attempts": [answer.report.get("attempts", 1) for answer in answers],
            "dead_ends": sum(answer.report.get("dead_ends", 0) for answer in answers),
            "example": example,
        }
        result.figures[f"truncated_{way}"] = mean(bad or [0.0])
        if way != "masking":
            result.figures[f"exhausted_{way}"] = mean(exhausted)
        tick()
    result.figures["truncation_attempts_exact"] = mean([float(n) for n in found["exact"]["attempts"]])
    result.samples["truncation"] = {"max_tokens": SHORT_TOKENS, "prompts": count, "repeats": repeats, **found}


def weights(engine: LLM, result: Result, quick: bool, tick: Callable[[], None], name: str) -> None:
    """mean[log q(w) - log P(w)] = KL(q || P given L) - log Z where the language cannot be enumerated; lower is better.

    A row's law is known as it is drawn, so log P(w) - log q(w) is the accepted attempt's log weight. Masking is
    `adaptive` on an empty trie of its own for each sample; both run on the same seeds and are compared seed by seed.
    `exact` begins with a trie of its own, too.

    Args:
        engine: where it runs.
        result: gets figures and samples.
        quick: fewer prompts and samples.
        tick: called after each prompt.
        name: ``records`` or ``products``.
    """
    count, number = PROMPTS[quick], 32 if quick else 64
    known = {"records": records, "products": products}[name](engine)[:count]
    assert len(known) == count
    by_way: dict[str, list[list[float]]] = {"masking": [], "adaptive": []}
    log_z: list[float] = []
    attempts: list[float] = []
    accepted = 0
    half = number // 2
    for k, (prompt, grammar) in enumerate(known):

        def asks(mode: str, salts: Sequence[str], at: int = k, prompt: Any = prompt, grammar: Any = grammar) -> Any:
            return [
                Ask(prompt, grammar, 10_000 * at + i, TOKENS, mode, f"{name} {at} {salt}", ATTEMPTS)
                for i, salt in enumerate(salts)
            ]

        _, masked = drive(engine, asks("adaptive", [f"fresh {i}" for i in range(number)]), 16)
        _, adaptive = drive(engine, asks("adaptive", ["adaptive"] * number), 16)
        _, weighted = drive(engine, asks("weighted", ["z"] * (2 * number)), 16)
        _, exact = drive(engine, asks("exact", ["exact"] * half), 16)
        for way, answers in (("masking", masked), ("adaptive", adaptive)):
            # So many attempts a sample: all have one.
            by_way[way].append([-a.log_weight for a in answers if a.log_weight is not None])
            assert len(by_way[way][-1]) == number, "a choice ran out of attempts"
        v = [0.0 if a.log_weight is None else math.exp(a.log_weight) for a in weighted]
        log_z.append(math.log(statistics.fmean(v)))
        attempts += [float(a.report["attempts"]) for a in exact]
        accepted += sum(a.error is None for a in exact)
        tick()
    late = {way: [statistics.fmean(values[half:]) for values in by_way[way]] for way in by_way}
    for way, values in late.items():
        result.figures[f"{name}_gap_{way}"] = mean([value + z for value, z in zip(values, log_z, strict=True)])
    result.figures[f"{name}_gap_removed"] = mean(
        [masked - adapted for masked, adapted in zip(late["masking"], late["adaptive"], strict=True)]
    )
    result.figures[f"{name}_mass"] = mean([math.exp(z) for z in log_z])
    result.figures[f"{name}_attempts_exact"] = exactly(sum(attempts) / max(accepted, 1))
    result.samples.setdefault("weights", {})[name] = {
        "minus_log_weight": by_way,
        "log_z": log_z,
        "samples": number,
        "exact_attempts": attempts,
        "exact_accepted": accepted,
    }
