"""On V2, a step may emit fewer tokens than verification accepted."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_align_spec.patches import Patch


def wrap(original: Any, hook: Callable[..., Any]) -> Any:
    """The hook lowers the number of tokens that each request of the chunk emits."""

    @wraps(original)
    def rejection_sample(*args: Any, **kwargs: Any) -> Any:
        sampled, num_sampled = original(*args, **kwargs)
        return sampled, hook(num_sampled)

    return rejection_sample


PATCH = Patch(
    name="v2_truncation",
    module="vllm.v1.worker.gpu.spec_decode.rejection_sampler",
    symbol="rejection_sample",
    why="A bonus token follows whenever all drafts are accepted; a processor cannot decline it.",
    how="Calls a hook on the number of sampled tokens. Emitting fewer is legal: the scheduler rolls back by itself.",
    upstream="https://github.com/vllm-project/vllm/blob/main/vllm/v1/worker/gpu/spec_decode/rejection_sampler.py",
    removable_when="A processor can say that no token follows a row.",
    fingerprints={"0.32": "a819e39834f86639", "0.33": "bb16eba8eb429716"},
    wrap=wrap,
)
