"""On a CPU, a step without draft tokens survives a request with top_k."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from vllm_align_spec.patches import Patch

if TYPE_CHECKING:
    import torch


def wrap(original: Any, hook: Callable[..., Any] | None) -> Any:
    """No rows, nothing to mask."""

    @wraps(original)
    def apply_top_k_only(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return original(logits, k) if logits.shape[0] else logits

    return apply_top_k_only


PATCH = Patch(
    name="cpu_top_k",
    module="vllm.v1.sample.ops.topk_topp_sampler",
    symbol="apply_top_k_only",
    why="With speculation, draft rows are filtered even in a step that has none, and the maximum of an empty k raises: "
    "one plain request with top_k and without top_p ends the whole engine.",
    how="Returns at once if there are no rows.",
    upstream="https://github.com/vllm-project/vllm/blob/main/vllm/v1/sample/ops/topk_topp_sampler.py",
    removable_when="apply_top_k_only accepts an empty batch.",
    fingerprints={"0.32": "1e4cb549d0e7567b", "0.33": "1e4cb549d0e7567b"},
    wrap=wrap,
)
