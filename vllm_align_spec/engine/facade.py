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
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from vllm import __version__ as vllm_version
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2LogitsProcessor

from vllm_align_spec import options, registry
from vllm_align_spec.engine import companions, control, v1, v2
from vllm_align_spec.patches import STATE
from vllm_align_spec.processors.asap import AsapProcessor
from vllm_align_spec.processors.rows import Control, Layout, Processor, Rows, Small, force, loops, row_logsumexp, send

logger = logging.getLogger("vllm.align_spec")

OFFLINE_CLASS = "vllm_align_spec.engine.offline.LLM"
PATCHES: dict[str, dict[str, tuple[str, ...]]] = {
    "v1": {
        "": ("v1_facade", "v1_rows", "v1_drafter_fits", "v1_draft_rows", "v1_truncation"),
        "grammar": ("v1_grammar_mask",),
    },
    "v2": {"": ("v2_truncation",), "grammar": ("v2_inputs", "v2_grammar_mask")},
}
"""Runner -> which patches its methods need, and which more those that read the rows' normalisers."""

_facades: weakref.WeakSet[AlignSpecLogitsProcessor] = weakref.WeakSet()


class AlignSpecLogitsProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Valid under both interfaces: V1 constructs it with (config, device, pinned), V2 with (config, states)."""

    is_align_spec: ClassVar[bool] = True

    def __init__(self, vllm_config: Any, device_or_states: Any, is_pin_memory: bool | None = None) -> None:
        on_v1 = is_pin_memory is not None
        self._states = None if on_v1 else device_or_states
        device = torch.device(device_or_states if on_v1 else device_or_states.device)
        speculative = vllm_config.speculative_config
        max_reqs = vllm_config.scheduler_config.max_num_seqs
        self.rows = 1 + (speculative.num_speculative_tokens if speculative else 0)
        vocab_size = vllm_config.model_config.get_vocab_size()
        configured = options.parse_engine(vllm_config.additional_config)
        parallel = vllm_config.parallel_config
        keeper = parallel.rank == parallel.world_size - parallel.tensor_parallel_size  # first of the last stage
        entries = max(1024, 4 * max_reqs)
        second = companions.load(vllm_config, configured, device, self.rows, entries)
        layout = Layout(device, entries, self.rows, vocab_size, configured, identity(vllm_config), keeper, second)
        self._processors: list[Processor] = [
            cls(layout) for cls in registry.processors() if configured.enabled and (speculative or not cls.drafter)
        ]
        needs = PATCHES["v1" if on_v1 else "v2"]
        self._needs = {p.method: [*needs[""], *(needs["grammar"] if p.grammar else ())] for p in self._processors}

        self._entries: OrderedDict[str, int] = OrderedDict()  # id -> entry, oldest first
        self._capacity = layout.entries
        self._asked: dict[str, frozenset[str]] = {}  # id -> methods that admitted it
        self._errors: dict[str, str] = {}
        self._entered: dict[int, torch.Tensor | None] = {}  # slot -> its tokens; None if runner V2 has them
        slots = self.slots = max_reqs + 1
        self._ids: list[str | None] = [None] * slots
        self._entry = np.full(slots, -1, dtype=np.int64)  # slot -> entry, -1 for requests that are not ours
        self._wanted = np.zeros((len(self._processors), slots), dtype=bool)
        self._wants = {p.method: self._wanted[i] for i, p in enumerate(self._processors)}
        # As above, of the methods that read `Rows.unmasked`.
        self._wants_unmasked = [self._wants[p.method] for p in self._processors if p.grammar]
        self.drafts_are_real = np.ones(slots, dtype=bool)
        self.no_drafts = np.full((slots, 1), -1, dtype=np.int64)
        self.no_offset = np.zeros(slots, dtype=np.int64)
        self._placed = 0  # requests of ours in the batch
        self._inverse_temperature = np.ones(slots, dtype=np.float32)
        self._unmasked = torch.zeros(slots, self.rows, device=device)
        self._host_unmasked = None if self._unmasked.is_cuda else self._unmasked.numpy()  # the same memory
        self._masks = False  # whether this step's rows stand in `_unmasked`
        self.control_ids: torch.Tensor | None = None  # [control ids], once a request named them
        self.device = device
        self.stash: Any = None  # V1: what was decided for this step's rows
        self.waiting: Any = None  # V1: the runner, if this step has no drafts and its rows are still to be shown
        self.inputs: Any = None  # V2: this step's inputs, on their way to the host
        _facades.add(self)
        if not on_v1:
            v2.attach(self)

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

    def _place(self, slot: int, params: Any, prompt_len: int, *, resumed: bool) -> bool:
        """Puts a request into a slot; whether any method wants its rows."""
        self._remove(slot)
        extra: Mapping[str, Any] | None = params.extra_args
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
        self._placed += 1
        self.drafts_are_real[slot] = True
        # That of the distribution; a method that draws by itself has vLLM take the only token left.
        temperature = extra.get("align_spec_temperature", params.temperature)
        self._inverse_temperature[slot] = 1 / temperature if temperature else 1.0
        if self.control_ids is None and control.KEY in extra:
            self.control_ids = torch.tensor(list(extra[control.KEY]), device=self.device)
        wanted = False
        asked = options.METHOD_NAMES.intersection(extra)
        if asked - self._wants.keys():
            self._errors[identity] = f"the worker has no processor for {', '.join(asked)}"
        for processor in self._processors:
            if processor.method not in extra:
                continue
            if identity not in self._errors:
                try:
                    needed = self._needs[processor.method]
                    if missing := [name for name in needed if STATE.get(name, "pending") == "pending"]:
                        raise RuntimeError(f"patches {missing} are not in force in the worker")
                    if not known:
                        processor.admit(entry, extra, prompt_len)
                        self._asked[identity] |= {processor.method}
                        if resumed:
                            raise RuntimeError("preempted for so long that its state was dropped")
                except Exception as error:  # nothing a request contains may kill the engine
                    self._fail(processor, slot, error)
            wants = processor.control or identity not in self._errors
            self._wants[processor.method][slot] = wants
            wanted |= wants
        return wanted

    def _new_entry(self, identity: str) -> int:
        if len(self._entries) < self._capacity:
            entry = len(self._entries)
        else:
            placed = {i for i in self._ids if i is not None}
            oldest = next(i for i in self._entries if i not in placed)
            entry = self._entries.pop(oldest)
            self._asked.pop(oldest)
            self._errors.pop(oldest, None)
        self._entries[identity] = entry
        self._asked[identity] = frozenset()
        return entry

    def _remove(self, slot: int) -> None:
        if self._entry[slot] >= 0:
            for processor in self._processors:
                if processor.follows:
                    processor.leave(int(self._entry[slot]))
            self._ids[slot] = None
            self._entry[slot] = -1
            self._placed -= 1
            self._entered.pop(slot, None)
            self._wanted[:, slot] = False

    def _fail(self, processor: Processor, slot: int, error: Exception) -> None:
        identity = self._ids[slot]
        if identity is None:
            return
        then = "it ends" if processor.control else "it goes on as plain decoding"
        logger.error("%s failed for request %s: %r; %s", processor.method, identity, error, then)
        self._errors[identity] = f"{type(error).__name__}: {error}"
        self._wants[processor.method][slot] = processor.control
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
                if self._place(slot, params, len(prompt or ()), resumed=bool(output)) and self._followed(slot):
                    self._entered[slot] = torch.tensor([*(prompt or ()), *output])
            for source, target, direction in batch_update.moved:
                self._move(source, target, swap=direction is MoveDirectionality.SWAP)
        self.apply_staged_writes()

    def _move(self, source: int, target: int, *, swap: bool) -> None:
        arrays = [self._entry, self.drafts_are_real, self._inverse_temperature, *self._wanted]
        for array in arrays:
            array[[source, target]] = array[[target, source]]
        self._ids[source], self._ids[target] = self._ids[target], self._ids[source]
        entered = {target: self._entered.pop(source, 0), source: self._entered.pop(target, 0)}
        self._entered |= {slot: tokens for slot, tokens in entered.items() if not isinstance(tokens, int)}
        if not swap:
            self._remove(source)

    # V2 --------------------------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request enters a slot."""
        assert self._states is not None
        prompt_len = int(self._states.prompt_len.np[req_idx])
        resumed = int(self._states.prefill_len.np[req_idx]) > prompt_len
        wanted = self._place(req_idx, sampling_params, prompt_len, resumed=resumed)
        if wanted and self._followed(req_idx):
            self._entered[req_idx] = None
        return wanted

    def apply_staged_writes(self) -> None:
        """Runs before each forward pass."""
        self._masks = False
        if self._entered:
            self._enter()
        if self._placed:
            for processor in self._processors:
                try:
                    processor.flush()
                except Exception as error:
                    self.switch_off(None, processor, error)

    # Both ------------------------------------------------------------------------------------------------------

    def _followed(self, slot: int) -> bool:
        return any(p.follows and self._wants[p.method][slot] for p in self._processors)

    def _enter(self) -> None:
        for slot, tokens in self._entered.items():
            if tokens is None:
                assert self._states is not None
                tokens = self._states.all_token_ids.gpu[slot, : int(self._states.prefill_len.np[slot])].long()
            for processor in self._processors:
                if processor.follows and self._wants[processor.method][slot]:
                    with self.guard(np.array([slot]), processor):
                        processor.enter(int(self._entry[slot]), tokens)
        self._entered.clear()

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """V1: puts decided rows into what is sampled, or, in a step without drafts, decides them there. V2 (with
        ``ctx``): shows the step's rows to the methods."""
        if ctx is None:
            if self.waiting is not None:
                v1.in_place(self, logits)
            elif self.stash is not None:
                self.stash.edit_last_rows(logits, self.control_ids)
        elif self._placed:
            v2.apply(self, self._states, logits, ctx)
        return logits

    @property
    def busy(self) -> bool:
        """Whether any request of the batch is ours."""
        return self._placed > 0

    def before_mask(
        self, logits: torch.Tensor, line: np.ndarray[Any, Any], slot: np.ndarray[Any, Any], r: np.ndarray[Any, Any]
    ) -> None:
        """Notes the normaliser of rows that a grammar is about to mask.

        Args:
            logits: [N, V], as the model made them.
            line: [M] lines of ``logits``.
            slot: [M] slots of their requests.
            r: [M] each line's offset among the rows of its request.
        """
        scale, device = self._inverse_temperature[slot], self.device
        if self._host_unmasked is not None:
            self._host_unmasked[slot, r] = loops().row_logsumexp(logits, line, scale)
        else:
            found = row_logsumexp(logits, send(line, device), send(scale, device))
            self._unmasked[send(slot, device), send(r, device)] = found
        self._masks = True

    def unmasked(self, processor: Processor, slots: np.ndarray[Any, Any], rows: int) -> Small | None:
        """`Rows.unmasked` of the requests in these slots."""
        if not processor.grammar or not self._masks:
            return None
        if self._host_unmasked is not None:
            found: np.ndarray[Any, Any] = self._host_unmasked[slots]
            return found[:, :rows]
        return self._unmasked[send(slots, self.device), :rows]

    def of_grammar(self, slots: np.ndarray[Any, Any] | slice) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """[number of slots] which of them hold requests whose method reads `Rows.unmasked`."""
        found: np.ndarray[Any, np.dtype[np.bool_]] = self._wants_unmasked[0][slots]
        for wants in self._wants_unmasked[1:]:
            found = found | wants[slots]
        return found

    def wanted(
        self, slots: np.ndarray[Any, Any] | slice
    ) -> list[tuple[Processor, np.ndarray[Any, np.dtype[np.int64]]]]:
        """The methods that requests in these slots want, in registry order, each with theirs as indices into
        ``slots``."""
        wanted: np.ndarray[Any, np.dtype[np.bool_]] = self._wanted[:, slots]
        any_wants: Any = wanted.any(1)
        return [(self._processors[i], wanted[i].nonzero()[0]) for i in any_wants.nonzero()[0]]

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

    def run(self, processor: Processor, slots: np.ndarray[Any, Any], rows: Rows) -> tuple[bool, torch.Tensor | None]:
        """One method over its rows.

        Returns:
            whether they are what is to be sampled, else they decode plainly; and what `Processor.apply` returns.
        """
        with self.guard(slots, processor):
            return True, processor.apply(rows)
        if processor.control:
            assert self.control_ids is not None
            failed = self.control_ids[Control.FAILED].expand(rows.index.shape)
            force(rows.logits, rows.index, torch.ones_like(rows.index, dtype=torch.bool), failed)
        return processor.control, None

    def guard(self, slots: np.ndarray[Any, Any] | None = None, processor: Processor | None = None) -> _Guard:
        """What fails inside switches the method (or all) off for the requests in these slots (or all); never more."""
        return _Guard(self, slots, processor)

    def switch_off(self, slots: np.ndarray[Any, Any] | None, processor: Processor | None, error: Exception) -> None:
        """What a `guard` does."""
        for slot in np.flatnonzero(self._entry >= 0) if slots is None else slots:
            for one in self._processors if processor is None else (processor,):
                self._fail(one, int(slot), error)

    def reports(self, ids: list[str]) -> dict[str, dict[str, Any]]:
        """What happened to the requests with these ids; unknown ones are left out."""
        known = [i for i in ids if i in self._entries]
        found: dict[str, dict[str, Any]] = {i: {} for i in known}
        for processor in self._processors:
            asked = [i for i in known if processor.method in self._asked[i]]
            reports = processor.reports([self._entries[i] for i in asked]) if asked else ()
            for identity, report in zip(asked, reports, strict=True):
                found[identity][processor.method] = report
        for identity in known:
            if identity in self._errors:
                found[identity]["error"] = self._errors[identity]
        return found


class _Guard(NamedTuple):
    """See `AlignSpecLogitsProcessor.guard`; a step enters a dozen, and a generator takes more than twice as long."""

    facade: AlignSpecLogitsProcessor
    slots: np.ndarray[Any, Any] | None
    processor: Processor | None

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self.facade.switch_off(self.slots, self.processor, error)
        return True


def identity(config: Any) -> dict[str, str]:
    """What logits depend on besides a request: state from another engine is good only where all of this agrees."""
    model, parallel = config.model_config, config.parallel_config
    return {
        "vllm": vllm_version,
        "model": str(model.model),
        "revision": str(model.revision),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "tokenizer": f"{model.tokenizer}@{model.tokenizer_revision}",
        "parallel": f"{parallel.tensor_parallel_size}x{parallel.pipeline_parallel_size}",
    }


def closing(worker: Any) -> None:
    """Fills patch ``worker_shutdown``."""
    for facade in list(_facades):
        for processor in facade.processors:
            with facade.guard(processor=processor):
                processor.close()


def call(worker: Any, what: str, *args: Any) -> Any:
    """Fills the worker's ``align_spec_call``: all ranks do what is asked, one answers, the last pipeline stage's first.

    Args:
        worker: vLLM's.
        what: ``reports``, with ids of requests; ``tries``, with the arguments of `AsapProcessor.exchange`.
        args: of that.

    Returns:
        None on the other ranks, and where there is nobody to ask.
    """
    from vllm.distributed import get_pp_group, get_tp_group

    found = _CALLS[what](list(_facades), *args)
    return found if get_pp_group().is_last_rank and get_tp_group().rank_in_group == 0 else None


def _reports(facades: list[AlignSpecLogitsProcessor], ids: list[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for facade in facades:
        found.update(facade.reports(ids))
    return found


def _tries(facades: list[AlignSpecLogitsProcessor], since: list[int], news: list[bytes]) -> Any:
    processors = [one for facade in facades for one in facade.processors if isinstance(one, AsapProcessor)]
    return processors[0].exchange(since, news) if processors else None


_CALLS: Mapping[str, Callable[..., Any]] = {"reports": _reports, "tries": _tries}
