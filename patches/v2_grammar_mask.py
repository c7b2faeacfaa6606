"""On V2, rows can be seen before the grammar masks them."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_align_spec.patches import Patch


def wrap(original: Any, hook: Callable[..., Any]) -> Any:
    """The hook sees the batch and its logits as the model made them."""

    @wraps(original)
    def apply_grammar_bitmask(self: Any, logits: Any, input_batch: Any, *args: Any, **kwargs: Any) -> None:
        hook(logits, input_batch)
        original(self, logits, input_batch, *args, **kwargs)

    return apply_grammar_bitmask


PATCH = Patch(
    name="v2_grammar_mask",
    module="vllm.v1.worker.gpu.structured_outputs",
    symbol="StructuredOutputsWorker.apply_grammar_bitmask",
    why="The mask only writes -inf, but with it the normaliser of the unmasked row is lost, which ASAp needs.",
    how="Calls a hook on the logits before they are masked.",
    upstream="https://github.com/vllm-project/vllm/blob/main/vllm/v1/worker/gpu/structured_outputs.py",
    removable_when="Processors can see a row before the grammar mask.",
    fingerprints={"0.32": "798a0fce8c4ba39f", "0.33": "e7a6cdcfcc21666d"},
    wrap=wrap,
)
