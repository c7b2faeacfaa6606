"""ARGS: alignment as reward-guided search (arXiv 2402.01694, section 3). Steering: it raises a reward.

Of the k likeliest next tokens of a row, each gets the reward of the text that it would make::

    score(v) = z(v) + w * r(x, y, v)      v among the top k of the row's logits z; all others are excluded

Greedy requests take the best score; others sample from softmax(score / T). r is a reward model's scalar at v's own
position behind prompt and response. Several rewards add up, each with its weight. With an entropy gate, rows whose
entropy does not exceed it keep their logits, still among the top k.

The companion scores all candidates of all rows in one forward pass (`companion.model`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from vllm_align_spec.processors.guided import Guided
from vllm_align_spec.processors.rows import Layout, Rows, row_entropy, send

MAX_REWARDS = 8
"""Most rewards of one request."""
_TOP_K, _GATE, _WEIGHTS = 0, 1, 2


def guided_scores(logits: torch.Tensor, rewards: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """Scores of candidates: z + w r.

    Args:
        logits: [..., k] of the candidates; -inf where one is masked.
        rewards: [..., k] of the candidates.
        weight: w, a number or one that broadcasts.

    Returns:
        [..., k].
    """
    return logits + weight * rewards


class ArgsProcessor(Guided):
    """ARGS for all requests of a step at once."""

    method: ClassVar[str] = "args"
    width: ClassVar[int] = _WEIGHTS + MAX_REWARDS

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self._top_k = np.ones(layout.entries, dtype=np.int64)
        self._gated = np.zeros(layout.entries, dtype=bool)
        # Of an entry, which of its weights belongs to a companion.
        self._weight = {name: np.zeros(layout.entries, dtype=np.int64) for name in self.companions}
        self._ranks = torch.arange(layout.vocab_size, device=layout.device)

    def constants_of(self, arguments: Mapping[str, Any]) -> Sequence[float]:
        """Top k, gate, and a weight for each reward."""
        weights = list(arguments["args_weight"])
        return [
            arguments["args_top_k"],
            arguments["args_entropy_gate"],
            *weights,
            *[0.0] * (MAX_REWARDS - len(weights)),
        ]

    def admit(self, entry: int, arguments: Mapping[str, Any], prompt_len: int) -> None:
        """Also keeps on the host what decides how much there is to compute."""
        super().admit(entry, arguments, prompt_len)
        self._top_k[entry] = arguments["args_top_k"]
        self._gated[entry] = arguments["args_entropy_gate"] > 0
        for column, name in enumerate(arguments["align_spec_companions"]):
            self._weight[name][entry] = _WEIGHTS + column

    def apply(self, rows: Rows) -> None:
        """Leaves each row its guided top k; see `rows.Processor.apply`."""
        entry, (requests, width) = rows.entry, rows.index.shape
        constants = self.constants[entry]
        lines = rows.index.reshape(-1)
        # With more rows a request some may stand for nothing, and others' rows be there all the same.
        everything = width == 1 and requests == rows.logits.shape[0]
        k = min(int(self._top_k[rows.entry_np].max()), rows.logits.shape[1])
        # Requests without any rows of others between them: no copy of their rows is needed.
        z, token = (rows.logits if everything else rows.logits.index_select(0, lines)).topk(k)
        z, token = z.view(requests, width, k), token.view(requests, width, k)
        open_ = torch.ones_like(rows.index, dtype=torch.bool)
        if self._gated[rows.entry_np].any():
            open_ = (
                row_entropy(rows.logits, rows.index)
                > torch.where(constants[:, _GATE] > 0, constants[:, _GATE], -1.0)[:, None]
            )

        chain = rows.chain()
        reward = torch.zeros_like(z)
        for name, which in self.by_companion(rows.entry_np).items():
            whole = len(which) == requests
            at = send(which, self.device)
            position, count, fed, candidates = (
                values if whole else values[at] for values in (rows.position, rows.count, chain, token)
            )
            column = send(self._weight[name][rows.entry_np[which]], self.device)
            weight = constants[at, column][:, None, None]
            said = self.companions[name].rewards(rows.entry_np[which], position, count, fed, candidates)
            if whole:
                reward = guided_scores(reward, said, weight)
            else:
                reward[at] = guided_scores(reward[at], said, weight)
        answered = reward.isfinite().all(-1)
        reward = torch.where((answered & open_)[..., None], reward, 0.0)
        score = guided_scores(z, reward, 1.0)
        score = score.masked_fill(self._ranks[:k] >= constants[:, _TOP_K, None, None], -torch.inf)

        if everything:
            rows.logits.fill_(-torch.inf)
        else:
            rows.logits.index_fill_(0, lines, -torch.inf)
        rows.logits[rows.index[..., None], token] = score
        real = torch.arange(width, device=self.device) < rows.count[:, None]
        bent = (real & answered & open_).sum(1)
        self.counts[entry] += torch.stack([bent, (real & ~answered).sum(1)], 1)
