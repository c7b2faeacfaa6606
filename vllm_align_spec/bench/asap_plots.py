"""The plots of bench `asap`: throughput and growth; steps; samplers and records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_align_spec.bench.asap_laws import SAMPLERS, blocks
from vllm_align_spec.bench.asap_records import LANES as THROUGHPUT_LANES
from vllm_align_spec.bench.asap_records import SHORT_TOKENS
from vllm_align_spec.bench.asap_steps import ROWS, SIZES, VOCABULARIES, middles
from vllm_align_spec.bench.measure import Figure, Result, axes, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "gcd": "mask alone (GCD)",
    "resampled": "1 of 10 GCD draws, by importance",
    "adaptive": "adaptive",
    "weighted": "weighted, self-normalised",
    "exact": "exact",
}


def draw(result: Result, out: Path) -> None:
    """All plots, as PNG files in a folder."""
    _costs(result, out)
    _steps(result, out)
    _laws(result, out)
    _records(result, out)


def _points(axis: Axes, x: Sequence[float], figures: Sequence[Figure], **style: Any) -> None:
    errors = [[f.value - f.low for f in figures], [f.high - f.value for f in figures]]
    axis.errorbar(x, [f.value for f in figures], yerr=errors, capsize=3, marker="o", **style)


def _costs(result: Result, out: Path) -> None:
    (ratio_axis, share_axis, growth_axis), save = axes(out, "asap", 3, "Cost of grammar-aligned sampling, lab base")
    lanes = [str(n) for n in THROUGHPUT_LANES]
    for name, label in (("requests", "requests answered"), ("throughput", "tokens received")):
        _points(ratio_axis, range(3), [result.figures[f"{name}_ratio_{n}"] for n in THROUGHPUT_LANES], label=label)
    ratio_axis.axhline(1, color="black", linewidth=0.8)
    ratio_axis.axhline(0.9, color="grey", linewidth=0.8, linestyle="--", label="aim at 16 and 64")
    ratio_axis.set_xticks(range(3), lanes)
    ratio_axis.set(xlabel="concurrent requests", ylabel="adaptive / mask alone", ylim=(0, None), title="throughput")
    ratio_axis.legend(fontsize=7)
    _points(share_axis, range(3), [result.figures[f"host_share_{n}"] for n in THROUGHPUT_LANES], label="host work")
    _points(
        share_axis,
        [0, 2],
        [result.figures[f"device_share_{n}"] for n in (1, 64)],
        linestyle=":",
        label="device part (by microbenchmark)",
    )
    share_axis.set_xticks(range(3), lanes)
    share_axis.set(xlabel="concurrent requests", ylabel="share of the time", ylim=(0, None), title="where time goes")
    share_axis.legend(fontsize=7)
    for shape, label in (("narrow", "whole step"), ("wide", "whole step, all tokens equally likely")):
        found = result.samples["token_us"][shape]
        values, errors = middles([found[str(size)] for size in SIZES])
        growth_axis.errorbar(SIZES, values, yerr=errors, capsize=3, marker="o", label=label)
    values, errors = middles([result.samples["trie_row_us"][str(size)] for size in SIZES])
    growth_axis.errorbar(SIZES, values, yerr=errors, capsize=3, marker="o", linestyle="--", label="trie alone")
    growth_axis.set_xscale("log")
    growth_axis.set_yscale("log")
    growth_axis.set(xlabel="nodes of the trie", ylabel="µs per token", title="16 rows, vocabulary 4096, one thread")
    growth_axis.legend(fontsize=7)
    save()


def _steps(result: Result, out: Path) -> None:
    panels, save = axes(out, "asap_steps", len(VOCABULARIES), "One step without an engine, one thread")
    for axis, vocab in zip(panels, VOCABULARIES, strict=True):
        for part, label in (
            ("device", "draw, thin, force"),
            ("normaliser", "normaliser before the mask"),
            ("host", "host: trie, settling"),
            ("sampling", "vLLM: softmax and race"),
            ("sampling_fused", "vLLM: fused CPU kernel"),
        ):
            found = [result.samples["step_us"][f"vocabulary {vocab}, {rows} rows"][part] for rows in ROWS]
            values, errors = middles(found)
            style = ":" if part.startswith("sampling") else "-"
            axis.errorbar(ROWS, values, yerr=errors, capsize=3, marker="o", linestyle=style, label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(ROWS, [str(rows) for rows in ROWS])
        axis.set(xlabel="rows", ylabel="µs per step", title=f"vocabulary {vocab}")
        axis.legend(fontsize=6)
    save()


def _laws(result: Result, out: Path) -> None:
    (attempts_axis, tv_axis, cost_axis), save = axes(out, "asap_laws", 3, "What is sampled, and what it takes")
    found = result.samples["exact"]
    means = blocks(found["attempts"])
    size = found["samples"] / len(means)
    _points(attempts_axis, [size * (i + 0.5) for i in range(len(means))], means, label="exact, 32 lanes")
    attempts_axis.axhline(1, color="black", linewidth=0.8)
    attempts_axis.set(
        xlabel="samples, in launch order", ylabel="attempts per sample", ylim=(0, None), title="exact on a table model"
    )
    attempts_axis.legend(fontsize=7)

    found = result.samples["samplers"]
    curves, sizes = found["total_variation"], found["sizes"]

    def line(axis: Axes, name: str, x: Sequence[float], label: str, **style: Any) -> None:
        axis.plot(x, [mean(column).value for column in zip(*curves[name], strict=True)], label=label, **style)

    for name in SAMPLERS:
        line(tv_axis, name, sizes, LABELS[name], marker=".")
        cost = mean(found["attempts_per_sample"][name]).value
        line(cost_axis, name, [cost * n for n in sizes], LABELS[name], marker=".")
    line(tv_axis, "truth", sizes, "samples of the truth", color="black", linestyle="--", linewidth=0.8)
    line(tv_axis, "next sample", sizes, "adaptive: law of the next sample", color="grey", linestyle=":")
    for axis, title in ((tv_axis, "by samples"), (cost_axis, "by attempts")):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set(xlabel=title.removeprefix("by "), ylabel="total variation to the truth", title=f"bits, {title}")
    tv_axis.set_ylim(bottom=5e-3)  # once every string was seen, the next sample's law is the truth, but for rounding
    tv_axis.legend(fontsize=6)
    save()


def _records(result: Result, out: Path) -> None:
    (*gap_axes, cut_axis), save = axes(out, "asap_records", 3, "JSON records and arithmetic on the lab base")
    count = 8
    for axis, (name, found) in zip(gap_axes, result.samples["weights"].items(), strict=True):
        for way, label in (("masking", "mask alone"), ("adaptive", "adaptive")):
            columns: list[Figure] = []
            for i in range(count):
                part = slice(i * found["samples"] // count, (i + 1) * found["samples"] // count)
                columns.append(
                    mean(
                        [
                            mean(values[part]).value + z
                            for values, z in zip(found["minus_log_weight"][way], found["log_z"], strict=True)
                        ]
                    )
                )
            _points(axis, [(i + 0.5) * found["samples"] / count for i in range(count)], columns, label=label)
        axis.axhline(0, color="black", linewidth=0.8, label="the model's law given the grammar")
        axis.set(
            xlabel="samples, in launch order",
            ylabel="mean[log q - log P] + log Z, nats",
            title=f"{name}, from their law",
        )
        axis.legend(fontsize=7)
    ways = ("masking", "adaptive", "exact")
    figures = [result.figures[f"truncated_{way}"] for way in ways]
    errors = [[f.value - f.low for f in figures], [f.high - f.value for f in figures]]
    cut_axis.bar(range(3), [f.value for f in figures], 0.4, yerr=errors, capsize=4, label="delivered, cut off")
    exhausted = [0.0, *(result.figures[f"exhausted_{way}"].value for way in ways[1:])]
    cut_axis.bar([i + 0.4 for i in range(3)], exhausted, 0.4, label="not delivered: no attempt accepted")
    cut_axis.set_xticks([i + 0.2 for i in range(3)], ways)
    cut_axis.set(ylabel="share", title=f"max_tokens {SHORT_TOKENS}, free whitespace")
    cut_axis.legend(fontsize=7)
    save()
