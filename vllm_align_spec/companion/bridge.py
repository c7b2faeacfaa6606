"""A companion with another tokenizer than the target, bridged by text.

The companion encodes the prompt as text, once. From there on each token of the target is a fixed sequence of the
companion's, its *pieces*: the encoding of the token's own text, apart from what stands around it. So a candidate never
changes how its prefix is read, the prefix is never read again, and a step needs no tokenizer: it is a lookup on the
device. The price is that the companion reads words joined from pieces as the target cut them, and not as it would have
cut them itself; that a token which holds a part of a character reads as a replacement character; and m times the
tokens, where m is the longest sequence of pieces.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_align_spec.companion.model import Companion, repeat_last
from vllm_align_spec.processors.rows import send

logger = logging.getLogger("vllm.align_spec")

MAX_PIECES = 8
"""Longer sequences of pieces are cut."""
_BATCH = 8192


def pieces(target: Any, companion: Any, vocab_size: int) -> list[list[int]]:
    """For each token of the target its text in tokens of the companion, at least one and at most `MAX_PIECES`.

    Args:
        target: the target's tokenizer.
        companion: the companion's tokenizer.
        vocab_size: rows of the target's logits; what lies beyond its tokenizer is padding.
    """
    known = min(vocab_size, len(target))
    # Some tokenizers drop a space at the beginning of what they decode, and add one to what they encode: with a token
    # in front they do not.
    front = target.encode("a", add_special_tokens=False)[-1:]
    before = target.decode(front)
    texts: list[str] = []
    for start in range(0, known, _BATCH):
        ids = [[*front, token] for token in range(start, min(known, start + _BATCH))]
        texts += [text[len(before) :] for text in target.batch_decode(ids, clean_up_tokenization_spaces=False)]
    mark = companion.encode("\n", add_special_tokens=False)
    found: list[list[int]] = []
    for start in range(0, known, _BATCH):
        batch = ["\n" + (text or " ") for text in texts[start : start + _BATCH]]
        for text, ids in zip(batch, companion(batch, add_special_tokens=False)["input_ids"], strict=True):
            joined = ids[: len(mark)] != mark or len(ids) == len(mark)
            found.append(companion.encode(text[1:], add_special_tokens=False) if joined else ids[len(mark) :])
    ends = {target.eos_token_id: companion.eos_token_id}
    for token, end in ends.items():
        if token is not None and end is not None and token < known:
            found[token] = [end]
    filler = [companion.eos_token_id or 0]
    return [(ids or filler)[:MAX_PIECES] for ids in found] + [filler] * (vocab_size - known)


class BridgedCompanion:
    """A reward companion that speaks of the target's tokens; the same calls as `companion.model.Companion`.

    Args:
        table: as `pieces` gives it.
        rows: L, the most rows of a request in one step.
        entries: E, as in `processors.rows.Layout`.
        make: builds the companion itself, given how many tokens a request may be fed in one step.
    """

    def __init__(self, table: Sequence[Sequence[int]], rows: int, entries: int, make: Any) -> None:
        m = max(map(len, table))
        self.inner: Companion = make(rows * m)
        device = self.inner.device
        self.name, self.role = self.inner.name, self.inner.role
        self._pieces = torch.tensor([[*ids, *[0] * (m - len(ids))] for ids in table], device=device)
        self._length = torch.tensor([len(ids) for ids in table], device=device)
        # Of each request: its companion's length before each row of the latest step and behind it, where in the
        # target's sequence that step began, and where the response begins and what stands before it.
        self._ends = torch.zeros(entries, rows + 1, dtype=torch.int64, device=device)
        self._began, self._prompt_len, self._last = torch.zeros(3, entries, dtype=torch.int64, device=device)
        logger.info("Companion %s reads %d tokens as up to %d of its own", self.name, len(table), m)

    def enter(
        self, entry: int, prompt: torch.Tensor, response: torch.Tensor, prompt_len: int, digests: Sequence[int]
    ) -> None:
        """See `Companion.enter`; ``prompt`` is in the companion's tokens, ``response`` in the target's."""
        before = prompt[:-1]
        if len(response):
            known = response[:-1]
            kept = torch.arange(self._pieces.shape[1], device=known.device) < self._length[known][:, None]
            before = torch.cat([prompt, self._pieces[known][kept]])
        self._ends[entry] = len(before)
        self._began[entry] = prompt_len + len(response) - 1
        self._prompt_len[entry] = prompt_len
        self._last[entry] = prompt[-1]
        self.inner.read(entry, before, 0, digests)

    def leave(self, entry: int) -> None:
        """See `Companion.leave`."""
        self.inner.leave(entry)

    def knows(self, entries: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """See `Companion.knows`."""
        return self.inner.knows(entries)

    def prepare(self) -> None:
        """See `Companion.prepare`."""
        self.inner.prepare()

    def rewards(
        self,
        entry: np.ndarray[Any, Any],
        position: torch.Tensor,
        count: torch.Tensor,
        chain: torch.Tensor,
        candidates: torch.Tensor,
    ) -> torch.Tensor:
        """See `Companion.rewards`."""
        at = send(entry, position.device)
        requests, rows = chain.shape
        most = self._pieces.shape[1]
        place = torch.arange(most, device=chain.device)
        r = torch.arange(self._ends.shape[1], device=chain.device)
        accepted = (position - self._began[at]).clamp(0, len(r) - 1)
        base = self._ends[at].gather(1, accepted[:, None])
        pieces, length = self._pieces[chain], self._length[chain]
        # The last token of the prompt is what it is in the companion's prompt, and not what the target makes of it.
        first = (position == self._prompt_len[at] - 1)[:, None] & (r[:rows] == 0)
        pieces[..., 0] = torch.where(first, self._last[at][:, None], pieces[..., 0])
        length = torch.where(first, 1, length) * (r[:rows] < count[:, None])
        end = length.cumsum(1)

        # The chain's pieces without gaps between them; what is no piece goes into a column more.
        where = torch.where(place < length[..., None], (end - length)[..., None] + place, rows * most)
        packed = chain.new_zeros(requests, rows * most + 1).scatter_(1, where.flatten(1), pieces.flatten(1))
        said = self.inner.score(
            entry, base[:, 0], end[:, -1], packed[:, :-1], (end - 1).clamp(min=0), self._pieces[candidates]
        )
        last = self._length[candidates] - 1
        self._ends[at] = base + torch.cat([torch.zeros_like(base), end], 1)[:, r.clamp(max=rows)]
        self._began[at] = position
        return repeat_last(said.gather(-1, last[..., None])[..., 0], count)
