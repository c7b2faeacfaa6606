"""GenARM: an autoregressive reward model guides (arXiv 2410.08193, equation 8). Steering: it raises a reward.

::

    p ~ softmax((log p_base + alpha * log p_arm) / T)        alpha = 1 / beta

p_arm is the companion's next-token distribution over the whole vocabulary. alpha = 0 is plain decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from vllm_align_spec.processors.guided import Realigned


def product(base: torch.Tensor, arm: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
    """Logits of p_base * p_arm ** alpha.

    Args:
        base: [..., V] logits.
        arm: [..., V] logits.
        alpha: the exponent, a number or one that broadcasts.

    Returns:
        [..., V], up to a constant for each row.
    """
    return base.log_softmax(-1) + alpha * arm.log_softmax(-1)


class GenarmProcessor(Realigned):
    """GenARM for all requests of a step at once."""

    method: ClassVar[str] = "genarm"
    width: ClassVar[int] = 1

    def constants_of(self, arguments: Mapping[str, Any]) -> Sequence[float]:
        """Alpha."""
        return [arguments["genarm_alpha"]]

    def bend(
        self, target: torch.Tensor, companion: torch.Tensor, constants: torch.Tensor, entries: np.ndarray[Any, Any]
    ) -> torch.Tensor:
        """See `Realigned.bend`."""
        return torch.where(constants == 0, target, product(target, companion, constants))
