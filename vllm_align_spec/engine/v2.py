"""Model runner V2 turned into rows: a processor sees every row, draft rows and bonus row together and in order.

Verification may run in chunks of whole requests; each chunk is a step of its own here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_align_spec.processors.rows import HostRows, Rows, send

if TYPE_CHECKING:
    from vllm_align_spec.engine.facade import AlignSpecLogitsProcessor

_limit: torch.Tensor | None = None
"""[requests of the chunk] tokens each may emit; set by `apply`, taken by `truncate` in the same verification call."""


_facade: weakref.ref[AlignSpecLogitsProcessor] | None = None
"""This process's processor; vLLM's functions that are patched below do not know it."""


def attach(facade: AlignSpecLogitsProcessor) -> None:
    """Tells the patches of this process whom to ask."""
    global _facade
    _facade = weakref.ref(facade)


def _attached() -> AlignSpecLogitsProcessor | None:
    facade = _facade() if _facade is not None else None
    return facade if facade is not None and facade.busy else None


@dataclass
class Inputs:
    """What a step feeds to the model at its rows, on its way to the host."""

    tokens: torch.Tensor  # [N]
    positions: torch.Tensor  # [N]
    first: np.ndarray[Any, np.dtype[np.int64]]  # slot -> its first row
    count: np.ndarray[Any, np.dtype[np.int64]]  # slot -> its rows
    arrived: torch.cuda.Event | None

    def rows(self, slots: np.ndarray[Any, Any], width: int, prefill_len: np.ndarray[Any, Any]) -> HostRows:
        """The grid of the requests in these slots; see `processors.rows.Rows`."""
        if self.arrived is not None:
            self.arrived.synchronize()
        first, count = self.first[slots], self.count[slots]
        position = self.positions.numpy()[first].astype(np.int64)
        r = np.arange(width)
        drafted = r < count[:, None] - 1
        draft = self.tokens.numpy()[np.where(drafted, first[:, None] + r + 1, 0)].astype(np.int64)
        return HostRows(position, count * (position + 1 >= prefill_len[slots]), np.where(drafted, draft, -1))


def before_forward(batch: Any) -> None:
    """Fills patch ``v2_inputs``: starts the copy that `Rows.host` waits for, if a method of the batch will ask."""
    facade = _attached()
    if facade is None:
        return
    facade.inputs = None
    with facade.guard():
        slots = batch.idx_mapping_np
        if facade.of_grammar(slots).any():
            tokens, positions = batch.input_ids[batch.logits_indices], batch.positions[batch.logits_indices]
            first, count = np.zeros((2, facade.slots), dtype=np.int64)
            first[slots], count[slots] = batch.cu_num_logits_np[:-1], np.diff(batch.cu_num_logits_np)
            facade.inputs = Inputs(_to_host(tokens), _to_host(positions), first, count, None)
            if tokens.is_cuda:
                facade.inputs.arrived = torch.cuda.Event()
                facade.inputs.arrived.record()


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    # On the stream of the forward pass and in front of it, so nobody waits for more than what was sampled last.
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def before_mask(logits: torch.Tensor, batch: Any) -> None:
    """Fills patch ``v2_grammar_mask``."""
    facade = _attached()
    if facade is None:
        return
    with facade.guard():
        wanted = np.flatnonzero(facade.of_grammar(batch.idx_mapping_np))
        if wanted.size:
            offsets = batch.cu_num_logits_np
            first, count = offsets[wanted], offsets[wanted + 1] - offsets[wanted]
            r = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            facade.before_mask(
                logits,
                np.repeat(first, count).astype(np.int64) + r,
                np.repeat(batch.idx_mapping_np[wanted], count),
                r,
            )


def _fed(tokens: torch.Tensor, line: torch.Tensor) -> torch.Tensor:
    return tokens[line].long()


def apply(facade: AlignSpecLogitsProcessor, states: Any, logits: torch.Tensor, ctx: Any) -> None:
    """Shows the chunk's rows to each method that a request of it asked for."""
    global _limit
    _limit = None
    with facade.guard():
        _limit = _show(facade, states, logits, ctx)


def _show(facade: AlignSpecLogitsProcessor, states: Any, logits: torch.Tensor, ctx: Any) -> torch.Tensor | None:
    slots = ctx.idx_mapping_np
    wanted = facade.wanted(slots)
    if not wanted:
        return None
    limits = None
    device = logits.device
    lines, requests = logits.shape[0], len(slots)
    if lines == requests:
        width = 1
        first = torch.arange(lines, device=device)
        count = torch.ones_like(first)
    else:
        # Rows of one request stand together, numbered from 0.
        width = facade.rows
        request = (ctx.expanded_local_pos == 0).cumsum(0) - 1
        count = torch.zeros(requests, dtype=torch.int64, device=device)
        count.scatter_add_(0, request, torch.ones_like(request))
        first = count.cumsum(0) - count
    position = ctx.pos[first].long()
    kept = position + 1 >= states.prefill_len.gpu[ctx.idx_mapping.long()]
    r = torch.arange(width, device=device)

    for processor, batch in wanted:
        entries = facade.entries(slots[batch])
        picked = send(batch, device)
        if processor.observes:
            facade.observe(processor, slots[batch], send(entries, device), position[picked], kept[picked])
        active = processor.active(entries)
        if active is not None and not active.any():
            continue
        if active is not None and not active.all():
            batch, entries = batch[active], entries[active]
            picked = send(batch, device)
        rows = count[picked, None]
        index = first[picked, None] + torch.minimum(r, rows - 1)
        # The token fed at the next row is the one drafted after this row.
        draft = ctx.input_ids[(index + 1).clamp(max=lines - 1)].long()
        fetch: Callable[[], HostRows] | None = None
        if processor.grammar and facade.inputs is not None:
            fetch = partial(facade.inputs.rows, slots[batch], width, states.prefill_len.np)
        _, limit = facade.run(
            processor,
            slots[batch],
            Rows(
                logits,
                index=index,
                count=rows[:, 0] * kept[picked],
                position=position[picked],
                fed=partial(_fed, ctx.input_ids, index[:, 0]),
                draft=torch.where(r < rows - 1, draft, -1),
                entry_np=entries,
                unmasked=facade.unmasked(processor, slots[batch], width),
                control=facade.control_ids,
                fetch=fetch,
            ),
        )
        if limit is not None:
            if limits is None:
                limits = torch.full((requests,), facade.rows, dtype=torch.int64, device=device)
            limits[picked] = torch.minimum(limits[picked], limit)
    return limits


def truncate(num_sampled: torch.Tensor) -> torch.Tensor:
    """Fills patch ``v2_truncation``: [requests] tokens that each request emits."""
    global _limit
    limit, _limit = _limit, None
    if limit is None:
        return num_sampled
    return torch.minimum(num_sampled, limit.to(num_sampled.dtype))
