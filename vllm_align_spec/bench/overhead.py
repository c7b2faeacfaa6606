"""What the plugin costs a server in which no request uses it.

Two engines live side by side, one in an environment where the plugin is installed and one where its entry points
cannot be found, and generate in turn, A B B A, the same tokens. Each runs in a process of its own and is asked as the
API server asks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_align_spec import lab
from vllm_align_spec.bench.measure import PAUSE_S, Result, axes, console, median, ratios

HERE = Path(__file__).parent
DRAFTS = 5
STOP_TIMEOUT_S = 30.0
PROMPT = list(range(40, 72))

# Ours cannot be found; whatever else is installed can.
WITHOUT_US = """
import importlib.metadata as metadata
_entry_points = metadata.entry_points
def entry_points(**wanted):
    found = _entry_points(**wanted)
    if not wanted:
        return found
    return metadata.EntryPoints(point for point in found if not point.value.startswith("vllm_align_spec."))
metadata.entry_points = entry_points
"""

# As vLLM calls it: before anything that it patches is imported.
REGISTER = """
import time
start = time.perf_counter()
from vllm_align_spec.plugin import register
register()
print(time.perf_counter() - start)
"""


def run(*, quick: bool, json_file: Path | None, out: Path) -> None:
    """Measures, shows and writes.

    Args:
        quick: one start of each engine and fewer repeats.
        json_file: where the numbers go; None is a file in ``out``.
        out: folder for the figure.
    """
    started = time.monotonic()
    restarts, pairs, tokens, probes = (1, 10, 64, 3) if quick else (2, 15, 96, 8)
    result = Result("overhead")
    result.setting |= {
        "models": {"base": "lab base", "pilot": "lab pilot"},
        "num_speculative_tokens": DRAFTS,
        "tokens": tokens,
        "restarts": restarts,
        "pairs_per_restart": pairs,
        "quick": quick,
    }
    seconds: dict[str, dict[str, list[float]]] = result.samples.setdefault("seconds", {})
    memory: list[dict[str, Any]] = result.samples.setdefault("memory_mb", [])
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=probes + 2 * restarts)
        found = []
        for _ in range(probes):
            progress.update(task, description="start-up and single steps")
            found.append(_probe())
            progress.advance(task)
        result.samples["probes"] = found
        for restart in range(restarts):
            for speculation in (False, True):
                progress.update(task, description=f"throughput, {_name(speculation)}, start {restart + 1}")
                _interleave(speculation, restart, pairs, tokens, seconds, memory)
                progress.advance(task)
    _figures(result)
    _draw(result, out)
    result.finish(json_file, out, started)


def _name(speculation: bool, batch: int | None = None) -> str:
    name = "speculation" if speculation else "no speculation"
    return name if batch is None else f"{name}, batch {batch}"


def _probe() -> dict[str, float]:
    def once(*arguments: str) -> str:
        command = [sys.executable, "-P", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=_environment()).stdout

    found: dict[str, float] = json.loads(once(str(HERE / "overhead_probe.py")).splitlines()[-1])
    found["register_seconds"] = float(once("-c", REGISTER))
    return found


def _interleave(
    speculation: bool,
    restart: int,
    pairs: int,
    tokens: int,
    seconds: dict[str, dict[str, list[float]]],
    memory: list[dict[str, Any]],
) -> None:
    """One start of both engines, and pairs of runs in alternating order."""
    with ExitStack() as stack:
        arms = {"with": False, "without": True}
        names: Sequence[str] = list(arms) if restart % 2 == 0 else list(reversed(arms))
        engines = {name: stack.enter_context(_Engine(speculation, hidden=arms[name])) for name in names}
        for name, engine in engines.items():
            loaded = bool(engine.wait()["ready"])
            assert loaded != arms[name], f"the engine {name} the plugin is not what it should be"
        for batch in (1, 8):
            taken = seconds.setdefault(_name(speculation, batch), {"with": [], "without": []})
            for pair in range(-2, pairs):
                order = ("with", "without") if pair % 2 else ("without", "with")
                for name in order:
                    time.sleep(PAUSE_S)
                    one = engines[name].ask(batch=batch, tokens=tokens, ids=PROMPT)["seconds"]
                    if pair >= 0:
                        taken[name].append(one)
        memory.append({"speculation": speculation, **{name: engines[name].ask(memory=True)["memory"] for name in arms}})


class _Engine:
    """`overhead_engine` as a subprocess.

    Args:
        speculation: with the pilot as draft model.
        hidden: where our entry points cannot be found.
    """

    def __init__(self, speculation: bool, *, hidden: bool) -> None:
        arguments: dict[str, Any] = {
            "model": str(lab.model_path("base")),
            "dtype": "float32",
            "block_size": 32,
            "max_model_len": 1024,
            "max_num_seqs": 16,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "use_tqdm_on_load": False,
        }
        if speculation:
            pilot = {"method": "draft_model", "model": str(lab.model_path("pilot")), "num_speculative_tokens": DRAFTS}
            arguments["speculative_config"] = pilot
        self._folder = tempfile.TemporaryDirectory()
        environment = _environment()
        if hidden:
            Path(self._folder.name, "sitecustomize.py").write_text(WITHOUT_US, encoding="utf-8")
            environment["PYTHONPATH"] = os.pathsep.join(
                filter(None, (self._folder.name, environment.get("PYTHONPATH")))
            )
        self._log = Path(self._folder.name, "log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "overhead_engine.py"), json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,
            )

    def __enter__(self) -> _Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # It ends when nobody can ask any more; if not soon, then with all that it started.
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S if kind is None else 1)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()

    def ask(self, **asked: Any) -> dict[str, Any]:
        """Asks once and waits for the answer."""
        assert self._process.stdin is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return self.wait()

    def wait(self) -> dict[str, Any]:
        """The next answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine ended:\n{self._log.read_text()[-3000:]}")
        found: dict[str, Any] = json.loads(line)
        return found


def _environment() -> dict[str, str]:
    from vllm_align_spec.cli import server_environment

    environment = server_environment(os.environ)
    del environment["VLLM_PLUGINS"]  # both arms load what they find
    for name, value in (
        ("VLLM_WORKER_MULTIPROC_METHOD", "spawn"),
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
        ("HF_HUB_OFFLINE", "1"),
        ("VLLM_NO_USAGE_STATS", "1"),
    ):
        environment.setdefault(name, value)
    return environment


def _figures(result: Result) -> None:
    seconds, probes = result.samples["seconds"], result.samples["probes"]
    # Equal work, so throughput is the inverse of time.
    by_setting = {name: ratios(taken["without"], taken["with"]) for name, taken in seconds.items()}
    every = [ratio for found in by_setting.values() for ratio in found]
    result.figures["throughput_ratio"] = median(every, ">= 0.99")
    for name, found in by_setting.items():
        key = name.replace(", ", "_").replace(" ", "_")
        result.figures[f"throughput_ratio_{key}"] = median(found, ">= 0.99")
    result.figures["startup_seconds_added"] = median([probe["startup_seconds"] for probe in probes], "<= 0.5")
    result.figures["register_seconds"] = median([probe["register_seconds"] for probe in probes], "<= 0.3")
    added: dict[str, list[float]] = {}
    for sample in result.samples["memory_mb"]:
        for role, used in sample["with"].items():
            added.setdefault(role, []).append(used - sample["without"][role])
    by_role = {role: median(found, "<= 50") for role, found in added.items()}
    result.figures["memory_mb_added"] = max(by_role.values(), key=lambda figure: figure.value)
    for role, figure in by_role.items():
        result.figures[f"memory_mb_added_{role.lower().replace(' ', '_')}"] = figure
    for name in ("v1_step_us", "v1_new_request_us", "v2_step_us"):
        result.figures[f"facade_{name}"] = median([probe[name] for probe in probes])


def _draw(result: Result, out: Path) -> None:
    (axis,), save = axes(out, "overhead", 1, "Throughput with the plugin / without it")
    seconds = result.samples["seconds"]
    found = [ratios(taken["without"], taken["with"]) for taken in seconds.values()]
    axis.boxplot(found, showfliers=False)
    axis.set_xticks(range(1, len(seconds) + 1), [name.replace(", ", "\n") for name in seconds], fontsize=8)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.axhline(0.99, color="red", linewidth=0.8, linestyle=":")
    axis.set(ylabel="ratio, one point a pair")
    save()
