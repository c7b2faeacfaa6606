"""ASAp: grammar-aligned sampling (arXiv 2405.21047, section 3). Steering: towards the model's law given the grammar.

The aim is P(w | w in L). A mask alone samples something else: it replaces c(u), the probability that the prefix u can
still be completed within L, by 1 as long as it can be completed at all. ASAp keeps an upper bound c~(u) of c(u) from
what was sampled before (`trie`), 1 where nothing was, and samples the next token a of a prefix u with

    P(a|u) h(ua) / H(u)        h(ua) = c~(ua), 0 if illegal, 1 at a legal end
                               H(u) = sum over legal a of P(a|u) h(ua)

P is the model's law at the request's temperature over the *whole* vocabulary. ``adaptive`` is that. ``exact`` thins:
every row but an attempt's first survives with probability rho = H(u) / h(u), where h(u) is the number with which u was
sampled one row before; then the attempt returns w with probability P(w) / H(root), whatever other requests do to the
trie meanwhile (CARS, arXiv 2510.01902, made concurrent). ``weighted`` multiplies its weight by rho instead. Where
H(u) = 0, the attempt is abandoned.

A row is drawn here, not by vLLM: one uniform number per (attempt, position) decides, and the row becomes one-hot on
the result. So a draft token is accepted with the probability that it is drawn, and what the trie has to learn of a
row is known with the row.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch

from vllm_align_spec.options import MAX_STOP_IDS
from vllm_align_spec.processors.rows import Layout, Processor, Rows, Small, loops, row_logsumexp, send

if TYPE_CHECKING:
    from vllm_align_spec.processors.trie import Tries

logger = logging.getLogger("vllm.align_spec")

MODES = ("adaptive", "exact", "weighted")


class State(IntEnum):
    """How an attempt ended, if it did: it was thinned away, no token was left, the method failed."""

    COMPLETED, REJECTED, DEAD_END, FAILED = range(4)


FILE = "tries.safetensors"

_Int = np.ndarray[Any, np.dtype[np.int64]]
_Int32 = np.ndarray[Any, np.dtype[np.int32]]
_Float = np.ndarray[Any, np.dtype[np.float64]]

ATTEMPT = np.dtype(
    [
        ("trie", np.int64),
        ("open", np.bool_),  # whether it holds a reference to its trie
        ("mode", np.int64),
        ("prompt", np.int64),  # tokens
        ("length", np.int64),  # N: most tokens of a response, the end token included
        ("shortest", np.int64),  # min_tokens
        ("inverse_temperature", np.float64),
        ("seed", np.uint64),
        ("state", np.int64),
        ("log_h0", np.float64),  # log H of its first row
        ("nodes", np.int64),  # nodes that it added
        ("seconds", np.float64),  # its share of the host's work
    ]
)
"""An attempt, as admission made it."""
PLACE = np.dtype(
    [
        ("out", np.int64),  # tokens out before row 0 of the next step; as many rows were reached
        ("parent", np.int32),  # node of the row in which the latest token was drawn; -1 if it has none
        ("token", np.int64),  # that token
        ("node", np.int32),  # where it leads to from the parent, if that was visited before; else -1, and
        ("until", np.int32),  # this child of the parent and all older ones do not have that token; -1: it has none
        ("log_p", np.float64),  # its log P
        ("log_h", np.float64),  # the log h with which it was drawn
        ("log_w", np.float64),  # sum of log rho
        ("log_bank", np.float64),  # what rounding made of rho > 1, for the rows to come
    ]
)
"""Where an attempt stands between two steps."""


class Known(NamedTuple):
    """What a step knows of its rows before they are drawn, on the host."""

    node: _Int32  # [S, L] the tries' nodes, -1 for none
    offsets: _Int  # [S * L + 1] row i's visited children are `child[offsets[i]:offsets[i + 1]]`
    child: _Int  # [K] token ids
    child_log_c: _Float  # [K] log c~ of each
    # [3, S, L] a uniform number in (0, 1) that draws the token; the log of one that decides whether the row survives,
    # the lowest finite number where nothing is thinned, inf where nothing survives; the log h that it was sampled with
    of_rows: _Float
    of_requests: _Float  # [3, S] 1 / temperature; log m, see `decide`; 1.0 if row 0 is an attempt's first
    # [2, S, L] whether nothing but an end is legal (the bound on the length), whether no end is (``min_tokens``)
    limits: np.ndarray[Any, np.dtype[np.bool_]]
    otherwise: _Int  # [S] the `Control` that is forced where a row does not survive
    ends: _Int  # [S, E] token ids that end a response, -1 for none
    rows: _Int  # [S] how many to decide, 0 where the attempt is over


NUMBERS = (
    "log_h",  # log H(u); -inf where no token is left, and then the token is arbitrary
    "log_unvisited",  # log mass of the legal children that the trie does not know
    "token",  # the token drawn
    "token_log_p",  # log P of it
    "token_log_h",  # log h with which it was drawn
    "draft_log_p",  # log P of the row's draft token; -inf where there is none or it is illegal
    "alive",  # 1.0 if the row survives
    "log_rho",  # 0 at first rows
    "log_bank",  # log m behind the row
)
"""What `decide` says of each row."""


def decide(
    logits: torch.Tensor,
    index: Small,
    unmasked: Small,
    draft: Small,
    control: torch.Tensor,
    known: Known,
) -> torch.Tensor:
    """Draws one token per row from P(a|u) h(ua) / H(u), and makes the row one-hot on it, or on a control id where the
    row does not survive.

    Thinning goes row after row: survive with probability min(1, m rho), then m <- max(1, m rho). rho exceeds 1 by
    rounding only. m, which starts at 1, banks the excess for the rows that follow.

    Args:
        logits: [N, V] float32 after the grammar mask; only the first ``known.rows`` rows of each request are written,
            of the others at most the control ids.
        index: [S, L] int64 lines of ``logits``, as in `rows.Rows`.
        unmasked: [S, L] log-sum-exp of the rows over the temperature, before the mask.
        draft: [S, L] int64, -1 for none.
        control: [control ids] int64; none is drawn.
        known: of the same rows.

    Where the logits are on the host, ``index``, ``unmasked`` and ``draft`` may be arrays.

    Returns:
        [9, S, L] float64, the `NUMBERS` of rows that were to be decided; elsewhere they mean nothing.
    """
    if logits.is_cuda:
        from vllm_align_spec.processors import kernels

        compiled: Any = kernels
    else:
        compiled = loops()
    numbers: torch.Tensor = compiled.asap_decide(logits, index, unmasked, draft, control, known)
    return numbers


@dataclass
class _Step:
    """A step's rows on their way back from the device."""

    entry: _Int  # [S]
    draft: _Int  # [S, L]
    known: Known
    child_node: _Int32  # [K] the tries' nodes of `known.child`
    numbers: torch.Tensor  # [9, S, L] on the host: `NUMBERS`
    arrived: torch.cuda.Event | None
    turn: int
    seconds: float


class AsapProcessor(Processor):
    """All modes of ASAp, for all requests of a step at once.

    Between two steps an attempt stands at a place: the token that was drawn last, and the node of the row it was drawn
    in. A step finds the nodes of its rows, draws, and leaves the rest (inserting what was seen, backing it up) to the
    beginning of the next one, when the numbers have reached the host.
    """

    method: ClassVar[str] = "asap"
    drafter: ClassVar[bool] = False
    grammar: ClassVar[bool] = True
    control: ClassVar[bool] = True

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._tries: Tries
        entries = layout.entries
        self._attempt = np.zeros(entries, dtype=ATTEMPT)
        self._place = np.zeros(entries, dtype=PLACE)
        self._before = np.zeros(entries, dtype=PLACE)  # one step back: a step that was taken back is drawn again
        self._ends = np.full((entries, MAX_STOP_IDS), -1, dtype=np.int64)
        self._steps: deque[_Step] = deque()
        self._turn = 0
        self._ready = False
        self._seconds = 0.0
        self._unpaid = 0.0  # of them, what the requests of the next step are charged with
        self._saved_at = time.monotonic()
        options = layout.options.asap
        self._file: Path | None = None
        if options.save_path is not None:
            # One file a model: a folder may serve many.
            digest = hashlib.sha256(repr(sorted(layout.identity.items())).encode()).hexdigest()[:16]
            self._file = Path(options.save_path) / f"{digest}.{FILE}"
        if options.warm_up or options.save_path is not None or options.share is not None:
            self._open()

    def _open(self) -> None:
        # Not at import: numba takes longer to load than a server that never sees a request of ours should wait.
        from vllm_align_spec.processors import attempts, trie
        from vllm_align_spec.processors.trie import Tries
        from vllm_align_spec.processors.trie_file import TrieFileError

        trie.warm_up()
        attempts.warm_up()
        if self._layout.device.type == "cpu":
            loops().warm_up()
        options = self._layout.options.asap
        self._tries = Tries(options.max_bytes, shared=options.share is not None)
        self._state = (self._tries.arena, self._attempt, self._place, self._before, self._ends)
        self._look_up, self._take_in = attempts.look_up, attempts.take_in
        self._ready = True
        if self._file is not None and self._file.exists():
            try:
                count = self._tries.load(self._file, self._layout.identity, self._layout.vocab_size)
                logger.info("ASAp starts with %d tries from %s", count, self._file)
            except (TrieFileError, OSError) as error:
                logger.warning("ASAp starts without saved tries: %s", error)

    def close(self) -> None:
        """Saves the tries, if the operator named a place for them."""
        if self._ready:
            self._settle()
            self._save()

    def _save(self) -> None:
        if self._file is not None and self._layout.keeper and self._tries.nodes_used:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._tries.save(self._file, self._layout.identity)
            self._saved_at = time.monotonic()

    def exchange(self, since: Sequence[int], news: Sequence[bytes]) -> tuple[list[bytes], int]:
        """Takes in what other replicas learnt, and tells what this one did, on all ranks between the same two steps.

        Args:
            since: for each shard, the number that an earlier call returned; 0 for everything.
            news: what `trie.Tries.news` gave elsewhere.

        Returns:
            News of each shard, and the number for a later call.
        """
        self._settle()
        layout, shards = self._layout, len(since)
        found = {start: self._tries.news(start, layout.identity, shards) for start in set(since)}
        for piece in news:
            self._tries.merge(piece, layout.identity, layout.vocab_size, foreign=True)
        return [found[start][shard] for shard, start in enumerate(since)], self._tries.next_epoch()

    def admit(self, entry: int, arguments: Mapping[str, Any], prompt_len: int) -> None:
        """``arguments`` are the request options and what `strategies.asap` adds to them."""
        if not self._ready:
            self._open()
        if any(entry in step.entry for step in self._steps):
            self._settle()  # its last request's latest step, which would be taken for one of this request
        self._release(entry)
        ends = list(arguments["align_spec_stop_ids"])
        trie = self._tries.open(bytes.fromhex(arguments["align_spec_trie"]))
        self._tries.retain(trie)
        self._attempt[entry] = (
            trie,
            True,
            MODES.index(arguments["asap"]),
            prompt_len,
            arguments["align_spec_length"],
            arguments["align_spec_min_tokens"],
            1 / arguments["align_spec_temperature"],
            arguments["align_spec_seed"],
            State.COMPLETED,
            -np.inf,
            0,
            0.0,
        )
        self._place[entry] = self._before[entry] = (0, -1, -1, -1, -1, 0.0, 0.0, 0.0, 0.0)
        self._ends[entry] = -1
        self._ends[entry, : len(ends)] = ends

    def abandon(self, entry: int) -> None:
        """The attempt ends as failed with its next row."""
        self._attempt[entry]["state"] = State.FAILED

    def _release(self, entry: int) -> None:
        attempt = self._attempt[entry]
        if attempt["open"]:
            attempt["open"] = False
            self._tries.release(int(attempt["trie"]))

    def flush(self) -> None:
        """Takes in what the last step saw, if it is here already; else `apply` will wait for it."""
        self._turn += 1
        self._settle(wait=False)

    def apply(self, rows: Rows) -> None:
        """Draws the token of every row; see `rows.Processor.apply`."""
        host = rows.host()
        began = time.perf_counter()
        self._settle(before=self._turn)
        e, draft, count = rows.entry_np, np.ascontiguousarray(host.draft), host.count.copy()
        *found, child_node = self._look_up(*self._state, e, np.ascontiguousarray(host.position), count, draft)
        known = Known._make((*found, self._ends[e], count))
        host_seconds = time.perf_counter() - began

        width = draft.shape[1]
        index, unmasked, drafted = (
            (rows.index, rows.unmasked, rows.draft) if rows.logits.is_cuda else (rows.index_np, rows.unmasked_np, draft)
        )
        if unmasked is None:  # nothing was masked in this step
            scale = send(known.of_requests[0].astype(np.float32).repeat(width), rows.logits.device)
            unmasked = row_logsumexp(rows.logits, rows.index.reshape(-1), scale).view(rows.index.shape)
        assert rows.control is not None
        numbers = decide(rows.logits, index, unmasked, drafted, rows.control, known)
        self._send_back(e, draft, known, child_node, numbers, host_seconds)

    def _send_back(
        self, e: _Int, draft: _Int, known: Known, child_node: _Int32, numbers: torch.Tensor, seconds: float
    ) -> None:
        arrived = None
        if numbers.is_cuda:
            numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._steps.append(_Step(e, draft, known, child_node, numbers, arrived, self._turn, seconds))

    def _settle(self, *, before: int | None = None, wait: bool = True) -> None:
        """Takes in the steps of earlier turns than ``before`` (or all), or of them those that have arrived."""
        while self._steps and (before is None or self._steps[0].turn < before):
            arrived = self._steps[0].arrived
            if arrived is not None:
                if not wait and not arrived.query():
                    return
                arrived.synchronize()
            step = self._steps.popleft()
            each = (step.seconds + self._unpaid) / len(step.entry)
            began = time.perf_counter()
            self._take_in(
                *self._state,
                step.entry,
                step.known.rows,
                step.draft,
                step.known.node,
                step.known.offsets,
                step.known.child,
                step.child_node,
                step.numbers.numpy(),
                each,
            )
            self._unpaid = time.perf_counter() - began
            self._seconds += step.seconds + self._unpaid

    def reports(self, entries: Sequence[int]) -> list[dict[str, Any]]:
        """How each attempt went, and the state of the store."""
        if not self._ready:
            return [{} for _ in entries]
        self._settle()
        store = {
            "nodes": self._tries.nodes_used,
            "bytes": self._tries.bytes_used,
            "evictions": self._tries.evictions,
            "host_seconds": self._seconds,
        }
        attempt, place = self._attempt[entries], self._place[entries]
        log_v = np.where(attempt["state"] == State.COMPLETED, attempt["log_h0"] + place["log_w"], -np.inf)
        columns = (
            attempt["state"],
            place["out"],
            attempt["log_h0"],
            log_v,
            place["log_bank"],
            self._tries.mass_at_root(attempt["trie"]),
            attempt["nodes"],
            attempt["seconds"],
        )
        found = [
            {
                "state": State(state).name.lower(),
                "rows": rows,
                "log_h0": _finite(log_h0),
                "log_v": _finite(log_v),
                "log_bank": _finite(log_bank),
                "log_mass_at_root": _finite(log_mass_at_root),
                "nodes_added": nodes,
                "host_ms": round(1e3 * seconds, 3),
                "store": store,
            }
            for state, rows, log_h0, log_v, log_bank, log_mass_at_root, nodes, seconds in zip(
                *(column.tolist() for column in columns), strict=True
            )
        ]
        for entry in entries:
            self._release(entry)
        # Also now and then: by default vLLM kills its workers when a server ends.
        if time.monotonic() - self._saved_at >= self._layout.options.asap.save_interval_s:
            self._save()
        return found


def _finite(value: float) -> float | None:
    """JSON has no infinity: None stands for log 0."""
    return value if math.isfinite(value) else None
