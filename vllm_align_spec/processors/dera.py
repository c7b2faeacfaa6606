"""DeRa: decoding-time realignment (arXiv 2402.02992, equation 8). Steering: between two models, or beyond one.

::

    z = z_ref + lambda * (z_aligned - z_ref)

The reference is the served model, the aligned model a companion: lambda = 0 is plain decoding, lambda = 1 is the
aligned model's own, and more goes beyond it in the same direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from vllm_align_spec.processors.guided import Realigned


def realign(reference: torch.Tensor, aligned: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """Logits between two models.

    Args:
        reference: [..., V] logits.
        aligned: [..., V] logits.
        weight: lambda, a number or one that broadcasts.

    Returns:
        [..., V]; NaN where both are -inf.
    """
    return reference + weight * (aligned - reference)


class DeraProcessor(Realigned):
    """DeRa for all requests of a step at once."""

    method: ClassVar[str] = "dera"
    width: ClassVar[int] = 1

    def constants_of(self, arguments: Mapping[str, Any]) -> Sequence[float]:
        """Lambda."""
        return [arguments["dera_lambda"]]

    def bend(
        self, target: torch.Tensor, companion: torch.Tensor, constants: torch.Tensor, entries: np.ndarray[Any, Any]
    ) -> torch.Tensor:
        """See `Realigned.bend`."""
        return torch.where(constants == 0, target, realign(target, companion, constants))
