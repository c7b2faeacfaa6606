"""On V1, what processors decided for draft rows reaches verification."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_align_spec.patches import Patch


def wrap(original: Any, hook: Callable[..., Any]) -> Any:
    """The hook edits a copy of the draft rows that vLLM made for verification; logprobs keep the model's own rows."""

    @wraps(original)
    def apply_logits_processors(self: Any, logits: Any, sampling_metadata: Any, metadata: Any) -> Any:
        hook(logits, sampling_metadata)
        return original(self, logits, sampling_metadata, metadata)

    return apply_logits_processors


PATCH = Patch(
    name="v1_draft_rows",
    module="vllm.v1.sample.rejection_sampler",
    symbol="RejectionSampler.apply_logits_processors",
    why="V1 calls no processor of a plugin on draft rows.",
    how="Calls a hook on the draft rows before vLLM's penalties.",
    upstream="https://github.com/vllm-project/vllm/blob/main/vllm/v1/sample/rejection_sampler.py",
    removable_when="V1 is gone (V2 shows a processor every row).",
    fingerprints={"0.32": "a5ce354eb88c4ce1", "0.33": "a5ce354eb88c4ce1"},
    wrap=wrap,
)
