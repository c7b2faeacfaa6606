"""What a drafter is trained to do: two losses per draft step, and which rows they are taken over.

Per step, over the M masked rows of the whole batch (FSPAD, section 3.3; the last term is GRIFFIN's)::

    1.0 * sum SmoothL1(r, f') / (M + 1e-5)                       averaged over H first
  + 0.1 * sum CE(softmax(head(f')), head(p)) / (M + 1e-5)
  + 0.5 * sum -(sum over the target's ten best x) P(x) log softmax(head(p))(x) / (M + 1e-5)    from the second stage on

with f' the feature that follows. M is counted over all devices and accumulated passes before it divides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

EPSILON = 1e-5
TOP = 10


@dataclass(frozen=True)
class Weights:
    """Weights of the three terms."""

    regress: float
    predict: float
    top_k: float


@dataclass(frozen=True)
class Terms:
    """Sums over masked rows, each a scalar."""

    regress: Tensor
    predict: Tensor
    top_k: Tensor

    def loss(self, weights: Weights, normaliser: float) -> Tensor:
        """The weighted sum over (M + 1e-5)."""
        total = weights.regress * self.regress + weights.predict * self.predict + weights.top_k * self.top_k
        return total / (normaliser + EPSILON)


def terms(
    p: Tensor, r: Tensor, following: Tensor, mask: Tensor, head: Callable[[Tensor], Tensor], *, top_k: bool = False
) -> Terms:
    """The sums of one draft step.

    Args:
        p: [B, T, H].
        r: [B, T, H].
        following: f', [B, T, H].
        mask: [B, T] bool; other rows are not looked at.
        head: the target's, from [N, H] to [N, V].
        top_k: whether the third term is wanted.
    """
    p, r, following = p[mask], r[mask].float(), following[mask]
    regress = functional.smooth_l1_loss(r, following.float(), reduction="none").mean(-1).sum()
    with torch.no_grad():
        law = head(following).float().softmax(-1)
    drafted = head(p).float().log_softmax(-1)
    predict = -(law * drafted).sum()
    best = torch.zeros((), device=p.device)
    if top_k:
        probability, token = law.topk(TOP)
        best = -(probability * drafted.gather(-1, token)).sum()
    return Terms(regress, predict, best)


def hits(p: Tensor, ids: Tensor, mask: Tensor, head: Callable[[Tensor], Tensor], top: int) -> Tensor:
    """Whether the token after the fed one is among a draft's ``top`` best: [B, T] bool; False outside the mask.

    Args:
        p: [B, T, H], row i from token i + 1.
        ids: [B, T].
        mask: [B, T] bool; other rows are not looked at, and neither are the last two, after which there is no token.
        head: the target's, from [N, H] to [N, V].
        top: 1 for the draft itself.
    """
    rows = functional.pad(mask[:, :-2], (0, 2))
    token = functional.pad(ids[:, 2:], (0, 2))[rows]
    found = torch.zeros_like(mask)
    found[rows] = (head(p[rows]).topk(top, -1).indices == token[:, None]).any(-1)
    return found


def next_mask(mask: Tensor, hit: Tensor | None, first: Tensor) -> Tensor:
    """The rows of the following pass: those whose chain could have come there.

    Row i continues the chain of row i - 1 with the token that row drafted, so it counts only if the draft would have
    had that token.

    Args:
        mask: [B, T] bool, of this pass.
        hit: [B, T] bool, of this pass; None drops no chain.
        first: [B, T] bool, of the first pass.
    """
    kept = mask if hit is None else mask & hit
    return functional.pad(kept, (1, 0))[:, :-1] & first
