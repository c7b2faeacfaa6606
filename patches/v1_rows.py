"""On V1, all rows of a step are seen together before vLLM samples draft and bonus rows apart."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_align_spec.patches import Patch


def wrap(original: Any, hook: Callable[..., Any]) -> Any:
    """The hook sees the runner, the logits after the grammar mask, and the layout of drafts."""

    @wraps(original)
    def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        hook(self, logits, spec_decode_metadata)
        return original(self, logits, spec_decode_metadata)

    return _sample


PATCH = Patch(
    name="v1_rows",
    module="vllm.v1.worker.gpu_model_runner",
    symbol="GPUModelRunner._sample",
    why="V1 samples the bonus row first and shows draft rows to no processor, so no one sees all rows in order.",
    how="Calls a hook before sampling; v1_draft_rows and the facade put what it decides into both of vLLM's calls.",
    upstream="https://github.com/vllm-project/vllm/blob/main/vllm/v1/sample/rejection_sampler.py",
    removable_when="V1 is gone (V2 shows a processor every row).",
    fingerprints={"0.32": "df64e9c9f60ee76f", "0.33": "df64e9c9f60ee76f"},
    wrap=wrap,
)
