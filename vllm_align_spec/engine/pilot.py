"""The pilot of WSD's hand-over mode: an OpenAI-compatible endpoint that exists, or a server that we start.

``python -m vllm_align_spec.engine.pilot ARGS`` is the server we start: vLLM's own, which ends when its parent does.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import httpx

from vllm_align_spec import DISABLE_ENV
from vllm_align_spec.options import PilotOptions
from vllm_align_spec.rewards.http import wire
from vllm_align_spec.strategies.base import PilotError

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 900.0
SERVED_NAME = "pilot"

COMPLETION_TOKENS = 4096
"""Most tokens asked for where there are no messages: that API's own default is 16. Chat has none."""


class Pilot:
    """Asks the pilot for greedy answers.

    Args:
        options: where it is, or what to start. A pilot that we start is started once, by the first request that
            needs it or by `start`, and ends with this process.
    """

    def __init__(self, options: PilotOptions) -> None:
        self._options = options
        self._client: httpx.AsyncClient | None = None
        self._url = options.url.rstrip("/") if options.url else None
        self._ready: asyncio.Task[None] | None = None

    async def draft(self, messages: Sequence[Mapping[str, Any]] | None, text: str | None) -> AsyncGenerator[str, None]:
        """Streams the pilot's greedy answer, ``chunk_tokens`` at a time, until the pilot ends it.

        Args:
            messages: a conversation, which the pilot renders with its own chat template; or None, and then
            text: a plain prompt that it completes.

        Raises:
            PilotError: it is down, slow, or does not speak the API.
        """
        options = self._options
        await self.start()
        body: dict[str, Any] = {
            "model": options.model if options.url else SERVED_NAME,
            "stream": True,
            "temperature": 0,
        }
        if messages is not None:
            path, body["messages"] = "chat/completions", wire(messages)
        else:
            path, body["prompt"], body["max_tokens"] = "completions", text, COMPLETION_TOKENS
        key = os.environ.get(options.api_key_env, "") if options.api_key_env else ""
        if self._client is None:
            self._client = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=options.timeout_s))
        request = self._client.build_request(
            "POST",
            f"{self._url}/{path}",
            json=body,
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )
        response: httpx.Response | None = None
        try:
            async with asyncio.timeout(options.timeout_s):
                response = await self._client.send(request, stream=True)
                if response.status_code != 200:
                    detail = (await response.aread())[:300].decode(errors="replace")
                    raise PilotError(f"the pilot answered HTTP {response.status_code}: {detail}")
            lines = response.aiter_lines()
            ended = False
            while not ended:
                pieces: list[str] = []
                async with asyncio.timeout(options.timeout_s):
                    while not ended and len(pieces) < options.chunk_tokens:
                        piece, ended = await _next_piece(lines)
                        pieces.append(piece)
                if any(pieces):
                    yield "".join(pieces)
        except TimeoutError:
            raise PilotError(f"the pilot took longer than timeout_s={options.timeout_s:g} for a chunk", True) from None
        except httpx.HTTPError as error:
            raise PilotError(f"the pilot cannot be reached: {type(error).__name__}: {error}") from error
        finally:
            if response is not None:
                await response.aclose()

    async def start(self) -> None:
        """Waits until the pilot can be asked; starts it if it is ours to start.

        Raises:
            PilotError: our pilot did not come up.
        """
        if self._options.url is not None:
            return
        if self._ready is None or (self._ready.done() and self._ready.exception() is not None):
            self._ready = asyncio.create_task(self._start_server())
        # Shielded: one client's cancellation must not stop what others wait for.
        await asyncio.shield(self._ready)

    async def _start_server(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = ["--model", self._options.model, "--served-model-name", SERVED_NAME]
        arguments += ["--host", "127.0.0.1", "--port", str(port), *self._options.engine_args]
        logger.info("Starting the pilot %s on port %d", self._options.model, port)
        process = _spawn(arguments)
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(timeout=5.0) as client:
            for _ in range(int(START_TIMEOUT_S / 0.5)):
                if process.poll() is not None:
                    raise PilotError(
                        f"the pilot {self._options.model} ended at start-up with code {process.returncode}"
                    )
                with suppress(httpx.HTTPError):
                    if (await client.get(f"{url}/health")).status_code == 200:
                        self._url = f"{url}/v1"
                        return
                await asyncio.sleep(0.5)
        _stop(process)
        raise PilotError(f"the pilot {self._options.model} was not up after {START_TIMEOUT_S:g} s", True)


async def _next_piece(lines: Any) -> tuple[str, bool]:
    """The next event's text, and whether the answer ends with it."""
    async for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return "", True
        try:
            event = json.loads(data)
            if "error" in event:
                raise PilotError(f"the pilot failed: {str(event['error'])[:300]}")
            if not event["choices"]:
                continue  # usage
            choice = event["choices"][0]
            text = choice["delta"].get("content") if "delta" in choice else choice["text"]
            ended = choice.get("finish_reason") is not None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise PilotError(f"the pilot sent what is no completion event: {data[:200]!r}") from None
        if text is not None and not isinstance(text, str):
            raise PilotError(f"the pilot sent what is no text: {str(text)[:200]!r}")
        return text or "", ended
    raise PilotError("the pilot's answer broke off: no event carried a finish_reason")


def _spawn(arguments: list[str]) -> subprocess.Popen[bytes]:
    # Its standard input closes when this process is gone, however it went.
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, *arguments],
        stdin=subprocess.PIPE,
        env={**os.environ, DISABLE_ENV: "1"},
        start_new_session=True,
    )
    atexit.register(_stop, process)
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
