"""Model runner V1 turned into rows.

V1 samples a request's bonus row first and its draft rows later, in two calls that see different tensors. So the rows
are gathered once before both (`before_sample`), the methods run on that copy, and the result is put into each of
vLLM's two copies. vLLM's own logits stay as they are: logprobs are the model's. A step without drafts has one call, and
there the methods run on what vLLM samples from (`in_place`), after it took its logprobs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from vllm_align_spec.processors.rows import Rows, send, take, there

if TYPE_CHECKING:
    from vllm_align_spec.engine.facade import AlignSpecLogitsProcessor
    from vllm_align_spec.processors.rows import Processor, Small

_limit: torch.Tensor | None = None
"""[requests] tokens each may emit in this step; set by `before_sample`, taken by `truncate` in the same step."""


@dataclass
class Stash:
    """What was decided for one step."""

    # [M, V] float32: rows of the requests that are ours, in order
    rows: torch.Tensor
    # where the last row of each request stands in `rows`, and its line among vLLM's bonus rows
    last: torch.Tensor
    last_line: torch.Tensor
    # the same for draft rows and vLLM's draft rows
    draft: torch.Tensor
    draft_line: torch.Tensor

    def edit_last_rows(self, logits: torch.Tensor, control_ids: torch.Tensor | None) -> None:
        """Puts bonus rows (without speculation: all rows) into what vLLM samples; its own masks stay.

        A control id is above them: where it is not forced, it is masked in ``rows`` already.
        """
        masked = torch.isneginf(logits[self.last_line])
        if control_ids is not None:
            masked[:, control_ids] = False
        logits[self.last_line] = self.rows[self.last].masked_fill_(masked, float("-inf"))

    def edit_draft_rows(self, logits: torch.Tensor) -> None:
        """Puts draft rows into what vLLM verifies."""
        logits[self.draft_line] = self.rows[self.draft]


def facade_of(logitsprocs: Any) -> AlignSpecLogitsProcessor | None:
    """Our processor among those of a batch."""
    for processor in logitsprocs.non_argmax_invariant:
        if getattr(processor, "is_align_spec", False):  # `isinstance` with an abstract class is slow
            found: AlignSpecLogitsProcessor = processor
            return found
    return None


def note_drafts(runner: Any, fits: bool) -> None:
    """Fills patch ``v1_drafter_fits``: the drafts of the next step are stand-ins if the input did not fit."""
    facade = facade_of(runner.input_batch.logitsprocs)
    if facade is not None and facade.busy:
        facade.drafts_are_real[: runner.input_batch.num_reqs] = fits


def before_mask(scheduler_output: Any, input_batch: Any, logits: torch.Tensor) -> None:
    """Fills patch ``v1_grammar_mask``."""
    facade = facade_of(input_batch.logitsprocs)
    if facade is None or not facade.busy:
        return
    with facade.guard():
        wanted = facade.of_grammar(slice(input_batch.num_reqs)).nonzero()[0]
        drafts = scheduler_output.scheduled_spec_decode_tokens
        if wanted.size and not drafts:
            facade.before_mask(logits, wanted, wanted, facade.no_offset[: wanted.size])
        elif wanted.size:
            count = np.array([1 + len(drafts.get(i, ())) for i in input_batch.req_ids])
            first, count = np.cumsum(count) - count, count[wanted]
            slot = np.repeat(wanted, count)
            r = np.arange(len(slot)) - np.repeat(np.cumsum(count) - count, count)
            facade.before_mask(logits, first[slot] + r, slot, r)


def before_sample(runner: Any, logits: torch.Tensor | None, metadata: Any) -> None:
    """Fills patch ``v1_rows``: shows the step's rows to each method that a request of it asked for."""
    global _limit
    _limit = None
    facade = facade_of(runner.input_batch.logitsprocs)
    if facade is not None:
        facade.stash = facade.waiting = None
        if logits is not None and facade.busy:
            if metadata is None:
                facade.waiting = runner
            else:
                with facade.guard():
                    _limit = _show(facade, runner, logits, metadata)


class _Mine(NamedTuple):
    """The requests of a step that one method sees."""

    processor: Processor
    slots: np.ndarray[Any, Any]  # [S]
    entries: np.ndarray[Any, Any]  # [S]
    position: Small  # [S], as in `Rows`


def _active(
    facade: AlignSpecLogitsProcessor, runner: Any, fed: np.ndarray[Any, Any], kept: np.ndarray[Any, Any]
) -> Iterator[_Mine]:
    """Each method that has rows to see.

    Args:
        facade: the processor.
        runner: vLLM's.
        fed: [requests] where among the step's inputs the token stands that was fed at each one's first row.
        kept: [requests] whether what is sampled in this step is kept.
    """
    device = facade.device
    for processor, slots in facade.wanted(slice(len(fed))):
        entries, position = facade.entries(slots), take(runner.positions, fed[slots])
        if processor.observes:
            facade.observe(processor, slots, send(entries, device), there(position, device), send(kept[slots], device))
        still = processor.active(entries)
        if still is not None and not still.all():
            slots, entries = slots[still], entries[still]
            position = take(runner.positions, fed[slots])
        if slots.size:
            yield _Mine(processor, slots, entries, position)


def in_place(facade: AlignSpecLogitsProcessor, logits: torch.Tensor) -> None:
    """Shows the rows of a step without drafts, in the tensor that is sampled from; vLLM's masks are there already."""
    runner, facade.waiting = facade.waiting, None
    with facade.guard():
        num_reqs = runner.input_batch.num_reqs
        fed = runner.query_start_loc.np[1 : num_reqs + 1] - 1
        kept = ~runner.discard_request_mask.np[:num_reqs]
        for processor, slots, entries, position in _active(facade, runner, fed, kept):
            facade.run(
                processor,
                slots,
                Rows(
                    logits,
                    index=slots[:, None],
                    count=kept[slots].astype(np.int64),
                    position=position,
                    fed=partial(take, runner.input_ids.gpu, fed[slots]),
                    draft=facade.no_drafts[: slots.size],
                    entry_np=entries,
                    unmasked=facade.unmasked(processor, slots, 1),
                    control=facade.control_ids,
                ),
            )


def _show(facade: AlignSpecLogitsProcessor, runner: Any, logits: torch.Tensor, metadata: Any) -> torch.Tensor | None:
    num_reqs = runner.input_batch.num_reqs
    device = logits.device
    drafts = np.asarray(metadata.num_draft_tokens, np.int64)
    fed = runner.query_start_loc.np[1 : num_reqs + 1] - drafts - 1
    kept = ~runner.discard_request_mask.np[:num_reqs]
    active = list(_active(facade, runner, fed, kept))
    if not active:
        return None

    # The rows of every active request, one after another, in a copy of their own.
    ours = np.unique(np.concatenate([mine.slots for mine in active]))
    count = drafts[ours] + 1
    start = np.cumsum(count) - count
    within = np.arange(count.sum()) - np.repeat(start, count)
    is_draft = within < np.repeat(count, count) - 1
    first = np.cumsum(drafts + 1) - (drafts + 1)
    first_draft = np.cumsum(drafts) - drafts  # of each request, among all drafts
    stash = Stash(
        rows=logits.index_select(0, send(np.repeat(first[ours], count) + within, device)).float(),
        last=send(start + count - 1, device),
        last_line=send(ours, device),
        draft=send(np.flatnonzero(is_draft), device),
        draft_line=send((np.repeat(first_draft[ours], count) + within)[is_draft], device),
    )
    line = np.zeros(num_reqs, np.int64)
    line[ours] = start
    limits = None
    for mine in active:
        count = drafts[mine.slots] + 1
        r = np.arange(count.max())
        draft = send(np.full((len(count), len(r)), -1), device)
        usable = (r < count[:, None] - 1) & facade.drafts_are_real[mine.slots][:, None]
        if usable.any():
            which = np.where(usable, first_draft[mine.slots][:, None] + r, 0)
            draft = torch.where(send(usable, device), metadata.draft_token_ids[send(which, device)].long(), draft)
        shown, limit = facade.run(
            mine.processor,
            mine.slots,
            Rows(
                stash.rows,
                index=line[mine.slots][:, None] + np.minimum(r, count[:, None] - 1),
                count=count * kept[mine.slots],
                position=mine.position,
                fed=partial(take, runner.input_ids.gpu, fed[mine.slots]),
                draft=draft,
                entry_np=mine.entries,
                unmasked=facade.unmasked(mine.processor, mine.slots, len(r)),
                control=facade.control_ids,
            ),
        )
        if shown:
            facade.stash = stash
        if limit is not None:
            if limits is None:
                limits = torch.full((num_reqs,), facade.rows, dtype=torch.int64, device=device)
            picked = send(mine.slots, device)
            limits[picked] = torch.minimum(limits[picked], limit)
    return limits


def edit_draft_rows(logits: torch.Tensor, sampling_metadata: Any) -> None:
    """Fills patch ``v1_draft_rows``."""
    facade = facade_of(sampling_metadata.logitsprocs)
    if facade is not None and facade.stash is not None:
        facade.stash.edit_draft_rows(logits)


def truncate(output_token_ids: torch.Tensor) -> None:
    """Fills patch ``v1_truncation``: [requests, drafts + 1] verified tokens, -1 where there is none."""
    global _limit
    limit, _limit = _limit, None
    if limit is not None:
        place = torch.arange(output_token_ids.shape[1], device=output_token_ids.device)
        output_token_ids.masked_fill_(place >= limit[:, None], -1)
