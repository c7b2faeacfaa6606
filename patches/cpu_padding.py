"""On a CPU, a draft that is only padding is rejected, and does no harm."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from vllm_align_spec.patches import Patch

if TYPE_CHECKING:
    import torch

WHY = (
    "A request that joins under a grammar gets drafts of -1. The CPU kernels take -1 for an index: they read and write "
    "beside the row, so a token that the grammar forbids comes out and the request ends with a 500."
)
UPSTREAM = "https://github.com/vllm-project/vllm/blob/main/vllm/utils/cpu_triton_utils.py"


def wrap_random(original: Any, hook: Callable[..., Any] | None) -> Any:
    """Where the draft is padding, no uniform number is low enough to accept it."""

    @wraps(original)
    def _rejection_random_sample_kernel_impl(
        output: Any, cu_num_draft_tokens: Any, draft: torch.Tensor, *args: Any, **kwargs: Any
    ) -> None:
        *head, uniform = args[:5]  # draft_probs, target_probs, bonus and recovered tokens, uniform numbers
        uniform = uniform.masked_fill(draft < 0, float("inf"))
        original(output, cu_num_draft_tokens, draft.clamp(min=0), *head, uniform, *args[5:], **kwargs)

    return _rejection_random_sample_kernel_impl


def wrap_recovered(original: Any, hook: Callable[..., Any] | None) -> Any:
    """Where the draft is padding, the token is drawn from the whole row."""

    @wraps(original)
    def _sample_recovered_tokens_kernel_impl(
        output: torch.Tensor,
        cu_num_draft_tokens: torch.Tensor,
        draft: torch.Tensor,
        draft_probs: Any,
        target_probs: torch.Tensor,
        inv_q: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        original(output, cu_num_draft_tokens, draft.clamp(min=0), draft_probs, target_probs, inv_q, *args, **kwargs)
        padding = (draft < 0).nonzero()[:, 0]
        if padding.numel():
            ends = cu_num_draft_tokens.long()
            request = (padding[:, None] >= ends).sum(1)
            drawn = (target_probs[padding] * inv_q[request]).argmax(-1)
            output[padding] = drawn.to(output.dtype)

    return _sample_recovered_tokens_kernel_impl


RANDOM = Patch(
    name="cpu_padding_random",
    module="vllm.utils.cpu_triton_utils",
    symbol="_rejection_random_sample_kernel_impl",
    why=WHY,
    how="Hands the kernel a valid id and a uniform number that rejects it.",
    upstream=UPSTREAM,
    removable_when="The CPU kernels handle draft ids below 0.",
    fingerprints={"0.32": "975c1de0557c4b4f", "0.33": "975c1de0557c4b4f"},
    wrap=wrap_random,
)
RECOVERED = Patch(
    name="cpu_padding_recovered",
    module="vllm.utils.cpu_triton_utils",
    symbol="_sample_recovered_tokens_kernel_impl",
    why=WHY,
    how="Hands the kernel a valid id, and draws the tokens of padded rows anew.",
    upstream=UPSTREAM,
    removable_when="The CPU kernels handle draft ids below 0.",
    fingerprints={"0.32": "dedca8ffc44dc15f", "0.33": "dedca8ffc44dc15f"},
    wrap=wrap_recovered,
)
