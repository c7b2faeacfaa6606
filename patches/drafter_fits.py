"""A drafter that cannot be served is refused before anything is loaded."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_align_spec.patches import Patch


def wrap(original: Any, hook: Callable[..., Any]) -> Any:
    """The hook sees target and drafter when both are known, and raises what the operator is to read."""

    @wraps(original)
    def update_arch_(self: Any) -> None:
        original(self)
        hook(self)

    return update_arch_


PATCH = Patch(
    name="drafter_fits",
    module="vllm.config.speculative",
    symbol="SpeculativeConfig.update_arch_",
    why="A draft model is held against its target only once both are loaded, minutes later for a large target.",
    how="Calls a hook after vLLM has settled the draft model's architecture.",
    upstream="https://github.com/vllm-project/vllm/blob/main/vllm/config/speculative.py",
    removable_when="A draft model's class may validate its config.",
    fingerprints={"0.32": "148ca88ce67f9883", "0.33": "148ca88ce67f9883"},
    wrap=wrap,
)
