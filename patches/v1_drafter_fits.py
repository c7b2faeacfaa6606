"""On V1, a step whose drafts are stand-ins is known as such."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_align_spec.patches import Patch


def wrap(original: Any, hook: Callable[..., Any]) -> Any:
    """The hook learns whether the drafts that follow this step are the drafter's."""

    @wraps(original)
    def _input_fits_in_drafter(self: Any, common_attn_metadata: Any) -> bool:
        fits = bool(original(self, common_attn_metadata))
        hook(self, fits)
        return fits

    return _input_fits_in_drafter


PATCH = Patch(
    name="v1_drafter_fits",
    module="vllm.v1.worker.gpu_model_runner",
    symbol="GPUModelRunner._input_fits_in_drafter",
    why="When one request outgrows the drafter, V1 sets every draft of the batch to token 0; such a row looks drafted.",
    how="Tells a hook the result.",
    upstream="https://github.com/vllm-project/vllm/blob/main/vllm/v1/worker/gpu_model_runner.py",
    removable_when="V1 is gone, or marks such drafts.",
    fingerprints={"0.32": "218aad75ac251586", "0.33": "218aad75ac251586"},
    wrap=wrap,
)
