"""A server that drains lets responses of ours end first."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_align_spec.patches import Patch


def wrap(original: Any, hook: Callable[..., Any]) -> Any:
    """The hook waits, and says how much of the time is left; a shutdown that does not drain is vLLM's own."""

    @wraps(original)
    def shutdown(self: Any, timeout: float | None = None) -> None:
        original(self, timeout=hook(self, timeout) if timeout else timeout)

    return shutdown


PATCH = Patch(
    name="shutdown",
    module="vllm.v1.engine.async_llm",
    symbol="AsyncLLM.shutdown",
    why="An engine that drains rejects new requests, and a steered response is made of many, one after another.",
    how="With a timeout, a hook waits until those that are under way have ended; the engine drains after that.",
    upstream="https://github.com/vllm-project/vllm/blob/main/vllm/v1/engine/async_llm.py",
    removable_when="Draining can be put off by whoever still has requests to make.",
    fingerprints={"0.32": "d902f9efde2f7e19", "0.33": "d902f9efde2f7e19"},
    wrap=wrap,
)
