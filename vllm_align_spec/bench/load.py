"""A server under mixed traffic, asked by ``vllm bench serve``, a client that none of us wrote.

Ordinary requests are measured four times in turn: on a stock vLLM, on a server with the plugin, there beside as many
more ordinary ones, and there beside requests of four methods. The last two differ in nothing but the neighbours.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_align_spec import DISABLE_ENV, lab
from vllm_align_spec.bench.asap_engine import record_schema
from vllm_align_spec.bench.measure import Result, axes, console, mean, median, ratios
from vllm_align_spec.bench.server import SERVED_NAME, Server

CONCURRENCY = 8
"""Of the measured requests, and of their neighbours together."""
TOKENS = 48
NEIGHBOURS = 3000
"""Requests that a neighbour has in store, more than it can ask meanwhile; its client prepares them all first."""
DRAFTS = 5
SETTINGS = ("stock", "alone", "beside plain", "beside methods")
START_TIMEOUT_S = 300.0

METHODS: dict[str, dict[str, Any]] = {
    "wsd": {"vllm_xargs": {"wsd": "shared"}},
    "asap": {"vllm_xargs": {"asap": "adaptive"}},
    "args": {"vllm_xargs": {"args": "on", "args_weight": 1.0}},
    "cards": {"vllm_xargs": {"cards": "on", "cards_threshold": 4.0, "cards_entropy": 1.5}},
}
"""``extra_body`` of each method's requests."""


def run(*, quick: bool, json_file: Path | None, out: Path) -> None:
    """Measures, shows and writes.

    Args:
        quick: one round, and fewer requests.
        json_file: where the numbers go; None is a file in ``out``.
        out: folder for the figure.
    """
    started = time.monotonic()
    rounds, requests = (1, 64) if quick else (4, 120)
    result = Result("load")
    result.setting |= {
        "models": {"base": "lab base", "pilot": "lab pilot", "companion and judge": "lab judge"},
        "concurrency": CONCURRENCY,
        "neighbours": {name: CONCURRENCY // len(METHODS) for name in METHODS},
        "requests": requests,
        "output_tokens": TOKENS,
        "rounds": rounds,
        "quick": quick,
    }
    found: dict[str, list[dict[str, Any]]] = {setting: [] for setting in SETTINGS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prompts = _prompts(folder)
        arguments, engine = _arguments()
        ours = stack.enter_context(Server([*arguments, *engine], folder / "ours.log"))
        ours.wait(console)
        off = {DISABLE_ENV: "1"}
        stock = stack.enter_context(Server(arguments, folder / "stock.log", environment=off))
        stock.wait(console)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=rounds * len(SETTINGS))
            for turn in range(rounds):
                for setting in SETTINGS if turn % 2 == 0 else reversed(SETTINGS):
                    progress.update(task, description=f"round {turn + 1}: {setting}")
                    server = stock if setting == "stock" else ours
                    command = _client(
                        server, prompts["chat"], requests, CONCURRENCY, {"ignore_eos": True}, turn, folder / "own.json"
                    )
                    with _measuring(command) as measure, _neighbours(server, setting, prompts, folder):
                        found[setting].append(measure())
                    progress.advance(task)
        counted = {
            name: value
            for family in ("align_spec:requests_total", "align_spec:method_failures_total")
            for name, value in ours.metrics(family).items()
            if value
        }
        result.samples["server"] = counted
    _figures(result, found)
    failures = sum(value for name, value in counted.items() if 'outcome="failed"' in name or "failures" in name)
    result.figures["errors_of_methods"] = mean([failures], "0")
    _draw(result, found, out)
    result.finish(json_file, out, started)


def _arguments() -> tuple[list[str], list[str]]:
    """What both servers are started with, and what only ours understands."""
    pilot = {"method": "draft_model", "model": str(lab.model_path("pilot")), "num_speculative_tokens": DRAFTS}
    judge = str(lab.model_path("judge"))
    options = {
        "companions": {"judge": {"model": judge, "role": "reward"}},
        "rewards": {"judge": {"kind": "model", "model": judge}},
        "asap": {"warm_up": True},
    }
    own = ["--additional-config", json.dumps({"align_spec": options})]
    return ["--speculative-config", json.dumps(pilot), "--max-num-seqs", str(4 * CONCURRENCY)], own


def _prompts(folder: Path) -> dict[str, Path]:
    """Held-out prompts as ``vllm bench serve`` reads them, by kind; those of records are of one kind of record."""
    kinds = {"chat": [one[-1]["content"] for one in lab.heldout_prompts("chat")]}
    records = [one[-1]["content"] for one in lab.heldout_prompts("json")]
    METHODS["asap"]["response_format"] = {
        "type": "json_schema",
        "json_schema": {"name": "record", "schema": json.loads(record_schema(records[0]))},
    }
    kinds["json"] = [one for one in records if record_schema(one) == record_schema(records[0])]
    files = {}
    for kind, texts in kinds.items():
        files[kind] = folder / f"{kind}.jsonl"
        files[kind].write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return files


def _client(
    server: Server, prompts: Path, count: int, concurrency: int, extra: Mapping[str, Any], seed: int, result: Path
) -> list[str]:
    body = {"max_tokens": TOKENS, **extra}
    # Ordinary requests are greedy: sampled ones get other tokens from a stock vLLM on a CPU, which divides drafts by
    # uninitialised memory (patch `cpu_expand`) and accepts fewer or more of them.
    temperature = 1.0 if "vllm_xargs" in extra else 0.0
    return [
        *("vllm", "bench", "serve"),
        *("--backend", "openai-chat", "--base-url", server.root, "--endpoint", "/v1/chat/completions"),
        *("--model", SERVED_NAME, "--tokenizer", str(lab.model_path("base"))),
        *("--dataset-name", "custom", "--dataset-path", str(prompts), "--custom-output-len", str(TOKENS)),
        *("--num-prompts", str(count), "--max-concurrency", str(concurrency), "--seed", str(seed)),
        *("--temperature", str(temperature), "--extra-body", json.dumps(body)),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99"),
        *("--save-result", "--result-dir", str(result.parent), "--result-filename", result.name, "--disable-tqdm"),
    ]


@contextmanager
def _measuring(command: Sequence[str]) -> Iterator[Callable[[], dict[str, Any]]]:
    """A client that is ready to ask and is told to by a call, which gives what it then says of its requests."""
    result = Path(command[command.index("--result-dir") + 1]) / command[command.index("--result-filename") + 1]
    result.unlink(missing_ok=True)
    # Torch is there before the neighbours are: its MKL binds itself to each core in turn to count them, and the kernel
    # has let it wait for a core that an engine is bound to for as long as the engine was busy.
    call = "import sys, torch; print(flush=True); input(); from vllm_align_spec.cli import main; main(sys.argv[1:])"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", call, *command],
        stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=_environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()

        def measure() -> dict[str, Any]:
            printed, errors = process.communicate("\n")
            if process.returncode:
                raise RuntimeError(f"vllm bench serve failed:\n{printed[-1000:]}\n{errors[-2000:]}")
            found: dict[str, Any] = json.loads(result.read_text())
            names = [name for name in found if name.startswith(("p50_", "p90_", "p99_", "mean_", "median_"))]
            return {name: found[name] for name in (*names, "output_throughput", "completed", "failed")}

        try:
            yield measure
        finally:
            process.kill()


@contextmanager
def _neighbours(server: Server, setting: str, prompts: Mapping[str, Path], folder: Path) -> Iterator[None]:
    """Clients that go on asking until the ``with`` block ends."""
    traffic: dict[str, tuple[str, int, dict[str, Any]]] = {}
    if setting == "beside plain":
        traffic = {"plain": ("chat", CONCURRENCY, {"ignore_eos": True})}
    elif setting == "beside methods":
        share = CONCURRENCY // len(METHODS)
        traffic = {
            name: ("json" if name == "asap" else "chat", share, extra) for name, extra in METHODS.items()
        }  # fmt: skip
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for seed, (name, (kind, concurrency, extra)) in enumerate(traffic.items(), 100):
            command = _client(server, prompts[kind], NEIGHBOURS, concurrency, extra, seed, folder / f"{name}.json")
            command = [sys.executable, "-m", "vllm_align_spec.cli", *command]
            with (folder / f"{name}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(command, stdout=log, stderr=log, env=_environment(), start_new_session=True)
                )
        until = time.monotonic() + START_TIMEOUT_S
        while processes and _asked(server, setting) < len(traffic):
            if any(process.poll() is not None for process in processes) or time.monotonic() > until:
                logs = "\n".join((folder / f"{name}.log").read_text()[-500:] for name in traffic)
                raise RuntimeError(f"the neighbours did not come:\n{logs}")
            time.sleep(0.5)
        yield
        if ended := [name for name, process in zip(traffic, processes, strict=True) if process.poll() is not None]:
            raise RuntimeError(f"neighbours went before they were told to: {ended}")
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        while processes and server.metrics("vllm:num_requests_running")[_running(server)]:
            time.sleep(0.2)


def _running(server: Server) -> str:
    (name,) = (name for name in server.metrics("vllm:num_requests_running") if name.startswith("vllm:"))
    return name


_seen: dict[str, float] = {}


def _asked(server: Server, setting: str) -> int:
    """How many kinds of neighbours have been answered since they were started."""
    if setting == "beside plain":
        return int(server.metrics("vllm:num_requests_running")[_running(server)] >= CONCURRENCY)
    found = server.metrics("align_spec:requests_total")
    now = {name: sum(v for key, v in found.items() if f'method="{name}"' in key) for name in METHODS}
    new = sum(now[name] > _seen.setdefault(name, now[name]) for name in METHODS)
    if new == len(METHODS):
        _seen.clear()
    return new


def _environment() -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", **os.environ}


def _figures(result: Result, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    def of(setting: str, name: str) -> list[float]:
        return [float(one[name]) for one in found[setting]]

    def against(above: str, below: str, name: str, aim: str = "") -> Any:
        return median(ratios(of(above, name), of(below, name)), aim)

    result.figures["throughput_ratio_unused"] = against("alone", "stock", "output_throughput", ">= 0.99")
    result.figures["p99_ratio_unused"] = against("alone", "stock", "p99_e2el_ms")
    result.figures["throughput_ratio_mixed"] = against("beside methods", "beside plain", "output_throughput")
    for percentile in ("p50", "p90", "p99"):
        key = f"{percentile}_ratio_ordinary"
        result.figures[key] = against("beside methods", "beside plain", f"{percentile}_e2el_ms")
    result.figures["p99_ratio_first_token"] = against("beside methods", "beside plain", "p99_ttft_ms")
    result.figures["p99_ratio_next_token"] = against("beside methods", "beside plain", "p99_itl_ms")
    result.figures["errors"] = mean([float(one["failed"]) for ones in found.values() for one in ones], "0")
    result.samples["measured"] = {setting: list(ones) for setting, ones in found.items()}


def _draw(result: Result, found: Mapping[str, Sequence[Mapping[str, Any]]], out: Path) -> None:
    (latency, throughput), save = axes(out, "load", 2, f"Ordinary requests, {CONCURRENCY} at once")
    places = range(len(SETTINGS))
    for percentile, marker in (("p50", "o"), ("p90", "s"), ("p99", "^")):
        values = [median([one[f"{percentile}_e2el_ms"] / 1e3 for one in found[setting]]) for setting in SETTINGS]
        errors = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
        latency.errorbar(
            places, [v.value for v in values], yerr=errors, capsize=3, marker=marker, linestyle="", label=percentile
        )
    latency.set(ylabel="seconds a response", ylim=(0, None))
    latency.legend(fontsize=7)
    values = [median([one["output_throughput"] for one in found[setting]]) for setting in SETTINGS]
    errors = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
    throughput.bar(places, [v.value for v in values], 0.5, yerr=errors, capsize=4)
    throughput.set(ylabel="tokens per second")
    for axis in (latency, throughput):
        axis.set_xticks(places, [setting.replace(" ", "\n") for setting in SETTINGS], fontsize=8)
    save()
