"""Offline inference: a file of requests in OpenAI's batch format through servers, spread by Ray Data.

Each of Ray Data's actors starts a server of its own (or all ask one that exists), so that a line is answered exactly as
a server would have answered it, whatever method it uses. What is answered already is skipped when a run is repeated.

``python -m vllm_align_spec.cluster.batch ARGS`` is the server that an actor starts: `vllm serve`, which ends with its
parent.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vllm_align_spec.cli import run_vllm, server_environment

Line = dict[str, Any]
Batch = dict[str, "np.ndarray[Any, np.dtype[Any]]"]

ROUTES = ("/v1/chat/completions", "/v1/completions")
AGAIN = frozenset({408, 429, 500, 502, 503, 504})
START_TIMEOUT_S = 1800.0
ANSWER_TIMEOUT_S = 3600.0
BACKOFF_S = 0.5


def read(path: Path) -> tuple[list[Line], list[str]]:
    """Requests of a file, and what is wrong with its other lines.

    Args:
        path: JSON lines ``{"custom_id": ..., "method": "POST", "url": ..., "body": {...}}``.

    Raises:
        OSError: it cannot be read.
    """
    found: dict[str, Line] = {}
    wrong = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            problem = _problem(line, found)
        except ValueError as error:
            problem = f"no JSON ({error})"
        if problem is None:
            found[line["custom_id"]] = line
        else:
            wrong.append(f"line {number}: {problem}")
    return list(found.values()), wrong


def _problem(line: Any, known: Mapping[str, Line]) -> str | None:
    if not isinstance(line, dict) or not isinstance(line.get("custom_id"), str):
        return "no object with a custom_id that is a string"
    if line["custom_id"] in known:
        return f"custom_id {line['custom_id']!r} occurs before"
    if line.get("method", "POST") != "POST":
        return f"method {line['method']!r}; accepted: POST"
    if line.get("url") not in ROUTES:
        return f"url {line.get('url')!r}; accepted: {', '.join(ROUTES)}"
    if not isinstance(line.get("body"), dict):
        return "no body"
    if line["body"].get("stream"):
        return "stream=true; accepted: no stream"
    return None


def answered(path: Path) -> set[str]:
    """The custom ids that an output file has answers to; what failed is asked again.

    A last line that was cut off, by a run that was killed, is taken off the file.
    """
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    lines = [json.loads(text) for text in whole.splitlines()]
    return {line["custom_id"] for line in lines if line["error"] is None}


class Asker:
    """One of Ray Data's actors: asks a server, many requests at once.

    Args:
        url: a server that exists, up to the host and port; or None, and then
        arguments: those of ``vllm serve`` for a server of this actor's.
        in_flight: most requests under way at once.
        tries: most times that a request is asked where the server is busy or broken.
    """

    def __init__(self, url: str | None, arguments: Sequence[str], in_flight: int, tries: int) -> None:
        self._in_flight, self._tries = in_flight, tries
        self._url = url or _start(arguments)
        self._key = os.environ.get("OPENAI_API_KEY", "")

    def __call__(self, batch: Batch) -> Batch:
        """Lines of requests to lines of answers."""
        lines = [json.loads(text) for text in batch["line"]]
        answers = asyncio.run(self._ask_all(lines))
        return {"line": np.array([json.dumps(answer) for answer in answers], dtype=object)}

    async def _ask_all(self, lines: Sequence[Line]) -> list[Line]:
        limits = httpx.Limits(max_connections=self._in_flight)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        async with httpx.AsyncClient(
            base_url=self._url, timeout=ANSWER_TIMEOUT_S, limits=limits, headers=headers
        ) as client:
            return list(await asyncio.gather(*(self._ask(client, line) for line in lines)))

    async def _ask(self, client: httpx.AsyncClient, line: Line) -> Line:
        answer: Line = {"custom_id": line["custom_id"], "response": None, "error": None, "report": None}
        for left in range(self._tries - 1, -1, -1):
            try:
                response = await client.post(line["url"], json=line["body"])
            except httpx.HTTPError as error:
                answer["error"] = {"code": "unreachable", "message": f"{type(error).__name__}: {error}"}
            else:
                body = _json(response)
                answer["response"] = {"status_code": response.status_code, "body": body}
                answer["error"] = None if response.status_code == 200 else {"code": "failed", "message": str(body)}
                if response.status_code not in AGAIN:
                    break
            if left:
                await asyncio.sleep(BACKOFF_S * 2 ** (self._tries - 1 - left) * random.uniform(0.5, 1.5))
        if answer["error"] is None and line["body"].get("vllm_xargs"):
            with suppress(httpx.HTTPError):
                told = await client.get(f"/v1/align_spec/reports/{answer['response']['body']['id']}")
                answer["report"] = _json(told) if told.status_code == 200 else None
        return answer


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return response.text


def _start(arguments: Sequence[str]) -> str:
    """A server of this process's; returns its address when it is healthy.

    Raises:
        RuntimeError: it ended, or was not up in time; its own words stand in the actor's log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-m", __name__, *arguments, "--host", "127.0.0.1", "--port", str(port)]
    # Its standard input closes when this process is gone, however it went.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, env=server_environment(os.environ), start_new_session=True
    )
    atexit.register(_stop, process)
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"vllm serve {' '.join(arguments)} ended with code {process.returncode}")
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return url
        time.sleep(0.5)
    _stop(process)
    raise RuntimeError(f"vllm serve {' '.join(arguments)} was not up after {START_TIMEOUT_S:g} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def answers(lines: Sequence[Line], parsed: argparse.Namespace) -> Iterator[Line]:
    """Asks all lines, in whatever order they are answered."""
    import pyarrow
    import ray

    # What is started here for this run has the CPUs that the servers are said to need, however many that is.
    own = {"num_cpus": max(os.cpu_count() or 1, math.ceil(parsed.servers * parsed.cpus))} if not parsed.address else {}
    ray.init(address=parsed.address, log_to_driver=parsed.verbose, include_dashboard=False, **own)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts requests, Ray's would count blocks
    texts = [json.dumps(line) for line in lines]
    # Some blocks for each server, so that none is left with all that is slow. They stand in memory already: nothing
    # but the servers needs a CPU of Ray's.
    size = min(4 * parsed.in_flight, math.ceil(len(texts) / parsed.servers))
    blocks = [pyarrow.table({"line": texts[i : i + size]}) for i in range(0, len(texts), size)]
    asked = ray.data.from_arrow(blocks).map_batches(
        Asker,
        batch_size=None,
        concurrency=parsed.servers,
        num_cpus=parsed.cpus,
        num_gpus=parsed.gpus or None,
        fn_constructor_args=(parsed.url, parsed.serve, parsed.in_flight, parsed.tries),
    )
    try:
        for row in asked.iter_rows():
            yield json.loads(row["line"])
    finally:
        ray.shutdown()


def run(parsed: argparse.Namespace) -> int:
    """The command ``vllm-align-spec batch``.

    Returns:
        0 if every line of the input has an answer now, else 1.
    """
    console = Console()
    if (parsed.url is None) == (not parsed.serve):
        console.print("vllm-align-spec: name either --url or, after --, the arguments of `vllm serve`", style="red")
        return 2
    try:
        lines, wrong = read(parsed.input)
    except OSError as error:
        console.print(f"vllm-align-spec: {error}", style="red")
        return 2
    for one in wrong:
        console.print(f"{parsed.input}, {one}", style="yellow", markup=False)
    done = answered(parsed.output)
    left = [line for line in lines if line["custom_id"] not in done]
    console.print(f"{len(lines)} requests, {len(lines) - len(left)} of them answered before")
    failed = tokens = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress,
        parsed.output.open("a", encoding="utf-8") as output,
    ):
        task = progress.add_task("starting", total=len(left))
        for answer in answers(left, parsed) if left else ():
            print(json.dumps(answer), file=output, flush=True)
            failed += answer["error"] is not None
            usage = answer["response"]["body"].get("usage") if answer["error"] is None else None
            tokens += (usage or {}).get("completion_tokens", 0)
            progress.update(task, advance=1, description=f"{tokens} tokens")
    console.print(f"{len(left) - failed} answered, {failed} failed, {len(wrong)} lines were no requests")
    return int(bool(failed or wrong))


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(run_vllm(["serve", *sys.argv[1:]]))
