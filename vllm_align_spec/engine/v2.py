"""Model runner V2 turned into rows: a processor sees every row, draft rows and bonus row together and in order.

Verification may run in chunks of whole requests; each chunk is a step of its own here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_align_spec.processors.rows import Rows, send

if TYPE_CHECKING:
    from vllm_align_spec.engine.facade import AlignSpecLogitsProcessor

_limit: torch.Tensor | None = None
"""[requests of the chunk] tokens each may emit; set by `apply`, taken by `truncate` in the same verification call."""


def apply(facade: AlignSpecLogitsProcessor, states: Any, logits: torch.Tensor, ctx: Any) -> None:
    """Shows the chunk's rows to each method that a request of it asked for."""
    global _limit
    _limit = None
    with facade.guard():
        _limit = _show(facade, states, logits, ctx)


def _show(facade: AlignSpecLogitsProcessor, states: Any, logits: torch.Tensor, ctx: Any) -> torch.Tensor | None:
    slots = ctx.idx_mapping_np
    wanted = [(processor, facade.slots_of(processor, slots)) for processor in facade.processors]
    if not any(batch.size for _, batch in wanted):
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
        if batch.size == 0:
            continue
        entries = facade.entries(slots[batch])
        picked = send(batch, device)
        facade.observe(processor, slots[batch], send(entries, device), position[picked], kept[picked])
        active = processor.active(entries)
        if not active.any():
            continue
        if not active.all():
            batch, entries = batch[active], entries[active]
            picked = send(batch, device)
        rows = count[picked, None]
        index = first[picked, None] + torch.minimum(r, rows - 1)
        # The token fed at the next row is the one drafted after this row.
        draft = ctx.input_ids[(index + 1).clamp(max=lines - 1)].long()
        limit = facade.run(
            processor,
            slots[batch],
            Rows(
                logits=logits,
                index=index,
                count=rows[:, 0] * kept[picked],
                position=position[picked],
                draft=torch.where(r < rows - 1, draft, -1),
                entry=send(entries, device),
                entry_np=entries,
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
