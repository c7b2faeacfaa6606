"""The front end can ask the workers what happened to a request."""

from collections.abc import Callable
from typing import Any

from vllm_align_spec.patches import ABSENT, Patch


def wrap(original: Any, hook: Callable[..., Any]) -> Any:
    """A method that ``collective_rpc`` finds by name."""

    def align_spec_reports(self: Any, ids: list[str]) -> dict[str, dict[str, Any]]:
        reports: dict[str, dict[str, Any]] = hook(self, ids)
        return reports

    return align_spec_reports


PATCH = Patch(
    name="worker_reports",
    module="vllm.v1.worker.worker_base",
    symbol="WorkerBase.align_spec_reports",
    why="collective_rpc by name reaches only methods of the worker; --worker-extension-cls is the operator's.",
    how="Adds a method that asks our processor.",
    upstream="https://github.com/vllm-project/vllm/blob/main/docs/design/plugin_system.md",
    removable_when="Plugins can register worker methods.",
    fingerprints={"0.32": ABSENT, "0.33": ABSENT},
    wrap=wrap,
)
