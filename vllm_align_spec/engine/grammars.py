"""Grammars that vLLM has verified, so that one which many requests bring is verified once.

Verifying takes from a third of a millisecond (a small schema) to as long as a schema is large, and admission does it
on the event loop, where it holds up whoever else is served.
"""

from __future__ import annotations

from collections import OrderedDict

from vllm.sampling_params import StructuredOutputsParams

from vllm_align_spec.metrics import metrics

MAX_BYTES = 16 * 2**20
"""Of the texts that are kept; the least recently used one goes first."""


class Grammars:
    """By the text that a request brought, what vLLM made of it. Nobody changes that later."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._known: OrderedDict[str, StructuredOutputsParams] = OrderedDict()
        self._bytes = 0

    def get(self, text: str) -> StructuredOutputsParams | None:
        """The verified one, if it is known."""
        found = self._known.get(text)
        if found is not None:
            self._known.move_to_end(text)
        return found

    def put(self, text: str, verified: StructuredOutputsParams) -> None:
        """Keeps one, unless it is larger than all that may be kept."""
        # The object holds the text once more.
        size = 2 * len(text)
        if size > self._max_bytes or text in self._known:
            return
        self._known[text] = verified
        self._bytes += size
        while self._bytes > self._max_bytes:
            oldest, _ = self._known.popitem(last=False)
            self._bytes -= 2 * len(oldest)
        metrics().grammar_bytes.set(self._bytes)
