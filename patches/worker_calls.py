"""The front end can call what is ours in the workers."""

from collections.abc import Callable
from typing import Any

from vllm_align_spec.patches import ABSENT, Patch


def wrap(original: Any, hook: Callable[..., Any]) -> Any:
    """A method that ``collective_rpc`` finds by name."""

    def align_spec_call(self: Any, what: str, *args: Any) -> Any:
        return hook(self, what, *args)

    return align_spec_call


PATCH = Patch(
    name="worker_calls",
    module="vllm.v1.worker.worker_base",
    symbol="WorkerBase.align_spec_call",
    why="collective_rpc by name reaches only methods of the worker; --worker-extension-cls is the operator's.",
    how="Adds a method that calls our facade.",
    upstream="https://github.com/vllm-project/vllm/blob/main/docs/design/plugin_system.md",
    removable_when="Plugins can register worker methods.",
    fingerprints={"0.32": ABSENT, "0.33": ABSENT},
    wrap=wrap,
)
