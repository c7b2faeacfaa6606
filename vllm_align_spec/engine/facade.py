"""The one logits processor that vLLM loads, on either runner, and what it keeps about requests.

It knows which request stands in which slot, which methods a request asked for, and runs each method once a step over
the rows of its requests (`v1` and `v2` build those). It costs nothing where no request of the batch asked for anything.

A request's state lives in an *entry*, found by the id that admission gave the request. The entry survives preemption,
when the slot does not, and is read once more for the report; the oldest entries that stand in no slot are reused.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2LogitsProcessor

from vllm_align_spec import options, registry
from vllm_align_spec.engine import v2
from vllm_align_spec.patches import STATE
from vllm_align_spec.processors.rows import Layout, Processor, Rows

logger = logging.getLogger("vllm.align_spec")

OFFLINE_CLASS = "vllm_align_spec.engine.offline.LLM"
_facades: weakref.WeakSet[AlignSpecLogitsProcessor] = weakref.WeakSet()


class AlignSpecLogitsProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Valid under both interfaces: V1 constructs it with (config, device, pinned), V2 with (config, states)."""

    def __init__(self, vllm_config: Any, device_or_states: Any, is_pin_memory: bool | None = None) -> None:
        on_v1 = is_pin_memory is not None
        self._states = None if on_v1 else device_or_states
        device = torch.device(device_or_states if on_v1 else device_or_states.device)
        speculative = vllm_config.speculative_config
        max_reqs = vllm_config.scheduler_config.max_num_seqs
        self.rows = 1 + (speculative.num_speculative_tokens if speculative else 0)
        layout = Layout(device, max(1024, 4 * max_reqs), self.rows, vllm_config.model_config.get_vocab_size())
        enabled = options.parse_engine(vllm_config.additional_config).enabled
        # WSD's pilot is the drafter: without one there is nothing to run.
        self._processors: list[Processor] = [cls(layout) for cls in registry.processors() if enabled and speculative]
        self._needs = (
            ("v1_facade", "v1_rows", "v1_drafter_fits", "v1_draft_rows", "v1_truncation")
            if on_v1
            else ("v2_truncation",)
        )

        self._entries: OrderedDict[str, int] = OrderedDict()  # id -> entry, oldest first
        self._capacity = layout.entries
        self._errors: dict[str, str] = {}
        slots = max_reqs + 1
        self._ids: list[str | None] = [None] * slots
        self._entry = np.full(slots, -1, dtype=np.int64)  # slot -> entry, -1 for requests that are not ours
        self._wants = {p.method: np.zeros(slots, dtype=bool) for p in self._processors}
        self.drafts_are_real = np.ones(slots, dtype=bool)
        self.device = device
        self.stash: Any = None  # V1: what was decided for this step's rows
        _facades.add(self)

    # Admission -------------------------------------------------------------------------------------------------

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuses our keys where our front end did not see the request.

        Raises:
            ValueError: becomes a 400, or the exception of vLLM's offline ``LLM``.
        """
        extra = sampling_params.extra_args
        if not extra:
            return
        ours = [key for key in extra if options.is_ours(key)]
        if ours and ("align_spec_id" not in extra or STATE.get("front_end", "pending") == "pending"):
            raise ValueError(
                f"{ours[0]}={extra[ours[0]]!r}: this engine is not reached through vllm_align_spec. Offline, use "
                f"{OFFLINE_CLASS} instead of vllm.LLM; serving, see `vllm-align-spec doctor`"
            )

    def _place(self, slot: int, extra: Mapping[str, Any] | None, prompt_len: int, *, resumed: bool) -> bool:
        """Puts a request into a slot; whether any method wants its rows."""
        self._remove(slot)
        identity = extra.get("align_spec_id") if extra else None
        if identity is None or extra is None:
            return False
        entry = self._entries.get(identity)
        if known := entry is not None:
            self._entries.move_to_end(identity)
        else:
            entry = self._new_entry(identity)
        self._ids[slot] = identity
        self._entry[slot] = entry
        self.drafts_are_real[slot] = True
        wanted = False
        if not self._processors and any(key in extra for key in options.METHOD_NAMES):
            self._errors[identity] = "the worker has no processor for this method"
        if missing := [name for name in self._needs if STATE.get(name, "pending") == "pending"]:
            self._errors[identity] = f"patches {missing} are not in force in the worker"
        for processor in self._processors:
            if processor.method not in extra or identity in self._errors:
                continue
            try:
                if not known:
                    processor.admit(entry, extra, prompt_len)
                    if resumed:
                        processor.abandon(entry)
                        self._errors[identity] = "preempted for so long that its state was dropped"
            except Exception as error:  # nothing a request contains may kill the engine
                self._fail(processor, slot, error)
                continue
            self._wants[processor.method][slot] = wanted = True
        return wanted

    def _new_entry(self, identity: str) -> int:
        if len(self._entries) < self._capacity:
            entry = len(self._entries)
        else:
            placed = {i for i in self._ids if i is not None}
            oldest = next(i for i in self._entries if i not in placed)
            entry = self._entries.pop(oldest)
            self._errors.pop(oldest, None)
        self._entries[identity] = entry
        return entry

    def _remove(self, slot: int) -> None:
        if self._entry[slot] >= 0:
            self._ids[slot] = None
            self._entry[slot] = -1
            for wants in self._wants.values():
                wants[slot] = False

    def _fail(self, processor: Processor, slot: int, error: Exception) -> None:
        identity = self._ids[slot]
        if identity is None:
            return
        logger.error("%s failed for request %s: %r; it goes on as plain decoding", processor.method, identity, error)
        self._errors[identity] = f"{type(error).__name__}: {error}"
        self._wants[processor.method][slot] = False
        processor.abandon(int(self._entry[slot]))

    # V1 --------------------------------------------------------------------------------------------------------

    def is_argmax_invariant(self) -> bool:
        """False: greedy requests are ours too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: follows requests through the batch; runs before each forward pass."""
        if batch_update is not None:
            for slot in batch_update.removed:
                self._remove(slot)
            for slot, params, prompt, output in batch_update.added:
                self._place(slot, params.extra_args, len(prompt or ()), resumed=bool(output))
            for source, target, direction in batch_update.moved:
                self._move(source, target, swap=direction is MoveDirectionality.SWAP)
        self.apply_staged_writes()

    def _move(self, source: int, target: int, *, swap: bool) -> None:
        arrays = [self._entry, self.drafts_are_real, *self._wants.values()]
        for array in arrays:
            array[[source, target]] = array[[target, source]]
        self._ids[source], self._ids[target] = self._ids[target], self._ids[source]
        if not swap:
            self._remove(source)

    # V2 --------------------------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request enters a slot."""
        assert self._states is not None
        prompt_len = int(self._states.prompt_len.np[req_idx])
        resumed = int(self._states.prefill_len.np[req_idx]) > prompt_len
        return self._place(req_idx, sampling_params.extra_args, prompt_len, resumed=resumed)

    def apply_staged_writes(self) -> None:
        """Runs before each forward pass."""
        for processor in self._processors:
            with self.guard(processor=processor):
                processor.flush()

    # Both ------------------------------------------------------------------------------------------------------

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """V1: puts decided rows into what is sampled. V2 (with ``ctx``): shows the step's rows to the methods."""
        if ctx is None:
            if self.stash is not None:
                self.stash.edit_last_rows(logits)
        else:
            v2.apply(self, self._states, logits, ctx)
        return logits

    def slots_of(self, processor: Processor, slots: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Which of the batch's slots hold requests that want a method, as indices into ``slots``."""
        return np.flatnonzero(self._wants[processor.method][slots])

    def entries(self, slots: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The entries of the requests in these slots."""
        found: np.ndarray[Any, np.dtype[np.int64]] = self._entry[slots]
        return found

    @property
    def processors(self) -> list[Processor]:
        """The methods of this worker, in registry order."""
        return self._processors

    def observe(self, processor: Processor, slots: np.ndarray[Any, Any], *step: torch.Tensor) -> None:
        """Tells a method of a step of its requests; ``step`` as in `Processor.observe`."""
        with self.guard(slots, processor):
            processor.observe(*step)

    def run(self, processor: Processor, slots: np.ndarray[Any, Any], rows: Rows) -> torch.Tensor | None:
        """One method over its rows; None if it failed."""
        with self.guard(slots, processor):
            return processor.apply(rows)
        return None

    @contextmanager
    def guard(
        self, slots: np.ndarray[Any, Any] | None = None, processor: Processor | None = None
    ) -> Generator[None, None, None]:
        """What fails inside switches the method (or all) off for the requests in these slots (or all); never more."""
        try:
            yield
        except Exception as error:
            for slot in np.flatnonzero(self._entry >= 0) if slots is None else slots:
                for one in self._processors if processor is None else (processor,):
                    self._fail(one, int(slot), error)

    def reports(self, ids: list[str]) -> dict[str, dict[str, Any]]:
        """What happened to the requests with these ids; unknown ones are left out."""
        known = [i for i in ids if i in self._entries]
        found: dict[str, dict[str, Any]] = {i: {} for i in known}
        for processor in self._processors:
            for identity, report in zip(
                known, processor.reports([self._entries[i] for i in known]) if known else (), strict=True
            ):
                found[identity][processor.method] = report
        for identity in known:
            if identity in self._errors:
                found[identity]["error"] = self._errors[identity]
        return found


def reports(worker: Any, ids: list[str]) -> dict[str, dict[str, Any]]:
    """Fills the worker's ``align_spec_reports``: one rank answers, the last pipeline stage's first."""
    from vllm.distributed import get_pp_group, get_tp_group

    if not get_pp_group().is_last_rank or get_tp_group().rank_in_group != 0:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for facade in list(_facades):
        found.update(facade.reports(ids))
    return found
