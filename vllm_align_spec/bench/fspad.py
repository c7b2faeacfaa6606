"""Acceptance and speed of FSPAD's drafter, its ablations, GRIFFIN and EAGLE on the lab's base model.

All drafters were trained alike (``lab drafters``) and answer the same held-out prompts, greedily, in the real engine.
*Tokens per forward* counts every forward pass of the target, the prompt's and those that had no drafts included. The
draft length of each drafter is chosen on every second prompt and its figure taken from the others; ratios are paired by
prompt. Speed is that of equally long answers, each timed right after plain decoding of the same prompts.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from vllm_align_spec import lab
from vllm_align_spec.bench.measure import PAUSE_S, Figure, Result, axes, console, median, ratios, start_engine
from vllm_align_spec.drafters.config import VARIANTS, read

if TYPE_CHECKING:
    from vllm_align_spec.engine.offline import LLM

MAIN_DRAFTS = 4
BATCHES = (1, 8)
Counts = list[tuple[int, int]]
"""(tokens, forward passes of the target) of each prompt."""


def run(*, quick: bool, json_file: Path | None, out: Path) -> None:
    """Measures, shows and writes.

    Args:
        quick: one draft length, fewer prompts and repeats.
        json_file: where the numbers go; None is a file in ``out``.
        out: folder for the figure.
    """
    started = time.monotonic()
    drafts: tuple[int, ...] = (MAIN_DRAFTS,) if quick else (2, 3, 4, 5, 6)
    count, tokens, repeats = (24, 64, {1: 4, 8: 2}) if quick else (120, 128, {1: 10, 8: 6})
    result = Result("fspad")
    result.setting |= {
        "models": {"target": "lab base", "drafters": {v: read(lab.drafter_path(v)).parameters() for v in VARIANTS}},
        "num_speculative_tokens": list(drafts),
        "prompts": count,
        "tokens": tokens,
        "repeats": repeats,
        "quick": quick,
    }
    counts: dict[str, dict[int, Counts]] = result.samples.setdefault("counts", {})
    accepted: dict[str, dict[int, list[float]]] = result.tables.setdefault("accepted_by_position", {})
    seconds: dict[str, dict[int, dict[str, Any]]] = result.samples.setdefault("seconds", {})
    with _engine(None, 0) as plain:
        prompts = _prompts(plain, count)
        for variant in VARIANTS:
            for k in drafts:
                with _engine(variant, k) as engine:
                    found, shares = _count(engine, prompts, tokens, k)
                    counts.setdefault(variant, {})[k] = found
                    accepted.setdefault(variant, {})[k] = shares
                    seconds.setdefault(variant, {})[k] = _time(plain, engine, prompts, tokens, repeats)
                del engine
                gc.collect()
    del plain
    gc.collect()  # an engine that is only collected as the interpreter exits complains
    _figures(result, counts, seconds)
    _show(result, counts, accepted)
    _draw(result, out, counts, accepted, seconds)
    result.finish(json_file, out, started)


def _engine(variant: str | None, k: int) -> LLM:
    speculation: dict[str, Any] = {}
    if variant is not None:
        model = str(lab.drafter_path(variant))
        speculation["speculative_config"] = {"method": "eagle", "model": model, "num_speculative_tokens": k}
        speculation["per_request_spec_decode_metrics"] = "summary"
    return start_engine(
        str(lab.model_path("base")),
        f"{k} drafts of {variant}" if variant else "no drafter",
        max_model_len=1024,
        max_num_seqs=16,
        enable_prefix_caching=False,  # prompts come again
        **speculation,
    )


def _prompts(engine: LLM, count: int) -> list[list[int]]:
    tokenizer = engine.get_tokenizer()
    return [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for messages in lab.heldout_prompts("chat")[:count]
    ]


def _generate(engine: LLM, prompts: Sequence[list[int]], tokens: int, *, natural: bool) -> tuple[float, list[Any]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=not natural)
    time.sleep(PAUSE_S)
    start = time.perf_counter()
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return time.perf_counter() - start, outputs


def _count(engine: LLM, prompts: list[list[int]], tokens: int, k: int) -> tuple[Counts, list[float]]:
    """Tokens and forward passes by prompt, and the share of drafts accepted at each position."""
    counts: Counts = []
    steps = [0] * (k + 1)  # by how many drafts were accepted
    for start in range(0, len(prompts), 8):
        for output in _generate(engine, prompts[start : start + 8], tokens, natural=True)[1]:
            completion = output.outputs[0]
            metrics = completion.spec_decode_metrics
            told = [int(n) for n in metrics.histogram] if metrics is not None else []
            for n, times in enumerate(told):
                steps[n] += times
            counts.append((len(completion.token_ids), sum(told) + 1))
    shares = [sum(steps[position + 1 :]) / max(1, sum(steps)) for position in range(k)]
    return counts, shares


def _time(
    plain: LLM, engine: LLM, prompts: list[list[int]], tokens: int, repeats: dict[int, int]
) -> dict[str, dict[str, list[float]]]:
    """Seconds of both engines by batch; the first round warms up and does not count."""
    found: dict[str, dict[str, list[float]]] = {}
    for batch in BATCHES:
        pairs = []
        for repeat in range(-1, repeats[batch]):
            chosen = [prompts[(max(repeat, 0) * batch + i) % len(prompts)] for i in range(batch)]
            pairs.append([_generate(e, chosen, tokens, natural=False)[0] for e in (plain, engine)])
        found[str(batch)] = {"plain": [p for p, _ in pairs[1:]], "drafted": [d for _, d in pairs[1:]]}
    return found


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


def _figures(result: Result, counts: dict[str, dict[int, Counts]], seconds: dict[str, dict[int, Any]]) -> None:
    result.tables["tokens_per_forward"] = {v: {k: _rate(c) for k, c in of_k.items()} for v, of_k in counts.items()}
    length = {variant: _chosen(of_k) for variant, of_k in counts.items()}
    result.tables["chosen_drafts"] = length
    held = {variant: of_k[length[variant]][1::2] for variant, of_k in counts.items()}
    best = max(counts, key=lambda v: _rate(counts[v][length[v]][::2]))
    result.tables["best"] = best
    result.figures["ratio_to_eagle"] = _paired(held["fspad"], held["eagle"], ">= 1.15")
    result.figures["best_ratio_to_eagle"] = _paired(held[best], held["eagle"], ">= 1.30")
    for name in ("no-feature-sampling", "no-partial-alignment"):
        result.figures[f"ratio_to_{name.replace('-', '_')}"] = _paired(held["fspad"], held[name], ">= 1.00")

    def speed(variant: str, batch: int, target: str) -> Figure:
        of_k = seconds[variant]
        rates = {k: median(ratios(of_k[k][str(batch)]["plain"], of_k[k][str(batch)]["drafted"]), target) for k in of_k}
        return max(rates.values(), key=lambda figure: figure.value)

    result.figures["speed_ratio_batch_1"] = speed("fspad", 1, "")
    result.figures["speed_ratio_batch_8"] = speed("fspad", 8, "")
    for batch, target in ((1, ">= 1.50"), (8, ">= 1.00")):
        found = [speed(variant, batch, target) for variant in VARIANTS]
        result.figures[f"best_speed_ratio_batch_{batch}"] = max(found, key=lambda figure: figure.value)


def _show(result: Result, counts: dict[str, dict[int, Counts]], accepted: dict[str, dict[int, list[float]]]) -> None:
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
    seconds: dict[str, dict[int, Any]],
) -> None:
    (left, middle, right), save = axes(out, "fspad", 3, "Drafters on the lab's base model, greedy")
    names = list(counts)
    lengths = list(counts[names[0]])
    longest = max(lengths)

    def speeds(variant: str, batch: int) -> list[float]:
        of_k: Callable[[int], dict[str, list[float]]] = lambda k: seconds[variant][k][str(batch)]  # noqa: E731
        return [median(ratios(of_k(k)["plain"], of_k(k)["drafted"])).value for k in lengths]

    for variant in names:
        left.plot(lengths, [_rate(counts[variant][k]) for k in lengths], marker="o", label=variant)
        middle.plot(range(1, longest + 1), accepted[variant][longest], marker="o", label=variant)
        line = right.plot(lengths, speeds(variant, 1), marker="o", label=variant)
        right.plot(lengths, speeds(variant, 8), marker="s", linestyle=":", color=line[0].get_color())
    left.set(xlabel="draft tokens", ylabel="tokens per forward")
    middle.set(xlabel="position of the draft", ylabel=f"share accepted, {longest} drafts", ylim=(0, 1))
    right.set(xlabel="draft tokens", ylabel="speed / no drafter (dotted: batch 8)")
    right.axhline(1, color="black", linewidth=0.8)
    for axis in (left, right):
        axis.set_xticks(lengths)
    left.legend(fontsize=7)
    save()
