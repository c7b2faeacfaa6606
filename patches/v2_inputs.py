"""On V2, a step's drafts can start their way to the host before the forward pass."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_align_spec.patches import Patch


def wrap(original: Any, hook: Callable[..., Any]) -> Any:
    """The hook sees the batch as it will be fed to the model."""

    @wraps(original)
    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        input_batch = original(self, *args, **kwargs)
        hook(input_batch)
        return input_batch

    return prepare_inputs


PATCH = Patch(
    name="v2_inputs",
    module="vllm.v1.worker.gpu.model_runner",
    symbol="GPUModelRunner.prepare_inputs",
    why="A method with state on the host needs the draft ids there; read after the forward pass, they cost a stall.",
    how="Calls a hook between the preparation of the inputs and the forward pass.",
    upstream="https://github.com/vllm-project/vllm/blob/main/vllm/v1/worker/gpu/model_runner.py",
    removable_when="Processors are told of a step's inputs before its forward pass.",
    fingerprints={"0.32": "aa8e176762fbdd50", "0.33": "e3ba4ab9cdc901fc"},
    wrap=wrap,
)
