"""On V1, a step may emit fewer tokens than verification accepted."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_align_spec.patches import Patch


def wrap(original: Any, hook: Callable[..., Any]) -> Any:
    """The hook sets what comes after a request's limit to -1, vLLM's own mark for a rejected position."""

    @wraps(original)
    def rejection_sample(*args: Any, **kwargs: Any) -> Any:
        output_token_ids = original(*args, **kwargs)
        hook(output_token_ids)
        return output_token_ids

    return rejection_sample


PATCH = Patch(
    name="v1_truncation",
    module="vllm.v1.sample.rejection_sampler",
    symbol="rejection_sample",
    why="A bonus token follows whenever all drafts are accepted; a processor cannot decline it.",
    how="Calls a hook on the verified tokens. Emitting fewer is legal: the scheduler rolls back by itself.",
    upstream="https://github.com/vllm-project/vllm/blob/main/vllm/v1/sample/rejection_sampler.py",
    removable_when="A processor can say that no token follows a row.",
    fingerprints={"0.32": "a340c4c5e597557e", "0.33": "6405ccc4b24b02a7"},
    wrap=wrap,
)
