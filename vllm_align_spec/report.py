"""What happened to a request: how workers' reports are fetched, and where finished reports can be read.

A report is a JSON object: ``id``, ``created`` (Unix seconds), ``complete`` and ``choices``. Each choice carries its
``index``, ``method``, ``outcome`` (``completed`` | ``cancelled`` | ``failed``), ``response_tokens``,
``first_token_ms``, ``total_ms``, and whatever its strategy adds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from vllm_align_spec.metrics import metrics
from vllm_align_spec.options import ReportOptions

logger = logging.getLogger(__name__)

INTERVAL_S = 0.05
"""Shortest time between two calls to the workers: each one delays their next step."""
UNHURRIED_S = 0.5
"""That time where nobody waits for a report."""

CALL_TIMEOUT_S = 30.0
IDS_PER_CALL = 1024

WorkerReports = Mapping[str, Mapping[str, Any]]
"""For each id of an inner request, what each method's processor says of it."""


class ReportCollector:
    """Fetches the workers' reports of ended requests, in batches, one call in flight.

    Args:
        ask: calls the workers; a failure costs the reports of that batch and nothing else.
    """

    def __init__(self, ask: Callable[[list[str]], Awaitable[WorkerReports]]) -> None:
        self._ask = ask
        self._waiting: dict[str, asyncio.Future[Mapping[str, Any] | None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._hurried = asyncio.Event()
        self._warned = False

    def collect(self, ident: str) -> asyncio.Future[Mapping[str, Any] | None]:
        """Asks for one report, sooner or later. The future yields None if it could not be had."""
        future: asyncio.Future[Mapping[str, Any] | None] = asyncio.get_running_loop().create_future()
        self._waiting[ident] = future
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return future

    def hurry(self) -> None:
        """Somebody waits for a report."""
        self._hurried.set()

    async def _run(self) -> None:
        while self._waiting:
            # Also before the first call: whatever ends together is asked for together.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurried.wait(), UNHURRIED_S - INTERVAL_S)
            await asyncio.sleep(INTERVAL_S)
            self._hurried.clear()
            batch = {ident: self._waiting.pop(ident) for ident in list(self._waiting)[:IDS_PER_CALL]}
            found: WorkerReports = {}
            metrics().report_calls.inc()
            try:
                found = await asyncio.wait_for(self._ask(list(batch)), CALL_TIMEOUT_S)
            except Exception:
                # The requests have ended well whatever this call does.
                metrics().report_calls_failed.inc()
                logger.log(logging.DEBUG if self._warned else logging.WARNING, "Workers gave no reports", exc_info=True)
                self._warned = True
            finally:
                for ident, future in batch.items():
                    if not future.done():
                        future.set_result(found.get(ident))


class ReportStore:
    """The reports of requests that ended lately, by the id that the client saw.

    Args:
        options: bounds in number and age.
        hurry: called when somebody waits for a report that is not there yet.
    """

    def __init__(self, options: ReportOptions, hurry: Callable[[], None] = lambda: None) -> None:
        self._options, self._hurry = options, hurry
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # by request id, oldest first
        self._by_response: dict[str, dict[str, int]] = {}  # response id -> request id -> index of its prompt

    def open(self, request_id: str) -> Entry:
        """Makes room for the report of a request that just ended; a later request of the same id replaces it."""
        self._forget(request_id)
        self._drop_old(room_for=1)
        entry = self._entries[request_id] = Entry()
        for response_id, prompt in _response_ids(request_id):
            self._by_response.setdefault(response_id, {})[request_id] = prompt
        metrics().reports_stored.set(len(self._entries))
        return entry

    async def find(self, response_id: str, timeout_s: float = 2.0) -> dict[str, Any] | None:
        """The report of a response, waiting a moment if the workers have not been heard yet; None if there is none."""
        self._drop_old()
        found = {
            self._entries[request_id]: prompt for request_id, prompt in self._by_response.get(response_id, {}).items()
        }
        if not found:
            return None
        self._hurry()
        waits = [asyncio.ensure_future(entry.done.wait()) for entry in found]
        _, late = await asyncio.wait(waits, timeout=timeout_s)
        for wait in late:
            wait.cancel()
        choices = [
            {**choice, "index": prompt * len(entry.choices) + choice["index"]}
            for entry, prompt in found.items()
            for choice in entry.choices
        ]
        return {
            "id": response_id,
            "created": round(min(entry.created for entry in found), 3),
            "complete": not late and all(choice["complete"] for choice in choices),
            "choices": sorted(choices, key=lambda choice: choice["index"]),
        }

    def _drop_old(self, room_for: int = 0) -> None:
        oldest = time.monotonic() - self._options.max_age_s
        while self._entries:
            request_id, entry = next(iter(self._entries.items()))
            if entry.since >= oldest and len(self._entries) + room_for <= self._options.max_reports:
                break
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        if self._entries.pop(request_id, None) is None:
            return
        for response_id, _ in _response_ids(request_id):
            of_response = self._by_response[response_id]
            del of_response[request_id]
            if not of_response:
                del self._by_response[response_id]


class Entry:
    """One request's report: ``choices`` are all there once ``done`` is set."""

    def __init__(self) -> None:
        self.created = time.time()
        self.since = time.monotonic()
        self.done = asyncio.Event()
        self.choices: Sequence[Mapping[str, Any]] = ()


_SUFFIX = re.compile(r"(.+)[-_](\d{1,9})")


def _response_ids(request_id: str) -> list[tuple[str, int]]:
    """The response ids under which a request may be looked for, each with the index of its prompt.

    The engine's id of a request is the response's id, for some routes with ``-<prompt>`` or ``_<prompt>`` behind it.
    """
    ids = [(request_id, 0)]
    if match := _SUFFIX.fullmatch(request_id):
        ids.append((match[1], int(match[2])))
    return ids
