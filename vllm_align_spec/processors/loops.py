"""What `kernels` are to a GPU: loops over rows, compiled by numba. Imported when the first request needs them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numba import njit, types  # type: ignore[import-untyped]
from numba.extending import intrinsic  # type: ignore[import-untyped]

from vllm_align_spec.processors.asap import Known
from vllm_align_spec.processors.rows import Small, here

_F = TypeVar("_F", bound=Callable[..., Any])
_Array = np.ndarray[Any, np.dtype[Any]]
_BLOCK = 1024
"""Tokens whose mass is summed before one of them is looked for."""
_LOG2_E, _HALF, _ZERO, _ONE = np.float32(1.0 / math.log(2.0)), np.float32(0.5), np.float32(0.0), np.float32(1.0)
_LOWEST = np.finfo(np.float32).min
_UNDERFLOW = np.float32(-127.0)
# 2^f for f in [-1/2, 1/2] to 3e-9: Chebyshev interpolation of degree 6.
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = map(
    np.float32, (1.0, 0.693147207, 0.240226509, 0.0555032723, 0.00961805668, 0.00134004282, 0.000154614447)
)


_CHANGED = max((file.stat().st_mtime for file in Path(__file__).parent.glob("[a-z_]*.py")), default=0.0)
"""When code that a compiled function may contain last changed."""


def jit(function: _F, **options: Any) -> _F:
    """The compiled function, from the cache on disk if it is there."""
    try:
        compiled = njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # no folder to cache in can be written to, as in containers with a read-only root
        return cast(_F, njit(nogil=True, **options)(function))
    # numba compiles a function anew when its own file changed, not when that of a function which it calls did.
    for index in Path(compiled.stats.cache_path).glob(f"*.{function.__name__}-*.nbi"):
        with contextlib.suppress(OSError):
            if index.stat().st_mtime < _CHANGED:
                index.unlink()
    return cast(_F, compiled)


def row_logsumexp(logits: torch.Tensor, line: _Array, scale: _Array) -> _Array:
    """See `rows.row_logsumexp`; ``line`` and ``scale`` are contiguous."""
    out = np.empty(len(line), np.float32)
    lines = _lines(logits)
    if lines is None:
        lines, line = logits.index_select(0, torch.from_numpy(line)).float().numpy(), np.arange(len(line))
    _logsumexp(lines, logits.shape[1], line, scale, out)
    return out


def asap_decide(
    logits: torch.Tensor,
    index: Small,
    unmasked: Small,
    draft: Small,
    control: torch.Tensor,
    known: Known,
) -> torch.Tensor:
    """See `asap.decide`.

    A uniform number walks through the visited children in the order of ``known.child``, then through all other tokens
    in the order of their ids.
    """
    lines, whole = _lines(logits), logits
    if lines is None:
        whole = logits.float().contiguous()
        lines = whole.numpy()
    numbers = np.zeros((9, *known.node.shape))
    _decide(
        lines,
        logits.shape[1],
        np.ascontiguousarray(here(index)),
        np.ascontiguousarray(here(unmasked)),
        np.ascontiguousarray(here(draft)),
        control.numpy(),
        *known[1:],
        numbers,
    )
    if whole is not logits:
        logits.copy_(whole)
    return torch.from_numpy(numbers)


def _lines(logits: torch.Tensor) -> _Array | None:
    """[N, W] float32 with the columns of ``logits`` first, in the same memory: a part of longer lines (a padded
    vocabulary) is taken where it is. None if it is something else."""
    if logits.dtype is torch.float32 and logits.is_contiguous():
        return cast(_Array, logits.numpy())
    n, width = logits.shape[0], logits.stride(0)
    if logits.dtype is not torch.float32 or logits.stride(1) != 1 or width < logits.shape[1]:
        return None
    if 4 * (logits.storage_offset() + n * width) > logits.untyped_storage().nbytes():
        return None
    lines: _Array = logits.as_strided((n, width), (width, 1)).numpy()
    return lines


@intrinsic  # type: ignore[untyped-decorator]
def _larger(_: Any, one: Any, other: Any) -> Any:
    """The larger of two float32; ``other`` if ``one`` is nan.

    numba's ``max`` promises more about nan and about the sign of zero, and for that a loop of it is not compiled to
    vector instructions: it takes eight times as long.
    """
    relaxed = ("nnan", "nsz")

    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *arguments, flags=relaxed), *arguments, flags=relaxed)

    return types.float32(types.float32, types.float32), make


@jit
def _top(x: _Array) -> np.float32:
    """The largest entry, but no less than the lowest finite number; a nan among them is never the largest."""
    top = _LOWEST
    for a in range(len(x)):
        top = _larger(x[a], top)
    return top


@intrinsic  # type: ignore[untyped-decorator]
def _float32_of(_: Any, bits: Any) -> Any:
    """The float32 that an int32 holds the bits of."""

    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return types.float32(types.int32), make


def _weigh(x: _Array, top: np.float32, scale: np.float32, weights: _Array) -> np.float32:
    """Writes e^(scale (x - top)), at most 1, into ``weights``, and returns their sum; 0 below 2^-126.

    As 2^n 2^f with f in [-1/2, 1/2]: there is no call in the loop, so it is compiled to vector instructions. Relative
    error 2e-7 plus that of the float32 exponent.

    Args:
        x: [n] float32.
        top: not less than any of them.
        weights: [n] float32.
    """
    base_2 = scale * _LOG2_E
    total = np.float32(0.0)
    for a in range(len(x)):
        t = max((x[a] - top) * base_2, _UNDERFLOW)
        n = np.int32(t - _HALF)
        f = t - np.float32(n)
        two_to_f = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
        weights[a] = two_to_f * _float32_of(np.int32((n + 127) << 23))
        total += weights[a]
    return total


_weigh = jit(_weigh, fastmath={"reassoc", "contract"})


@jit
def _log(value: float) -> float:
    return -np.inf if value <= 0.0 else math.log(value)


@jit
def _weigh_row(x: _Array, scale: np.float32, weights: _Array, blocks: _Array, tops: _Array) -> tuple[np.float32, float]:
    """A row block by block: `_weigh` relative to its largest entry.

    Args:
        x: [V] float32.
        scale: the inverse temperature.
        weights: [V] float32; where a block has no mass, its entries are not written.
        blocks: [V / _BLOCK, rounded up] float64, the mass of each.
        tops: as many float32, scratch.

    Returns:
        the largest entry and the mass of all.
    """
    top, total = _LOWEST, 0.0
    for b in range(len(blocks)):
        tops[b] = _top(x[b * _BLOCK : (b + 1) * _BLOCK])
        top = max(top, tops[b])
    for b in range(len(blocks)):
        blocks[b] = 0.0
        if tops[b] > _LOWEST:  # a grammar often leaves few tokens
            of_block = x[b * _BLOCK : (b + 1) * _BLOCK]
            blocks[b] = _weigh(of_block, top, scale, weights[b * _BLOCK : (b + 1) * _BLOCK])
        total += blocks[b]
    return top, total


@jit
def _logsumexp(logits: _Array, vocabulary: int, line: _Array, scale: _Array, out: _Array) -> None:
    blocks, tops = (
        np.empty((vocabulary + _BLOCK - 1) // _BLOCK),
        np.empty((vocabulary + _BLOCK - 1) // _BLOCK, np.float32),
    )
    weights = np.empty(vocabulary, np.float32)
    for i in range(len(line)):
        top, total = _weigh_row(logits[line[i], :vocabulary], scale[i], weights, blocks, tops)
        out[i] = _log(total) + np.float64(top) * scale[i]


@jit
def _bar(x: _Array, ends: _Array, only_ends: bool, no_ends: bool) -> None:
    """Leaves in a row the tokens that the bound on the length and ``min_tokens`` allow."""
    if only_ends:
        kept = np.full(len(ends), -np.inf, x.dtype)
        for j in range(len(ends)):
            if 0 <= ends[j] < len(x):  # an end token of the configuration may lie outside of the vocabulary
                kept[j] = x[ends[j]]
        x[:] = -np.inf
        for j in range(len(ends)):
            if 0 <= ends[j] < len(x):
                x[ends[j]] = kept[j]
    if no_ends:
        for j in range(len(ends)):
            if 0 <= ends[j] < len(x):
                x[ends[j]] = -np.inf


@jit
def _decide(
    logits: _Array,
    vocabulary: int,
    index: _Array,
    unmasked: _Array,
    draft: _Array,
    control: _Array,
    offsets: _Array,
    child: _Array,
    child_log_c: _Array,
    of_rows: _Array,
    of_requests: _Array,
    limits: _Array,
    otherwise: _Array,
    ends: _Array,
    count: _Array,
    numbers: _Array,
) -> None:
    """`asap.decide`, row after row. A row is the visited children with P h each, and the tokens that are left with P
    each."""
    requests, width = index.shape
    weights = np.empty(vocabulary, np.float32)
    blocks, tops = (
        np.empty((vocabulary + _BLOCK - 1) // _BLOCK),
        np.empty((vocabulary + _BLOCK - 1) // _BLOCK, np.float32),
    )
    most = 0
    for i in range(requests * width):
        most = max(most, offsets[i + 1] - offsets[i])
    log_p, log_mass = np.empty(most), np.empty(most)
    relative, mass = np.empty(most, np.float32), np.empty(most, np.float32)

    for s in range(requests):
        scale, bank = of_requests[0, s], of_requests[1, s]
        for r in range(count[s]):
            x, begin = logits[index[s, r], :vocabulary], offsets[s * width + r]
            shift = np.float64(unmasked[s, r])
            uniform, log_coin, log_used = of_rows[0, s, r], of_rows[1, s, r], of_rows[2, s, r]
            x[control] = -np.inf
            _bar(x, ends[s], limits[0, s, r], limits[1, s, r])
            draft_log_p = -np.inf
            if draft[s, r] >= 0 and x[draft[s, r]] > -np.inf:
                draft_log_p = x[draft[s, r]] * scale - shift

            # The visited children, relative to the one with the largest mass, are taken out of the row.
            children = offsets[s * width + r + 1] - begin
            log_largest = -np.inf
            for j in range(children):
                a = child[begin + j]
                log_p[j] = x[a] * scale - shift if x[a] > -np.inf else -np.inf
                x[a] = -np.inf
                log_mass[j] = log_p[j] + child_log_c[begin + j]
                log_largest = max(log_largest, log_mass[j])
            visited = np.float64(0.0)
            if log_largest > -np.inf:
                for j in range(children):
                    relative[j] = log_mass[j] - log_largest
                for start in range(0, children, _BLOCK):
                    end = min(start + _BLOCK, children)
                    visited += _weigh(relative[start:end], _ZERO, _ONE, mass[start:end])
            log_visited = _log(visited) + log_largest if visited > 0.0 else -np.inf

            # The rest, relative to its own largest.
            top, unvisited = _weigh_row(x, np.float32(scale), weights, blocks, tops)
            log_top = top * scale - shift
            log_unvisited = _log(unvisited) + log_top if unvisited > 0.0 else -np.inf

            larger, smaller = max(log_visited, log_unvisited), min(log_visited, log_unvisited)
            log_h = larger + math.log1p(math.exp(smaller - larger)) if larger > -np.inf else -np.inf
            chosen, token_log_p, token_log_h = 0, -np.inf, 0.0
            if log_h > -np.inf:
                share = math.exp(log_visited - log_h)
                if visited > 0.0 and (uniform < share or share == 1.0):
                    left = uniform / share * visited
                    for j in range(children):
                        if mass[j] > 0.0:  # never past the last that has a mass
                            chosen, token_log_p, token_log_h = child[begin + j], log_p[j], child_log_c[begin + j]
                            if mass[j] > left:
                                break
                        left -= mass[j]
                else:
                    left = (uniform - share) / (1.0 - share) * unvisited
                    block = 0
                    for b in range(len(blocks)):
                        if blocks[b] > 0.0:
                            block = b
                            if blocks[b] > left:
                                break
                        left -= blocks[b]
                    for a in range(block * _BLOCK, min((block + 1) * _BLOCK, vocabulary)):
                        if weights[a] > 0.0:
                            chosen = a
                            if weights[a] > left:
                                break
                        left -= weights[a]
                    token_log_p = x[chosen] * scale - shift

            log_rho = -np.inf
            if log_h > -np.inf:
                log_rho = 0.0 if r == 0 and of_requests[2, s] > 0.0 else log_h - log_used
            alive = log_coin < bank + log_rho
            bank = max(bank + log_rho, 0.0)
            x[:] = -np.inf
            x[chosen if alive else control[otherwise[s]]] = 0.0

            numbers[0, s, r], numbers[1, s, r], numbers[2, s, r] = log_h, log_unvisited, chosen
            numbers[3, s, r], numbers[4, s, r], numbers[5, s, r] = token_log_p, token_log_h, draft_log_p
            numbers[6, s, r], numbers[7, s, r], numbers[8, s, r] = alive, log_rho, bank


def warm_up() -> None:
    """Compiles everything: 4 s once on a machine, then from numba's cache."""
    logits, one = torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.int64)
    row_logsumexp(logits, np.zeros(1, np.int64), np.ones(1, np.float32))
    whole, no = np.zeros((1, 1), np.int64), np.zeros(0, np.int64)
    known = Known(
        whole.astype(np.int32), np.zeros(2, np.int64), no, no.astype(np.float64), np.zeros((3, 1, 1)), np.ones((3, 1)),
        np.zeros((2, 1, 1), np.bool_), whole[0], whole, whole[0],
    )  # fmt: skip
    asap_decide(logits, one, logits[:, :1], one, one[0], known)
