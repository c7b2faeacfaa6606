"""On V1, rows can be seen before the grammar masks them."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_align_spec.patches import Patch


def wrap(original: Any, hook: Callable[..., Any]) -> Any:
    """The hook sees the batch and its logits as the model made them."""

    @wraps(original)
    def apply_grammar_bitmask(scheduler_output: Any, grammar_output: Any, input_batch: Any, logits: Any) -> None:
        hook(scheduler_output, input_batch, logits)
        original(scheduler_output, grammar_output, input_batch, logits)

    return apply_grammar_bitmask


PATCH = Patch(
    name="v1_grammar_mask",
    module="vllm.v1.worker.gpu_model_runner",
    symbol="apply_grammar_bitmask",
    why="The mask only writes -inf, but with it the normaliser of the unmasked row is lost, which ASAp needs.",
    how="Calls a hook on the logits before they are masked.",
    upstream="https://github.com/vllm-project/vllm/blob/main/vllm/v1/structured_output/utils.py",
    removable_when="Processors can see a row before the grammar mask.",
    fingerprints={"0.32": "31d195aa3ecf364e", "0.33": "40fc922790942000"},
    wrap=wrap,
)
