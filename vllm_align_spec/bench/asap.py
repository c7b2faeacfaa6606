"""What grammar-aligned sampling costs, whether it is exact, and what it is good for.

Throughput is that of the lab's JSON records with vLLM's structured outputs alone and with `adaptive`, in turn on one
engine, in tokens that clients received. A step is measured without an engine too, as are tries that grow to a million
nodes. Laws are held against enumeration: `exact` on a model that is a table, all samplers on strings of bits. What
cannot be enumerated, JSON records and arithmetic, is compared by weights, and by what is cut off at ``max_tokens``.

The parts: `asap_steps` (no engine), `asap_laws` (enumeration), `asap_records` (JSON), `asap_plots`.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_align_spec import lab
from vllm_align_spec.bench import asap_laws, asap_plots, asap_records, asap_steps
from vllm_align_spec.bench.measure import Result, console, start_engine


def run(*, quick: bool, json_file: Path | None, out: Path) -> None:
    """Measures, shows and writes.

    Args:
        quick: fewer repeats and samples; every figure is still there.
        json_file: where the numbers go; None is a file in ``out``.
        out: folder for the figures.
    """
    started = time.monotonic()
    result = Result("asap")
    result.setting |= {"models": {"base": "lab base", "table": "bigram table, 9 tokens"}, "quick": quick}
    result.setting["step_threads"] = 1
    took: dict[str, float] = result.setting.setdefault("part_seconds", {})
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:

        def part(name: str, ticks: int) -> _Part:
            return _Part(progress, name, ticks, took)

        with asap_steps.one_thread():
            with part("tries that grow", 2 * (6 if quick else 16) + 1) as tick:
                asap_steps.growth(result, quick, tick)
            with part("steps without an engine", len(asap_steps.VOCABULARIES) * len(asap_steps.ROWS)) as tick:
                asap_steps.steps(result, quick, tick)
        with part("exact on a table", 2) as tick:
            asap_laws.exact(result, quick, tick)
        gc.collect()
        base = str(lab.model_path("base"))
        with start_engine(base, "the lab's base model", max_model_len=512, max_num_seqs=64) as engine:
            with part("throughput", 7 if quick else 27) as tick:
                asap_records.throughput(engine, result, quick, tick)
            asap_records.device_shares(result)
            with part("truncation", 3) as tick:
                asap_records.truncation(engine, result, quick, tick)
            for name in ("records", "products"):
                with part(f"weights of {name}", asap_records.PROMPTS[quick]) as tick:
                    asap_records.weights(engine, result, quick, tick, name)
            with part("samplers on bits", 2 if quick else 6) as tick:
                asap_laws.samplers(engine, result, quick, tick)
        del engine
    gc.collect()  # an engine that is only collected as the interpreter exits complains
    result.figures = {name: result.figures[name] for name in sorted(result.figures, key=_place)}
    asap_plots.draw(result, out)
    console.print(f"more plots: {', '.join(str(out / f'asap_{name}.png') for name in ('steps', 'laws', 'records'))}")
    result.finish(json_file, out, started)


_FIRST = (
    "throughput",
    "requests",
    "valid",
    "host_share",
    "device_share",
    "rows_per_token",
    "growth",
    "bytes",
    "exact",
    "masked",
    "attempts",
)


def _place(name: str) -> int:
    """What others rely on comes first; otherwise the order is that of the measurement."""
    return next((i for i, prefix in enumerate(_FIRST) if name.startswith(prefix)), len(_FIRST))


class _Part:
    """A line of the progress display; calling it advances it."""

    def __init__(self, progress: Progress, name: str, ticks: int, took: dict[str, float]) -> None:
        self._progress, self._name, self._ticks, self._took = progress, name, ticks, took

    def __enter__(self) -> _Part:
        self._task = self._progress.add_task(self._name, total=self._ticks)
        self._began = time.monotonic()
        return self

    def __call__(self) -> None:
        self._progress.advance(self._task)

    def __exit__(self, *_: object) -> None:
        self._took[self._name] = round(time.monotonic() - self._began, 1)
