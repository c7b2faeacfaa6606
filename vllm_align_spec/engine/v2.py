"""Model runner V2 turned into rows: a processor sees every row, draft rows and bonus row together and in order.

Verification may run in chunks of whole requests; each chunk is a step of its own here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_align_spec.processors.rows import Rows

if TYPE_CHECKING:
    from vllm_align_spec.engine.facade import AlignSpecLogitsProcessor

_limit: torch.Tensor | None = None
"""[requests of the chunk] tokens each may emit; set by `apply`, taken by `truncate` in the same verification call."""


def apply(facade: AlignSpecLogitsProcessor, states: Any, logits: torch.Tensor, ctx: Any) -> None:
    """Shows the chunk's rows to each method that a request of it asked for."""
    global _limit
    _limit = None
    slots = ctx.idx_mapping_np
    first = count = None
    for processor in facade.processors:
        batch = facade.slots_of(processor, slots)
        if batch.size == 0:
            continue
        device = logits.device
        lines = logits.shape[0]
        if first is None or count is None:
            if lines == len(slots):
                first = torch.arange(lines, device=device)
                count = torch.ones_like(first)
            else:
                # Rows of one request stand together, numbered from 0.
                request = (ctx.expanded_local_pos == 0).cumsum(0) - 1
                count = torch.zeros(len(slots), dtype=torch.int64, device=device)
                count.scatter_add_(0, request, torch.ones_like(request))
                first = count.cumsum(0) - count
        picked = _send(batch, device)
        entry_np = facade.entries(slots[batch])
        first_row, rows = first[picked], count[picked]
        width = 1 if lines == len(slots) else facade.rows
        r = torch.arange(width, device=device)
        index = first_row[:, None] + torch.minimum(r, rows[:, None] - 1)
        # The token fed at the next row is the one drafted after this row.
        draft = ctx.input_ids[(index + 1).clamp(max=lines - 1)].long()
        draft = torch.where(r < rows[:, None] - 1, draft, -1)
        position = ctx.pos[first_row].long()
        slot = ctx.expanded_idx_mapping[first_row].long()
        kept = position + 1 >= states.prefill_len.gpu[slot]
        limit = facade.run(
            processor,
            Rows(logits, index, rows * kept, position, draft, _send(entry_np, device), entry_np),
            slots[batch],
        )
        if limit is not None:
            if _limit is None:
                _limit = torch.full((len(slots),), facade.rows, dtype=torch.int64, device=device)
            _limit[picked] = torch.minimum(_limit[picked], limit)


def truncate(num_sampled: torch.Tensor) -> torch.Tensor:
    """Fills patch ``v2_truncation``: [requests] tokens that each request emits."""
    global _limit
    limit, _limit = _limit, None
    if limit is None:
        return num_sampled
    return torch.minimum(num_sampled, limit.to(num_sampled.dtype))


def _send(array: Any, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
