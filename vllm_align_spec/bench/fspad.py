"""Acceptance and speed of FSPAD's drafter, its ablations, GRIFFIN and EAGLE on the lab's base model.

All drafters were trained alike (``lab drafters``), but for GRIFFIN's second stage, and answer the same held-out
prompts, greedily, in the real engine. *Tokens per forward* counts every forward pass of the target, the prompt's and
those that had no drafts included. The draft length of each drafter is chosen on every second prompt and its figure
taken from the others; ratios are paired by prompt. Speed is tokens per second of the same answers to their end, each
round timed right before or after plain decoding of its prompts. The best drafter is timed once more at its fastest
draft length, on other prompts, also with both models compiled, as a server has them if it is not told otherwise.
Drafters of other training seeds (``--other-seeds``) are counted at the draft lengths that were chosen for the shipped
ones.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from vllm_align_spec import lab
from vllm_align_spec.bench.measure import (
    PAUSE_S,
    Figure,
    Result,
    axes,
    console,
    median,
    ratios,
    start_engine,
)
from vllm_align_spec.bench.shares import SHARES, measure
from vllm_align_spec.drafters.config import VARIANTS, read
from vllm_align_spec.lab.drafters import NAMES, WIDE

if TYPE_CHECKING:
    from vllm_align_spec.engine.offline import LLM

MAIN_DRAFTS = 4
BATCHES = (1, 8)
"""Requests that run together."""
ROUND = {1: 2, 8: 16}
"""Prompts of a timed round, by batch."""
CONFIRMED = {1: 12, 8: 12}
"""Rounds at the draft length that was chosen, by batch."""
SHARE_TOKENS = 64
Counts = list[tuple[int, int]]
"""(tokens, forward passes of the target) of each prompt."""


def run(*, quick: bool, json_file: Path | None, out: Path, other_seeds: Sequence[Path] = ()) -> None:
    """Measures, shows and writes.

    Args:
        quick: one draft length, fewer prompts and repeats.
        json_file: where the numbers go; None is a file in ``out``.
        out: folder for the figure.
        other_seeds: folders that ``lab drafters --seed N --out FOLDER`` filled.
    """
    started = time.monotonic()
    drafts: tuple[int, ...] = (MAIN_DRAFTS,) if quick else (2, 3, 4, 5, 6)
    count, tokens, rounds = (48, 64, {1: 4, 8: 2}) if quick else (240, 96, {1: 4, 8: 1})
    result = Result("fspad")
    sizes = {name: read(lab.drafter_path(name)).parameters() for name in NAMES}
    for folder in other_seeds:
        for name in NAMES:
            read(folder / name)  # that one is missing is better said now
    result.setting |= {
        "models": {"target": "lab base", "drafters": sizes},
        "num_speculative_tokens": list(drafts),
        "prompts": count,
        "tokens": tokens,
        "rounds": rounds,
        "quick": quick,
        "other_seeds": len(other_seeds),
    }
    counts: dict[str, dict[int, Counts]] = result.samples.setdefault("counts", {})
    accepted: dict[str, dict[int, list[float]]] = result.tables.setdefault("accepted_by_position", {})
    rates: dict[str, dict[int, dict[str, Any]]] = result.samples.setdefault("tokens_per_second", {})
    again: list[dict[str, Counts]] = result.samples.setdefault("counts_of_other_seeds", [])
    total = len(NAMES) * (len(drafts) + len(other_seeds))
    with result.kept(out), Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=total)
        with _engine(None, 0) as plain:
            prompts = _prompts(plain, count)
            for name in NAMES:
                for k in drafts:
                    progress.update(task, description=f"{k} drafts of {name}")
                    with _engine(lab.drafter_path(name), k) as engine:
                        found, shares = _count(engine, prompts, tokens, k)
                        counts.setdefault(name, {})[k] = found
                        accepted.setdefault(name, {})[k] = shares
                        rates.setdefault(name, {})[k] = _time(plain, engine, prompts, tokens, rounds)
                    del engine
                    gc.collect()
                    progress.advance(task)
        del plain
        gc.collect()  # an engine that is only collected as the interpreter exits complains
        length = {name: _chosen(of_k) for name, of_k in counts.items()}
        for seed, folder in enumerate(other_seeds, 1):
            again.append({})
            for name in NAMES:
                progress.update(task, description=f"{name} of another seed ({seed})")
                with _engine(folder / name, length[name]) as engine:
                    again[-1][name], _ = _count(engine, prompts, tokens, length[name])
                del engine
                gc.collect()
                progress.advance(task)
    with result.kept(out):
        _shares(result, prompts, length)
        _figures(result, counts, again, rates, length)
        used = max(number * ROUND[batch] for batch, number in rounds.items())
        modes = ("eager",) if quick else ("eager", "compiled")
        _confirm(result, prompts[used:], tokens, {1: 4, 8: 1} if quick else CONFIRMED, modes)
        _show(result, counts, accepted)
        _draw(result, out, counts, accepted, rates)
    result.finish(json_file, out, started)


def _settings(drafter: Path | None, k: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": max(BATCHES)}
    settings["enable_prefix_caching"] = False  # prompts come again
    if drafter is not None:
        settings["speculative_config"] = {"method": "eagle", "model": str(drafter), "num_speculative_tokens": k}
    return settings


def _engine(drafter: Path | None, k: int, **others: Any) -> LLM:
    settings = _settings(drafter, k) | others
    if drafter is not None:
        settings["per_request_spec_decode_metrics"] = "summary"
    told = f"{k} drafts of {drafter.name}" if drafter is not None else "no drafter"
    return start_engine(str(lab.model_path("base")), told, **settings)


def _shares(result: Result, prompts: list[list[int]], length: dict[str, int]) -> None:
    """Where a step's time goes, with and without drafts."""
    found: dict[str, dict[int, dict[str, float]]] = result.tables.setdefault("share_of_step_time", {})
    for name in (None, "eagle", "fspad", "griffin"):
        drafter = None if name is None else lab.drafter_path(name)
        told = f"a clock in its worker, {name or 'no drafter'}"
        settings = _settings(drafter, length.get(name or "", 0))
        (found[name or "plain"],) = measure(str(lab.model_path("base")), told, settings, prompts, SHARE_TOKENS, BATCHES)
        gc.collect()


def _prompts(engine: LLM, count: int) -> list[list[int]]:
    tokenizer = engine.get_tokenizer()
    return [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for messages in lab.heldout_prompts("chat")[:count]
    ]


def _generate(engine: LLM, prompts: Sequence[list[int]], tokens: int) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens)
    found: list[Any] = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return found


def _count(engine: LLM, prompts: list[list[int]], tokens: int, k: int) -> tuple[Counts, list[float]]:
    """Tokens and forward passes by prompt, and the share of drafts accepted at each position."""
    counts: Counts = []
    steps = [0] * (k + 1)  # by how many drafts were accepted
    for output in _generate(engine, prompts, tokens):
        completion = output.outputs[0]
        metrics = completion.spec_decode_metrics
        told = [int(n) for n in metrics.histogram] if metrics is not None else []
        for n, times in enumerate(told):
            steps[n] += times
        counts.append((len(completion.token_ids), sum(told) + 1))
    shares = [sum(steps[position + 1 :]) / max(1, sum(steps)) for position in range(k)]
    return counts, shares


def _time(
    plain: LLM, engine: LLM, prompts: list[list[int]], tokens: int, rounds: dict[int, int]
) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of both engines by batch."""
    found: dict[str, dict[str, list[float]]] = {}
    ways = {"plain": plain, "drafted": engine}
    for batch, count in rounds.items():
        for way in ways.values():
            _tokens_per_second(way, prompts[-batch:], tokens, batch)  # warms up
        timed = found[str(batch)] = {name: [] for name in ways}
        for number in range(count):
            chosen = prompts[number * ROUND[batch] : (number + 1) * ROUND[batch]]
            for name in ways if number % 2 else reversed(ways):
                timed[name].append(_tokens_per_second(ways[name], chosen, tokens, batch))
    return found


def _tokens_per_second(engine: LLM, prompts: list[list[int]], tokens: int, batch: int) -> float:
    """One prompt after the other, or all at once where as many run together as the engine admits."""
    parts = [prompts] if batch == max(BATCHES) else [[prompt] for prompt in prompts]
    time.sleep(PAUSE_S)
    start = time.perf_counter()
    outputs = [output for part in parts for output in _generate(engine, part, tokens)]
    return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - start)


def _rate(counts: Counts) -> float:
    return sum(tokens for tokens, _ in counts) / sum(forwards for _, forwards in counts)


def _chosen(of_k: dict[int, Counts]) -> int:
    """The draft length with the most tokens per forward on the tuning half."""
    return max(of_k, key=lambda k: _rate(of_k[k][::2]))


def _paired(above: Counts, below: Counts, target: str = "") -> Figure:
    """Ratio of two rates with a bootstrap interval over prompts, drawn for both at once."""
    rng = random.Random(0)
    rows = list(zip(above, below, strict=True))

    def ratio(drawn: Sequence[tuple[tuple[int, int], tuple[int, int]]]) -> float:
        return _rate([a for a, _ in drawn]) / _rate([b for _, b in drawn])

    drawn = sorted(ratio(rng.choices(rows, k=len(rows))) for _ in range(2000))
    return Figure(ratio(rows), drawn[49], drawn[1949], target)


def _figures(
    result: Result,
    counts: dict[str, dict[int, Counts]],
    again: list[dict[str, Counts]],
    rates: dict[str, dict[int, Any]],
    length: dict[str, int],
) -> None:
    result.tables["tokens_per_forward"] = {v: {k: _rate(c) for k, c in of_k.items()} for v, of_k in counts.items()}
    result.tables["tokens_per_forward_of_other_seeds"] = [{v: _rate(c) for v, c in of.items()} for of in again]
    result.tables["chosen_drafts"] = length
    best, alike = (max(of, key=lambda v: _rate(counts[v][length[v]][::2])) for of in ({*NAMES} - {WIDE}, VARIANTS))
    result.tables |= {"best": best, "best_trained_alike": alike}
    seeds = [{name: of_k[length[name]] for name, of_k in counts.items()}, *again]
    for seed, of in enumerate(seeds):
        held = {name: found[1::2] for name, found in of.items()}
        suffix = f"_other_seed_{seed}" if seed else ""
        result.figures[f"ratio_to_eagle{suffix}"] = _paired(held["fspad"], held["eagle"], ">= 1.15")
        result.figures[f"best_ratio_to_eagle{suffix}"] = _paired(held[best], held["eagle"], ">= 1.30")
        result.figures[f"best_trained_alike_ratio_to_eagle{suffix}"] = _paired(held[alike], held["eagle"])
        for name in (WIDE, "no-feature-sampling", "no-partial-alignment"):
            key = f"ratio_to_{name.replace('-', '_')}{suffix}"
            result.figures[key] = _paired(held["fspad"], held[name], ">= 1.00")

    result.tables["speed_ratio"] = {
        name: {k: {batch: median(_gains(timed)).value for batch, timed in of.items()} for k, of in of_k.items()}
        for name, of_k in rates.items()
    }


def _gains(timed: dict[str, list[float]]) -> list[float]:
    return ratios(timed["drafted"], timed["plain"])


def _confirm(
    result: Result, prompts: list[list[int]], tokens: int, rounds: dict[int, int], modes: Sequence[str]
) -> None:
    """Times the best drafter once more at the draft length that was fastest, on prompts that did not choose it."""
    best = result.tables["best"]
    for mode in modes:
        eager = mode == "eager"
        with _engine(None, 0, enforce_eager=eager) as plain:
            for batch, aim in ((1, ">= 1.50"), (8, ">= 1.00")):
                speeds = result.tables["speed_ratio"][best]
                k = max(speeds, key=lambda k: speeds[k][str(batch)])
                with _engine(lab.drafter_path(best), k, enforce_eager=eager) as engine:
                    timed = _time(plain, engine, prompts, tokens, {batch: rounds[batch]})[str(batch)]
                del engine
                gc.collect()
                suffix = "" if eager else "_compiled"
                result.samples[f"tokens_per_second_batch_{batch}{suffix}"] = {"drafts": k, **timed}
                result.figures[f"best_speed_ratio_batch_{batch}{suffix}"] = median(_gains(timed), aim if eager else "")
        del plain
        gc.collect()


def _show(result: Result, counts: dict[str, dict[int, Counts]], accepted: dict[str, dict[int, list[float]]]) -> None:
    parts = [name for name in SHARES if name != "companion"]
    steps = Table("drafter", "batch", *parts, title="share of a step's time", title_justify="left")
    for name, of_batch in result.tables["share_of_step_time"].items():
        for batch, of in of_batch.items():
            steps.add_row(name, str(batch), *(f"{of[part]:.2f}" for part in parts))
    console.print(steps)
    table = Table(title="tokens per forward of the target, and drafts accepted by position", title_justify="left")
    for column in ("drafter", "parameters", "drafts", "tokens per forward", "accepted"):
        table.add_column(column, justify="left" if column == "drafter" else "right")
    for variant, of_k in counts.items():
        for k, found in of_k.items():
            size = result.setting["models"]["drafters"][variant]
            shares = " ".join(f"{share:.2f}" for share in accepted[variant][k])
            table.add_row(variant, f"{size / 1e6:.2f} M", str(k), f"{_rate(found):.2f}", shares)
    console.print(table)


def _draw(
    result: Result,
    out: Path,
    counts: dict[str, dict[int, Counts]],
    accepted: dict[str, dict[int, list[float]]],
    rates: dict[str, dict[int, Any]],
) -> None:
    (left, middle, right), save = axes(out, "fspad", 3, "Drafters on the lab's base model, greedy")
    names = list(counts)
    lengths = list(counts[names[0]])
    longest = max(lengths)

    def speeds(variant: str, batch: int) -> list[float]:
        return [median(_gains(rates[variant][k][str(batch)])).value for k in lengths]

    for variant in names:
        left.plot(lengths, [_rate(counts[variant][k]) for k in lengths], marker="o", label=variant)
        middle.plot(range(1, longest + 1), accepted[variant][longest], marker="o", label=variant)
        line = right.plot(lengths, speeds(variant, 1), marker="o", label=variant)
        right.plot(lengths, speeds(variant, 8), marker="s", linestyle=":", color=line[0].get_color())
    left.set(xlabel="draft tokens", ylabel="tokens per forward")
    middle.set_xticks(range(1, longest + 1))
    middle.set(xlabel="position of the draft", ylabel=f"share accepted, {longest} drafts", ylim=(0, 1))
    right.set(xlabel="draft tokens", ylabel="speed / no drafter (dotted: batch 8)")
    right.axhline(1, color="black", linewidth=0.8)
    for axis in (left, right):
        axis.set_xticks(lengths)
    left.legend(fontsize=7)
    save()
