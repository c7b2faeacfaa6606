"""What `kernels` are to a GPU: loops over rows, compiled by numba. Imported when the first request needs them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numba import njit  # type: ignore[import-untyped]

_F = TypeVar("_F", bound=Callable[..., Any])
_Array = np.ndarray[Any, np.dtype[Any]]
_BLOCK = 256
"""Tokens whose mass is summed before one of them is looked for."""
_LANES = 16
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


def row_logsumexp(logits: torch.Tensor, line: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """See `rows.row_logsumexp`."""
    x, at = _readable(logits, line)
    out = np.empty(len(at), np.float32)
    _logsumexp(x, at, scale.numpy(), out)
    return torch.from_numpy(out)


def asap_draw(
    logits: torch.Tensor,
    index: torch.Tensor,
    unmasked: torch.Tensor,
    inverse_temperature: torch.Tensor,
    uniform: torch.Tensor,
    draft: torch.Tensor,
    ends: torch.Tensor,
    only_ends: torch.Tensor,
    no_ends: torch.Tensor,
    offsets: torch.Tensor,
    child: torch.Tensor,
    child_log_c: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """See `asap.draw`; the fields of `asap.Drawn`.

    A uniform number walks through the visited children in the order of ``child``, then through all other tokens in the
    order of their ids.
    """
    s, width = index.shape
    x, line = _readable(logits, index.reshape(-1))
    # log H, log unvisited, log P and log h of the token, log P of the draft
    numbers = np.empty((5, s * width))
    token = np.empty(s * width, np.int64)
    _draw(
        x,
        line,
        unmasked.double().reshape(-1).numpy(),
        uniform.reshape(-1).numpy(),
        draft.reshape(-1).numpy(),
        only_ends.reshape(-1).numpy(),
        no_ends.reshape(-1).numpy(),
        inverse_temperature.numpy(),
        ends.numpy(),
        offsets.numpy(),
        child.numpy(),
        child_log_c.numpy(),
        numbers,
        token,
    )
    log_h, log_unvisited, token_log_p, token_log_h, draft_log_p = torch.from_numpy(numbers).view(5, s, width)
    return log_h, log_unvisited, torch.from_numpy(token).view(s, width), token_log_p, token_log_h, draft_log_p


def thin(
    log_h: torch.Tensor, log_used: torch.Tensor, first: torch.Tensor, log_bank: torch.Tensor, log_coin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `asap.thin`."""
    alive = np.empty(log_h.shape, np.bool_)
    numbers = np.empty((2, *log_h.shape))
    _thin(log_h.numpy(), log_used.numpy(), first.numpy(), log_bank.numpy(), log_coin.numpy(), alive, numbers)
    log_rho, banks = torch.from_numpy(numbers)
    return torch.from_numpy(alive), log_rho, banks


def _readable(logits: torch.Tensor, line: torch.Tensor) -> tuple[_Array, _Array]:
    """The lines as contiguous float32, and where they stand in it: without a copy if they are that already."""
    if logits.dtype is torch.float32 and logits.is_contiguous():
        return logits.numpy(), line.contiguous().numpy()
    return logits.index_select(0, line).float().numpy(), np.arange(len(line))


@jit
def _top(x: _Array, best: _Array) -> np.float32:
    """The largest entry, but no less than the lowest finite number; ``best`` is scratch, [_LANES] float32."""
    # One maximum a lane, so that a vector of them is compared at once.
    best[:] = _LOWEST
    whole = len(x) // _LANES * _LANES
    for a in range(0, whole, _LANES):
        for lane in range(_LANES):
            best[lane] = max(best[lane], x[a + lane])
    top = _LOWEST
    for lane in range(_LANES):
        top = max(top, best[lane])
    for a in range(whole, len(x)):
        top = max(top, x[a])
    return top


def _weigh(x: _Array, top: np.float32, scale: np.float32, weights: _Array, power: _Array) -> np.float32:
    """Writes e^(scale (x - top)), at most 1, into ``weights``, and returns their sum; 0 below 2^-126.

    As 2^n 2^f with f in [-1/2, 1/2]: there is no call in the loop, so it is compiled to vector instructions. Relative
    error 2e-7 plus that of the float32 exponent.

    Args:
        x: [n] float32, n at most `_BLOCK`.
        top: not less than any of them.
        weights: [n] float32.
        power: [_BLOCK] int32, scratch.
    """
    base_2 = scale * _LOG2_E
    two_to_n = power.view(np.float32)
    for a in range(len(x)):
        t = max((x[a] - top) * base_2, _UNDERFLOW)
        n = np.int32(t - _HALF)
        f = t - np.float32(n)
        weights[a] = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
        power[a] = (n + 127) << 23  # the bits of the float32 2^n
    total = np.float32(0.0)
    for a in range(len(x)):
        weights[a] *= two_to_n[a]
        total += weights[a]
    return total


_weigh = jit(_weigh, fastmath={"reassoc", "contract"})


@jit
def _log(value: float) -> float:
    return -np.inf if value <= 0.0 else math.log(value)


@jit
def _weigh_row(
    x: _Array, scale: np.float32, weights: _Array, blocks: _Array, tops: _Array, best: _Array, power: _Array
) -> tuple[np.float32, float]:
    """A row block by block: `_weigh` relative to its largest entry.

    Args:
        x: [V] float32.
        scale: the inverse temperature.
        weights: [V] float32; where a block has no mass, its entries are not written.
        blocks: [V / _BLOCK, rounded up] float64, the mass of each.
        tops: as many float32, scratch; so are ``best``, [_LANES] float32, and ``power``, [_BLOCK] int32.

    Returns:
        the largest entry and the mass of all.
    """
    top, total = _LOWEST, 0.0
    for b in range(len(blocks)):
        tops[b] = _top(x[b * _BLOCK : (b + 1) * _BLOCK], best)
        top = max(top, tops[b])
    for b in range(len(blocks)):
        blocks[b] = 0.0
        if tops[b] > _LOWEST:  # a grammar often leaves few tokens
            of_block = x[b * _BLOCK : (b + 1) * _BLOCK]
            blocks[b] = _weigh(of_block, top, scale, weights[b * _BLOCK : (b + 1) * _BLOCK], power)
        total += blocks[b]
    return top, total


@jit
def _logsumexp(logits: _Array, line: _Array, scale: _Array, out: _Array) -> None:
    vocabulary = logits.shape[1]
    blocks, tops = (
        np.empty((vocabulary + _BLOCK - 1) // _BLOCK),
        np.empty((vocabulary + _BLOCK - 1) // _BLOCK, np.float32),
    )
    weights, best, power = np.empty(vocabulary, np.float32), np.empty(_LANES, np.float32), np.empty(_BLOCK, np.int32)
    for i in range(len(line)):
        top, total = _weigh_row(logits[line[i]], scale[i], weights, blocks, tops, best, power)
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
def _draw(
    logits: _Array,
    line: _Array,
    unmasked: _Array,
    uniform: _Array,
    draft: _Array,
    only_ends: _Array,
    no_ends: _Array,
    inverse_temperature: _Array,
    ends: _Array,
    offsets: _Array,
    child: _Array,
    child_log_c: _Array,
    numbers: _Array,
    token: _Array,
) -> None:
    """A row is the visited children with P h each, and the tokens that are left with P each."""
    width, vocabulary = len(line) // len(ends), logits.shape[1]
    x, weights = np.empty(vocabulary, np.float32), np.empty(vocabulary, np.float32)
    blocks, tops = (
        np.empty((vocabulary + _BLOCK - 1) // _BLOCK),
        np.empty((vocabulary + _BLOCK - 1) // _BLOCK, np.float32),
    )
    best, power = np.empty(_LANES, np.float32), np.empty(_BLOCK, np.int32)
    most = 0
    for i in range(len(line)):
        most = max(most, offsets[i + 1] - offsets[i])
    log_p, log_mass = np.empty(most), np.empty(most)
    relative, mass = np.empty(most, np.float32), np.empty(most, np.float32)

    for i in range(len(line)):
        scale, shift, begin = inverse_temperature[i // width], unmasked[i], offsets[i]
        x[:] = logits[line[i]]
        _bar(x, ends[i // width], only_ends[i], no_ends[i])
        draft_log_p = -np.inf
        if draft[i] >= 0 and x[draft[i]] > -np.inf:
            draft_log_p = x[draft[i]] * scale - shift

        # The visited children, relative to the one with the largest mass, are taken out of the row.
        children = offsets[i + 1] - begin
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
                visited += _weigh(relative[start:end], _ZERO, _ONE, mass[start:end], power)
        log_visited = _log(visited) + log_largest if visited > 0.0 else -np.inf

        # The rest, relative to its own largest.
        top, unvisited = _weigh_row(x, np.float32(scale), weights, blocks, tops, best, power)
        log_top = top * scale - shift
        log_unvisited = _log(unvisited) + log_top if unvisited > 0.0 else -np.inf

        larger, smaller = max(log_visited, log_unvisited), min(log_visited, log_unvisited)
        log_h = larger + math.log1p(math.exp(smaller - larger)) if larger > -np.inf else -np.inf
        chosen, token_log_p, token_log_h = 0, -np.inf, 0.0
        if log_h > -np.inf:
            share = math.exp(log_visited - log_h)
            if visited > 0.0 and (uniform[i] < share or share == 1.0):
                left = uniform[i] / share * visited
                for j in range(children):
                    if mass[j] > 0.0:  # never past the last that has a mass
                        chosen, token_log_p, token_log_h = child[begin + j], log_p[j], child_log_c[begin + j]
                        if mass[j] > left:
                            break
                    left -= mass[j]
            else:
                left = (uniform[i] - share) / (1.0 - share) * unvisited
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
        numbers[0, i], numbers[1, i], numbers[2, i], numbers[3, i] = log_h, log_unvisited, token_log_p, token_log_h
        numbers[4, i], token[i] = draft_log_p, chosen


@jit
def _thin(
    log_h: _Array,
    log_used: _Array,
    first: _Array,
    log_bank: _Array,
    log_coin: _Array,
    alive: _Array,
    numbers: _Array,
) -> None:
    for s in range(len(log_h)):
        bank = log_bank[s]
        for r in range(log_h.shape[1]):
            log_rho = -np.inf
            if log_h[s, r] > -np.inf:
                log_rho = 0.0 if r == 0 and first[s] else log_h[s, r] - log_used[s, r]
            alive[s, r] = log_coin[s, r] < bank + log_rho
            bank = max(bank + log_rho, 0.0)
            numbers[0, s, r], numbers[1, s, r] = log_rho, bank


def warm_up() -> None:
    """Compiles everything: 4 s once on a machine, then from numba's cache."""
    one, no = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool)
    half, flat = torch.full((1, 1), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    row = torch.zeros(1, 2)
    row_logsumexp(row, one[0], row[0, :1])
    asap_draw(row, one, half, flat, half, one, one, no, no, torch.tensor([0, 1]), one[0], flat)
    thin(half, half, no[0], flat, half)
