"""PAD: personalised alignment at decoding time (arXiv 2410.04070, section 3.3). Steering: towards a persona.

Among the k likeliest next tokens of a row, whatever the personalised model prefers more than the served one is raised::

    score = z + w * (log p_judge - log p_base)      both renormalised on the row's top k; all others are excluded

The persona is a system prompt that only the companion sees. w = 0 is decoding among the top k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from vllm_align_spec.processors.guided import Realigned
from vllm_align_spec.processors.rows import Layout


def personalise(base: torch.Tensor, judge: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """Scores of candidates.

    Args:
        base: [..., k] the served model's logits of the candidates; -inf where one is masked.
        judge: [..., k] the personalised model's.
        weight: w, a number or one that broadcasts.

    Returns:
        [..., k].
    """
    masked = base == -torch.inf
    difference = judge.masked_fill(masked, -torch.inf).log_softmax(-1) - base.log_softmax(-1)
    return torch.where(masked, base, base + weight * difference)


class PadProcessor(Realigned):
    """PAD for all requests of a step at once."""

    method: ClassVar[str] = "pad"
    width: ClassVar[int] = 2

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self._top_k = np.ones(layout.entries, dtype=np.int64)

    def constants_of(self, arguments: Mapping[str, Any]) -> Sequence[float]:
        """w and k."""
        return [arguments["pad_weight"], arguments["pad_top_k"]]

    def admit(self, entry: int, arguments: Mapping[str, Any], prompt_len: int) -> None:
        """Also keeps k on the host."""
        super().admit(entry, arguments, prompt_len)
        self._top_k[entry] = arguments["pad_top_k"]

    def bend(
        self, target: torch.Tensor, companion: torch.Tensor, constants: torch.Tensor, entries: np.ndarray[Any, Any]
    ) -> torch.Tensor:
        """See `Realigned.bend`."""
        weight, k = constants[:, :1], constants[:, 1:]
        values, token = target.topk(min(int(self._top_k[entries].max()), target.shape[1]))
        values = values.masked_fill(torch.arange(values.shape[1], device=values.device) >= k, -torch.inf)
        score = personalise(values, companion.gather(1, token), weight)
        return torch.full_like(target, -torch.inf).scatter_(1, token, score)
