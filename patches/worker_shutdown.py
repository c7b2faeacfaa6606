"""A worker that ends says so."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_align_spec.patches import Patch


def wrap(original: Any, hook: Callable[..., Any]) -> Any:
    """The hook runs first; whatever it raises is its own affair."""

    @wraps(original)
    def shutdown(self: Any) -> None:
        hook(self)
        original(self)

    return shutdown


PATCH = Patch(
    name="worker_shutdown",
    module="vllm.v1.worker.worker_base",
    symbol="WorkerWrapperBase.shutdown",
    why="What a method has learnt can be kept for the next start, but nothing tells a plugin that a worker ends.",
    how="Calls a hook before the worker releases what it holds.",
    upstream="https://github.com/vllm-project/vllm/blob/main/vllm/v1/worker/worker_base.py",
    removable_when="Plugins are told of a worker's end.",
    fingerprints={"0.32": "8f0ffe1ec597f353", "0.33": "6e010743d92b385d"},
    wrap=wrap,
)
