"""Cascade reward sampling, where a segment ends (arXiv 2406.16306, section 4.1). Steering: it changes what is said.

A segment goes on while the model is sure of what follows. It ends before the first token, from the fifth on, whose
distribution has an entropy of at least tau_u::

    H(z) = - sum_v p_v log p_v        p = softmax(z), the whole vocabulary, untempered

There the row is forced to the control id *segment end*: the request finishes, what it computed stays in the prefix
cache, and the strategy has a candidate. In a step with drafts each row is a row like any other: one behind a rejected
draft is never reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from vllm_align_spec.processors.rows import Control, Layout, Processor, Rows, force, mask, row_entropy, send

SHORTEST = 4
"""Tokens of a segment before it may end by entropy."""

LONGEST = 64
"""Tokens of a segment at most; the strategy sees to it."""


class CardsProcessor(Processor):
    """The boundary, for all requests of a step at once."""

    method: ClassVar[str] = "cards"
    drafter: ClassVar[bool] = False
    grammar: ClassVar[bool] = False
    control: ClassVar[bool] = True

    def __init__(self, layout: Layout) -> None:
        device = layout.device
        self._prompt = torch.zeros(layout.entries, dtype=torch.int64, device=device)
        self._threshold = torch.full((layout.entries,), torch.inf, device=device)
        # Of the row before each token of the segment; the last column takes what does not count.
        self._entropy = torch.zeros(layout.entries, LONGEST + 1, device=device)
        self._columns = torch.arange(layout.rows, device=device)
        self._staged: dict[int, tuple[int, float]] = {}
        self._failed = np.zeros(layout.entries, dtype=bool)

    def admit(self, entry: int, arguments: Mapping[str, Any], prompt_len: int) -> None:
        """``prompt_len`` counts the inner request's prompt, which ends where the segment begins."""
        self._staged[entry] = (prompt_len, float(arguments["cards_entropy"]))
        self._failed[entry] = False

    def abandon(self, entry: int) -> None:
        """The request ends as failed, at the next row that it is shown."""
        self._failed[entry] = True

    def flush(self) -> None:
        """One copy to the device for all requests admitted since the last step."""
        if not self._staged:
            return
        device = self._prompt.device
        entries = send(np.array(list(self._staged), dtype=np.int64), device)
        prompt, threshold = zip(*self._staged.values(), strict=True)
        self._prompt[entries] = send(np.array(prompt, dtype=np.int64), device)
        self._threshold[entries] = send(np.array(threshold, dtype=np.float32), device)
        self._entropy[entries] = 0
        self._staged.clear()

    def apply(self, rows: Rows) -> None:
        """Forces the rows at which segments end."""
        assert rows.control is not None
        mask(rows.logits, rows.index, rows.control)
        column = self._columns[: rows.index.shape[1]]
        real = column < rows.count[:, None]
        length = rows.position[:, None] + 1 + column - self._prompt[rows.entry][:, None]
        entropy = row_entropy(rows.logits, rows.index)
        self._entropy[rows.entry[:, None], torch.where(real, length.clamp(0, LONGEST), LONGEST)] = entropy
        ends = real & (length >= SHORTEST) & (entropy >= self._threshold[rows.entry][:, None])
        token = rows.control[Control.SEGMENT_END].expand(rows.index.shape)
        failed = self._failed[rows.entry_np]
        if failed.any():
            lost = send(failed, token.device)[:, None]
            ends, token = ends | (lost & real), torch.where(lost, rows.control[Control.FAILED], token)
        force(rows.logits, rows.index, ends, token)

    def reports(self, entries: Sequence[int]) -> list[dict[str, Any]]:
        """The entropies before each token of a segment, as far as it came; what follows is of no meaning."""
        found = self._entropy[torch.tensor(entries, device=self._entropy.device), :LONGEST]
        return [{"entropies": row} for row in found.tolist()]
