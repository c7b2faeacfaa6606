"""What `kernels` are to a GPU: loops over rows, compiled by numba. Imported when the first request needs them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numba import njit  # type: ignore[import-untyped]

_F = TypeVar("_F", bound=Callable[..., Any])
_Array = np.ndarray[Any, np.dtype[Any]]
_BLOCK = 256
"""Tokens whose mass is summed before one of them is looked for."""


def jit(function: _F, **options: Any) -> _F:
    """The compiled function, from the cache on disk if it is there."""
    try:
        return cast(_F, njit(cache=True, nogil=True, **options)(function))
    except RuntimeError:  # no folder to cache in can be written to, as in containers with a read-only root
        return cast(_F, njit(nogil=True, **options)(function))


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
    x = logits.index_select(0, index.reshape(-1)).float()
    scale = inverse_temperature.double().repeat_interleave(width)
    shift = unmasked.reshape(-1).double()
    edges = (offsets.numpy(), child.numpy())
    child_log_p = np.empty(len(child))
    # log H, log unvisited, log P and log h of the token, log P of the draft
    numbers = np.empty((5, s * width))
    token = np.empty(s * width, np.int64)
    rules = (ends.numpy(), only_ends.reshape(-1).numpy(), no_ends.reshape(-1).numpy())
    drafts = draft.reshape(-1).numpy()
    _strike(x.numpy(), *rules, drafts, scale.numpy(), shift.numpy(), *edges, child_log_p, numbers[4])
    # The rest of each row, relative to its largest entry.
    top = x.amax(1).clamp(min=torch.finfo(torch.float32).min)
    x.sub_(top[:, None]).mul_(scale.float()[:, None]).exp_()
    log_top = top.double() * scale - shift
    uniforms = uniform.reshape(-1).numpy()
    _draw(x.numpy(), log_top.numpy(), uniforms, *edges, child_log_p, child_log_c.numpy(), numbers, token)
    log_h, log_unvisited, token_log_p, token_log_h, draft_log_p = torch.from_numpy(numbers).view(5, s, width)
    return log_h, log_unvisited, torch.from_numpy(token).view(s, width), token_log_p, token_log_h, draft_log_p


@jit
def _strike(
    x: _Array,
    ends: _Array,
    only_ends: _Array,
    no_ends: _Array,
    draft: _Array,
    scale: _Array,
    unmasked: _Array,
    offsets: _Array,
    child: _Array,
    child_log_p: _Array,
    draft_log_p: _Array,
) -> None:
    """Leaves in each row the legal tokens that were not visited; log P of the draft, and of the visited children."""
    width = len(x) // len(ends)
    for i in range(len(x)):
        row, of_ends = x[i], ends[i // width]
        if only_ends[i]:
            kept = np.full(len(of_ends), -np.inf, x.dtype)
            for j in range(len(of_ends)):
                if 0 <= of_ends[j] < len(row):  # an end token of the configuration may lie outside of the vocabulary
                    kept[j] = row[of_ends[j]]
            row[:] = -np.inf
            for j in range(len(of_ends)):
                if 0 <= of_ends[j] < len(row):
                    row[of_ends[j]] = kept[j]
        if no_ends[i]:
            for j in range(len(of_ends)):
                if 0 <= of_ends[j] < len(row):
                    row[of_ends[j]] = -np.inf
        draft_log_p[i] = -np.inf
        if draft[i] >= 0 and row[draft[i]] > -np.inf:
            draft_log_p[i] = row[draft[i]] * scale[i] - unmasked[i]
        for j in range(offsets[i], offsets[i + 1]):
            child_log_p[j] = -np.inf
            if row[child[j]] > -np.inf:
                child_log_p[j] = row[child[j]] * scale[i] - unmasked[i]
                row[child[j]] = -np.inf


def _sum(values: _Array) -> float:
    total = 0.0
    for value in values:
        total += value
    return total


_sum = jit(_sum, fastmath={"reassoc"})


@jit
def _log(value: float) -> float:
    return math.log(value) if value > 0.0 else -np.inf


@jit
def _draw(
    weights: _Array,
    log_top: _Array,
    uniform: _Array,
    offsets: _Array,
    child: _Array,
    child_log_p: _Array,
    child_log_c: _Array,
    numbers: _Array,
    token: _Array,
) -> None:
    """Draws from each row: its visited children with P h, and ``weights``, the others' P over e^log_top."""
    vocabulary = weights.shape[1]
    blocks, mass = np.empty((vocabulary + _BLOCK - 1) // _BLOCK), np.empty(len(child))
    for i in range(len(weights)):
        row = weights[i]
        unvisited = 0.0
        for b in range(len(blocks)):
            blocks[b] = _sum(row[b * _BLOCK : (b + 1) * _BLOCK])
            unvisited += blocks[b]
        log_unvisited = _log(unvisited) + log_top[i] if unvisited > 0.0 else -np.inf

        log_child = -np.inf  # the largest log P h among the children
        for j in range(offsets[i], offsets[i + 1]):
            log_child = max(log_child, child_log_p[j] + child_log_c[j])
        visited = 0.0
        if log_child > -np.inf:
            for j in range(offsets[i], offsets[i + 1]):
                mass[j] = math.exp(child_log_p[j] + child_log_c[j] - log_child)
                visited += mass[j]
        log_visited = _log(visited) + log_child if visited > 0.0 else -np.inf

        larger, smaller = max(log_visited, log_unvisited), min(log_visited, log_unvisited)
        log_h = larger + math.log1p(math.exp(smaller - larger)) if larger > -np.inf else -np.inf
        chosen, log_p, log_c = 0, -np.inf, 0.0
        if log_h > -np.inf:
            share = math.exp(log_visited - log_h)
            if visited > 0.0 and (uniform[i] < share or share == 1.0):
                left = uniform[i] / share * visited
                for j in range(offsets[i], offsets[i + 1]):
                    if mass[j] > 0.0:  # never past the last that has a mass
                        chosen, log_p, log_c = child[j], child_log_p[j], child_log_c[j]
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
                    if row[a] > 0.0:
                        chosen = a
                        if row[a] > left:
                            break
                    left -= row[a]
                log_p = math.log(row[chosen]) + log_top[i]
        numbers[0, i], numbers[1, i], numbers[2, i], numbers[3, i] = log_h, log_unvisited, log_p, log_c
        token[i] = chosen


def warm_up() -> None:
    """Compiles everything: 4 s once on a machine, then from numba's cache."""
    one, no = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool)
    half, flat = torch.full((1, 1), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    asap_draw(torch.zeros(1, 2), one, half, flat, half, one, one, no, no, torch.tensor([0, 1]), one[0], flat)
