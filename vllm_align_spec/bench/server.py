"""A real server that lives as long as a ``with`` block."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import httpx
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vllm_align_spec import lab

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0
SERVED_NAME = "lab-base"

# Blocks of 32 tokens, because lab responses never fill the CPU's default of 128. Eager, because compiling takes a C++
# compiler and minutes, and these models finish first.
LAB_ARGUMENTS = (
    "--dtype",
    "float32",
    "--block-size",
    "32",
    "--max-model-len",
    "1024",
    "--max-num-seqs",
    "16",
    "--enforce-eager",
    "--served-model-name",
    SERVED_NAME,
)
LAB_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


class ServerError(RuntimeError):
    """The server did not come up."""


class Server:
    """``vllm-align-spec serve`` on the lab's base model.

    Args:
        arguments: more arguments of ``vllm serve``.
        log: file for what the server prints.
        environment: variables on top of this process's.
        port: 0 takes a free one.
    """

    def __init__(
        self, arguments: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None, port: int = 0
    ) -> None:
        self.log = log
        self.port = port or _free_port()
        self.root = f"http://127.0.0.1:{self.port}"
        self.keep = False
        """Whether the server outlives the ``with`` block."""
        command = [sys.executable, "-m", "vllm_align_spec.cli", "serve", str(lab.model_path("base"))]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *LAB_ARGUMENTS, *arguments]
        variables = {**LAB_ENVIRONMENT, **os.environ}
        variables.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        with log.open("wb") as output:
            # A session of its own: Ctrl-C reaches us, and we end the whole group.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**variables, **(environment or {})},
                start_new_session=True,
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not (self.keep and kind is None):
            self.stop()

    def wait(self, console: Console) -> float:
        """Waits until the server is healthy and returns the seconds since it was asked first.

        Raises:
            ServerError: it ended, or took too long; the message ends with what it printed last.
        """
        start = time.monotonic()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("starting the server")
            while not self._healthy():
                if self.process.poll() is not None:
                    raise ServerError(f"the server ended with code {self.process.returncode}:\n{self._tail(30)}")
                if time.monotonic() - start > START_TIMEOUT_S:
                    raise ServerError(f"the server was not up after {START_TIMEOUT_S:g} s:\n{self._tail(30)}")
                progress.update(task, description=f"starting the server: {self._stage()}")
                time.sleep(0.3)
        return time.monotonic() - start

    def stop(self) -> None:
        """Ends the server and everything it started."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def metrics(self, prefix: str) -> dict[str, float]:
        """The samples of ``/metrics`` whose names begin with ``prefix``, labels included."""
        lines = httpx.get(f"{self.root}/metrics", timeout=30).text.splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if line.startswith(prefix))
        return {name: float(value) for name, value in samples}

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"{self.root}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def _tail(self, lines: int) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _stage(self) -> str:
        told = self._tail(1).rpartition("] ")[2]
        return told[:70] or "importing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
