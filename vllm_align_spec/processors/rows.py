"""What one engine step shows a method, whichever model runner runs it, and what a method may do to it.

Letters of the shapes: N lines of logits in the step, V vocabulary, S requests of the step that asked for the method,
L rows of a request at most (draft tokens + 1; the last one is the bonus row), E entries of per-request state.

The requests form a grid [S, L]. Everything that the host must know about it (S, L) it knows without asking the device,
so a step costs no synchronisation; a request with fewer rows than L repeats its last one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache, cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch

from vllm_align_spec.options import EngineOptions

if TYPE_CHECKING:
    from vllm_align_spec.companion.bridge import BridgedCompanion
    from vllm_align_spec.companion.model import Companion


class Control(IntEnum):
    """What a forced control id says."""

    ABANDON = 0
    SEGMENT_END = 1
    FAILED = 2


Ints = np.ndarray[Any, np.dtype[np.int64]]
Small = torch.Tensor | np.ndarray[Any, Any]
"""Small numbers of a step, on whichever side they were made."""


@dataclass(frozen=True)
class HostRows:
    """What of `Rows` a method that keeps its state on the host has to read there."""

    position: Ints  # [S]
    count: Ints  # [S]
    draft: Ints  # [S, L]


class Rows:
    """One step, as the requests that asked for one method see it.

    ``logits`` come after vLLM's grammar mask and before temperature; a method edits them in place, only at ``index``,
    and must not raise a -inf, except to force a control id.

    What a runner knows on the host goes to the device when a method asks for it there.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        *,
        index: Small,
        count: Small,
        position: Small,
        fed: Callable[[], Small],
        draft: Small,
        entry_np: Ints,
        unmasked: Small | None = None,
        control: torch.Tensor | None = None,
        fetch: Callable[[], HostRows] | None = None,
    ) -> None:
        """``fetch`` is where `host` has it from, if not from here: copies that were started before the forward pass."""
        self.logits = logits
        """[N, V] float32"""
        self.entry_np = entry_np
        """[S] entry of the request in the method's state, on the host"""
        self.control = control
        """[control ids] int64 in the order of `Control`; for methods that end requests (`Processor.control`)"""
        self._index, self._count, self._position, self._fed, self._draft = index, count, position, fed, draft
        self._unmasked, self._fetch = unmasked, fetch

    @cached_property
    def index(self) -> torch.Tensor:
        """[S, L] int64: line of `logits` that holds row r of the request; beyond `count` it repeats the last row."""
        return there(self._index, self.logits.device)

    @cached_property
    def count(self) -> torch.Tensor:
        """[S] int64: rows of the request; 0 if nothing sampled in this step is kept (a prefill that is not over)."""
        return there(self._count, self.logits.device)

    @cached_property
    def position(self) -> torch.Tensor:
        """[S] int64: where in its sequence the token stands that was fed at row 0 (prompt included, from 0)."""
        return there(self._position, self.logits.device)

    @cached_property
    def draft(self) -> torch.Tensor:
        """[S, L] int64: token drafted after the row; -1 at the bonus row, beyond it, and where no usable one stands."""
        return there(self._draft, self.logits.device)

    @cached_property
    def unmasked(self) -> torch.Tensor | None:
        """[S, L] float32: log-sum-exp of row / temperature before the grammar mask; None if this step masked nothing,
        or if the method does not ask for it (`Processor.grammar`)."""
        return None if self._unmasked is None else there(self._unmasked, self.logits.device)

    @cached_property
    def entry(self) -> torch.Tensor:
        """[S] int64, ``entry_np`` on the device."""
        return there(self.entry_np, self.logits.device)

    def fed(self) -> torch.Tensor:
        """[S] int64: the token that was fed at row 0, the last one of the sequence so far."""
        return there(self._fed(), self.logits.device)

    def chain(self) -> torch.Tensor:
        """[S, L] int64, the token that was fed at each row; 0 where none was that counts."""
        return torch.cat([self.fed()[:, None], self.draft[:, :-1].clamp(min=0)], 1)

    def host(self) -> HostRows:
        """The grid's small numbers on the host. May wait for the device, though not for this step's forward pass if
        the copies were started before it."""
        if self._fetch is not None:
            return self._fetch()
        return HostRows(here(self._position), here(self._count), here(self._draft))

    @property
    def index_np(self) -> Ints:
        """``index`` on the host; for logits that are there too."""
        return here(self._index)

    @property
    def unmasked_np(self) -> np.ndarray[Any, Any] | None:
        """``unmasked`` likewise."""
        return None if self._unmasked is None else here(self._unmasked)


@dataclass(frozen=True)
class Layout:
    """What stays constant while an engine runs."""

    device: torch.device
    entries: int  # E
    rows: int  # L
    vocab_size: int  # V
    options: EngineOptions = field(default_factory=EngineOptions)
    # what an answer depends on besides its request: names and versions of model and engine
    identity: Mapping[str, str] = field(default_factory=dict)
    # of ranks that hold the same state, one keeps it beyond the engine's life
    keeper: bool = True
    companions: Mapping[str, Companion | BridgedCompanion] = field(default_factory=dict)


class Processor(Protocol):
    """A method on the token plane. One instance a worker; state lives in E entries, one a request, kept across
    preemption and read once more for the report."""

    method: ClassVar[str]
    drafter: ClassVar[bool]
    """Whether it works through the engine's drafter and does not exist without one."""
    grammar: ClassVar[bool]
    """Whether it reads `Rows.unmasked`."""
    control: ClassVar[bool]
    """Whether it ends requests by forcing control ids; where it does not, it masks them in its rows."""
    follows: ClassVar[bool] = False
    """Whether it follows whole sequences: only then it hears `enter` and `leave`."""
    observes: ClassVar[bool] = False
    """Whether it wants to hear of steps in which it is not active: only then it hears `observe`."""

    def __init__(self, layout: Layout) -> None:
        """Allocates everything: construction runs inside the engine's memory profile, steps do not."""

    def admit(self, entry: int, arguments: Mapping[str, Any], prompt_len: int) -> None:
        """Initialises an entry for a new request, on the host; ``flush`` sends it to the device."""

    def enter(self, entry: int, tokens: torch.Tensor) -> None:
        """The request comes into the batch, for the first time (after ``admit``) or after a preemption.

        Args:
            entry: its entry.
            tokens: [n] int64, prompt and response so far.
        """
        return

    def leave(self, entry: int) -> None:
        """The request is not in the batch any more. On runner V2 this may be said late."""
        return

    def abandon(self, entry: int) -> None:
        """The request's state is lost (it was aged out) or the method failed: decode plainly from here on, or, if the
        method ends requests, end it as failed."""

    def flush(self) -> None:
        """Sends what ``admit`` and ``abandon`` staged; runs before the step's forward pass."""

    def observe(self, entry: torch.Tensor, position: torch.Tensor, counted: torch.Tensor) -> None:
        """Sees every step of every request of the method, whether or not it needs the rows.

        Args:
            entry: [S] int64.
            position: [S] int64, as in `Rows`.
            counted: [S] bool, whether what is sampled in this step is kept.
        """
        return

    def active(self, entry: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """Which requests still need their rows, as far as the host knows; None for all, unless a method knows better.
        Asking must not wait for the device."""
        return None

    def apply(self, rows: Rows) -> torch.Tensor | None:
        """Edits the logits of the active requests of a step.

        Returns:
            [S] int64, how many tokens each request may emit in this step; None if the method does not limit that.
        """

    def reports(self, entries: Sequence[int]) -> list[dict[str, Any]]:
        """What happened to the requests in these entries, which have ended. Waits for the device."""

    def close(self) -> None:
        """The worker ends. Most methods keep nothing beyond it."""
        return


def send(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """A small host array on the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def take(tensor: torch.Tensor, index: Ints) -> Small:
    """``tensor[index]`` of a small tensor of integers, as int64. On a CPU numpy does it, in half the time that torch
    takes for so little, and that is where it stays."""
    if tensor.is_cuda:
        return tensor[send(index, tensor.device)].long()
    return tensor.numpy()[index].astype(np.int64, copy=False)


def there(small: Small, device: torch.device) -> torch.Tensor:
    """Small numbers on the device."""
    return small if isinstance(small, torch.Tensor) else send(small, device)


def here(small: Small) -> np.ndarray[Any, Any]:
    """Small numbers on the host."""
    return small if isinstance(small, np.ndarray) else small.cpu().numpy()


@cache
def loops() -> ModuleType:
    """The module of that name, with numba, which takes longer to load than a server should wait that needs none."""
    from vllm_align_spec.processors import loops

    return loops


def token_logprobs(logits: torch.Tensor, index: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log softmax(logits[index])[tokens], untempered; -inf where the token is masked or negative.

    Args:
        logits: [N, V] float32.
        index: [S, L] int64 lines of ``logits``.
        tokens: [S, L] int64, -1 for none.

    Returns:
        [S, L] float32.
    """
    if logits.is_cuda:
        from vllm_align_spec.processors import kernels

        return kernels.token_logprobs(logits, index, tokens)
    log_p = logits.index_select(0, index.reshape(-1)).log_softmax(-1)
    chosen = log_p.gather(1, tokens.reshape(-1, 1).clamp(min=0)).view(index.shape)
    return chosen.masked_fill_(tokens < 0, float("-inf"))


def row_logsumexp(logits: torch.Tensor, line: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """log sum exp (scale * logits[line]) over the vocabulary.

    Args:
        logits: [N, V], any floating type.
        line: [M] int64 lines of ``logits``.
        scale: [M] float32, the inverse temperature.

    Returns:
        [M] float32.
    """
    if logits.is_cuda:
        from vllm_align_spec.processors import kernels

        return kernels.row_logsumexp(logits, line, scale)
    return torch.from_numpy(loops().row_logsumexp(logits, line.contiguous().numpy(), scale.contiguous().numpy()))


def row_entropy(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of softmax(logits[index]).

    Args:
        logits: [N, V] float32.
        index: [S, L] int64 lines of ``logits``.

    Returns:
        [S, L] float32; between 0 and ln V.
    """
    if logits.is_cuda:
        from vllm_align_spec.processors import kernels

        return kernels.row_entropy(logits, index)
    p = logits.index_select(0, index.reshape(-1)).softmax(-1)
    entropy: torch.Tensor = torch.special.entr(p).sum(-1)
    return entropy.view(index.shape)


def force(logits: torch.Tensor, index: torch.Tensor, where: torch.Tensor, tokens: torch.Tensor) -> None:
    """Makes rows one-hot in place: 0 at the token, -inf elsewhere.

    Args:
        logits: [N, V] float32.
        index: [S, L] int64 lines of ``logits``; the selected ones are distinct.
        where: [S, L] bool, the rows to force.
        tokens: [S, L] int64, valid where ``where``.
    """
    if logits.is_cuda:
        from vllm_align_spec.processors import kernels

        kernels.force(logits, index, where, tokens)
        return
    # numpy takes a fifth of the time that torch takes to index so little.
    x, chosen = logits.numpy(), where.numpy()
    lines = index.numpy()[chosen]
    x[lines] = -np.inf
    x[lines, tokens.numpy()[chosen]] = 0.0


def mask(logits: torch.Tensor, index: torch.Tensor, ids: torch.Tensor) -> None:
    """Makes tokens illegal in place.

    Args:
        logits: [N, V] float32.
        index: [S, L] int64 lines of ``logits``.
        ids: [I] int64 token ids.
    """
    if logits.is_cuda:
        logits[index[..., None], ids] = float("-inf")
    else:
        logits.numpy()[index.numpy()[..., None], ids.numpy()] = -np.inf
