"""Triton kernels behind `rows`, `asap` and `cards`: one pass over a row, no copy of the logits, no synchronisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl

from vllm_align_spec.processors.rows import mask, send

if TYPE_CHECKING:
    from vllm_align_spec.processors.asap import Known

_BLOCK = 4096
_CHILDREN = 512

# Where a running maximum starts. Finite, so that a row that begins with masked tokens does not produce inf - inf.
_LOWEST = tl.constexpr(-3.0e38)
# Behind every position.
_NONE = tl.constexpr(2**31 - 1)

# Kernels are compiled anew for numbers that are 1 or divisible by 16, and for tensors by how they are aligned. No step
# shall wait for that because it has another number of rows than those before it.
_VARYING = ["width"]
_VIEWS = ["index_ptr", "scale_ptr", "unmasked_ptr", "only_ends_ptr", "no_ends_ptr", "uniform_ptr", "draft_ptr"]


@triton.jit
def _add(top, total, x):  # type: ignore[no-untyped-def]
    # (top, total), which stand for log(total * e^top), and the block x, which stands for its sum of e^x.
    new_top = tl.maximum(top, tl.max(x, axis=0))
    return new_top, total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), axis=0)


@triton.jit
def _token_logprobs_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, stride, index_ptr, token_ptr, out_ptr, vocab_size, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    line = tl.load(index_ptr + row)
    token = tl.load(token_ptr + row)
    base = logits_ptr + line * stride
    top = tl.full((), _LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab_size, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        x = tl.load(base + offset, mask=offset < vocab_size, other=float("-inf")).to(tl.float32)
        top, total = _add(top, total, x)
    chosen = tl.load(base + tl.maximum(token, 0)).to(tl.float32)
    tl.store(out_ptr + row, tl.where(token >= 0, chosen - top - tl.log(total), float("-inf")))


@triton.jit
def _logsumexp_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, stride, line_ptr, scale_ptr, out_ptr, vocab_size, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    base = logits_ptr + tl.load(line_ptr + row) * stride
    scale = tl.load(scale_ptr + row)
    top = tl.full((), _LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab_size, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        x = tl.load(base + offset, mask=offset < vocab_size, other=float("-inf")).to(tl.float32) * scale
        top, total = _add(top, total, x)
    tl.store(out_ptr + row, top + tl.log(total))


@triton.jit
def _entropy_kernel(logits_ptr, stride, index_ptr, out_ptr, vocab_size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    base = logits_ptr + tl.load(index_ptr + row) * stride
    # With x measured from the top so far: total = sum e^x, product = sum x e^x.
    top = tl.full((), _LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    product = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab_size, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        x = tl.load(base + offset, mask=offset < vocab_size, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, axis=0))
        shift = top - new_top
        x = tl.where(x == float("-inf"), _LOWEST, x - new_top)
        weight = tl.exp(x)
        product = tl.exp(shift) * (product + shift * total) + tl.sum(tl.where(weight > 0, x * weight, 0.0), axis=0)
        total = tl.exp(shift) * total + tl.sum(weight, axis=0)
        top = new_top
    tl.store(out_ptr + row, tl.log(total) - product / total)


@triton.jit
def _force_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, stride, index_ptr, where_ptr, token_ptr, vocab_size, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    if tl.load(where_ptr + row) != 0:
        token = tl.load(token_ptr + row)
        offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        target = logits_ptr + tl.load(index_ptr + row) * stride + offset
        tl.store(target, tl.where(offset == token, 0.0, float("-inf")), mask=offset < vocab_size)


# `asap_draw`. Visited children are struck out in a bitmap of their row of the grid [S, L], not in the logits: several
# rows may share a line (a request with fewer than L rows repeats its last one), and a line is only ever read.


@triton.jit
def _law(  # type: ignore[no-untyped-def]
    row, logits_ptr, stride, index_ptr, width, scale_ptr, unmasked_ptr, ends_ptr, ends, only_ends_ptr, no_ends_ptr
):
    # What makes a log probability of a logit of this row.
    return (
        logits_ptr + tl.load(index_ptr + row) * stride,
        tl.load(scale_ptr + row // width).to(tl.float32),
        tl.load(unmasked_ptr + row).to(tl.float32),
        ends_ptr + row // width * ends,
        ends,
        tl.load(only_ends_ptr + row),
        tl.load(no_ends_ptr + row),
    )


@triton.jit
def _log_p(law, token, inside):  # type: ignore[no-untyped-def]
    # log P of the tokens, which are not negative; -inf where they are illegal.
    base, scale, unmasked, ends_ptr, ends, only_ends, no_ends = law
    x = tl.load(base + token, mask=inside, other=float("-inf")).to(tl.float32)
    # A row of -inf alone has a log-sum-exp of -inf too.
    log_p = tl.where(x == float("-inf"), x, x * scale - unmasked)
    if (only_ends | no_ends) != 0:
        is_end = token < 0
        for j in range(ends):
            is_end = is_end | (token == tl.load(ends_ptr + j))
        log_p = tl.where(tl.where(is_end, no_ends == 0, only_ends == 0), log_p, float("-inf"))
    return log_p


@triton.jit
def _unvisited(law, row, start, offsets_ptr, visited_ptr, vocab_size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # log P of the block's tokens; -inf where they are illegal or visited.
    token = start + tl.arange(0, BLOCK)
    inside = token < vocab_size
    log_p = _log_p(law, token, inside)
    if tl.load(offsets_ptr + row) < tl.load(offsets_ptr + row + 1):
        words = tl.load(visited_ptr + row * tl.cdiv(vocab_size, 32) + token // 32, mask=inside, other=0)
        log_p = tl.where(((words >> (token % 32)) & 1) != 0, float("-inf"), log_p)
    return log_p


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_VIEWS)
def _asap_children_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, stride, index_ptr, width, scale_ptr, unmasked_ptr, ends_ptr, ends, only_ends_ptr, no_ends_ptr,
    offsets_ptr, child_ptr, child_log_p_ptr, visited_ptr, vocab_size, CHILDREN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    law = _law(
        row, logits_ptr, stride, index_ptr, width, scale_ptr, unmasked_ptr, ends_ptr, ends, only_ends_ptr, no_ends_ptr
    )
    end = tl.load(offsets_ptr + row + 1)
    for start in range(tl.load(offsets_ptr + row), end, CHILDREN):
        j = start + tl.arange(0, CHILDREN)
        inside = j < end
        token = tl.load(child_ptr + j, mask=inside, other=0)
        tl.store(child_log_p_ptr + j, _log_p(law, token, inside), mask=inside)
        word = visited_ptr + row * tl.cdiv(vocab_size, 32) + token // 32
        tl.atomic_or(word, (1 << (token % 32)).to(tl.int32), mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_VIEWS)
def _asap_blocks_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, stride, index_ptr, width, scale_ptr, unmasked_ptr, ends_ptr, ends, only_ends_ptr, no_ends_ptr,
    offsets_ptr, visited_ptr, block_ptr, vocab_size, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    law = _law(
        row, logits_ptr, stride, index_ptr, width, scale_ptr, unmasked_ptr, ends_ptr, ends, only_ends_ptr, no_ends_ptr
    )
    x = _unvisited(law, row, tl.program_id(1) * BLOCK, offsets_ptr, visited_ptr, vocab_size, BLOCK)
    top, total = _add(tl.full((), _LOWEST, tl.float32), tl.full((), 0.0, tl.float32), x)
    tl.store(block_ptr + row * tl.num_programs(1) + tl.program_id(1), top + tl.log(total))


@triton.jit
def _pick(mass, at, target):  # type: ignore[no-untyped-def]
    # The first of the entries whose running sum exceeds the target, and the last one of all that have mass: rounding
    # may leave none to exceed it. A parallel running sum need not be monotone, so entries without mass are excluded.
    has_mass = mass > 0
    first = tl.min(tl.where(has_mass & (tl.cumsum(mass, axis=0) > target), at, _NONE), axis=0)
    return first, tl.max(tl.where(has_mass, at, 0), axis=0)


@triton.jit
def _visited(child_log_p_ptr, child_log_c_ptr, j, end):  # type: ignore[no-untyped-def]
    # log P h of the children j.
    log_p = tl.load(child_log_p_ptr + j, mask=j < end, other=float("-inf"))
    return log_p + tl.load(child_log_c_ptr + j, mask=j < end, other=float("-inf")).to(tl.float32)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_VIEWS)
def _asap_draw_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, stride, index_ptr, width, scale_ptr, unmasked_ptr, ends_ptr, ends, only_ends_ptr, no_ends_ptr,
    offsets_ptr, visited_ptr, block_ptr, blocks, child_ptr, child_log_p_ptr, child_log_c_ptr, uniform_ptr, draft_ptr,
    number_ptr, token_ptr, vocab_size, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, CHILDREN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    law = _law(
        row, logits_ptr, stride, index_ptr, width, scale_ptr, unmasked_ptr, ends_ptr, ends, only_ends_ptr, no_ends_ptr
    )

    b = tl.arange(0, BLOCKS)
    block = tl.load(block_ptr + row * blocks + b, mask=b < blocks, other=float("-inf"))
    top, total = _add(tl.full((), _LOWEST, tl.float32), tl.full((), 0.0, tl.float32), block)
    log_unvisited = top + tl.log(total)

    begin = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    top = tl.full((), _LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(begin, end, CHILDREN):
        x = _visited(child_log_p_ptr, child_log_c_ptr, start + tl.arange(0, CHILDREN), end)
        top, total = _add(top, total, x)
    log_visited = top + tl.log(total)

    top = tl.maximum(tl.maximum(log_visited, log_unvisited), _LOWEST)
    log_h = top + tl.log(tl.exp(log_visited - top) + tl.exp(log_unvisited - top))

    token = tl.full((), 0, tl.int64)
    log_p = tl.full((), float("-inf"), tl.float32)
    log_c = tl.full((), 0.0, tl.float64)
    if log_h > float("-inf"):
        visited = tl.exp(log_visited - log_h)
        unvisited = tl.exp(block - log_h)
        both = visited + tl.sum(unvisited, axis=0)
        target = tl.load(uniform_ptr + row).to(tl.float64) * both
        # Each sum that follows is relative to what it is part of, so that its largest entries cannot underflow.
        if (target < visited) | (visited == both):
            inner = (target / visited).to(tl.float32)
            first = tl.full((), _NONE, tl.int64)
            last = tl.full((), 0, tl.int64)
            for start in range(begin, end, CHILDREN):
                j = start + tl.arange(0, CHILDREN)
                mass = tl.exp(_visited(child_log_p_ptr, child_log_c_ptr, j, end) - log_visited)
                first_here, last_here = _pick(mass, j, inner)
                first = tl.minimum(first, first_here)
                last = tl.maximum(last, last_here)
                inner -= tl.sum(mass, axis=0)
            at = tl.where(first < _NONE, first, last)
            token = tl.load(child_ptr + at)
            log_p = tl.load(child_log_p_ptr + at)
            log_c = tl.load(child_log_c_ptr + at).to(tl.float64)
        else:
            target -= visited
            first_block, last_block = _pick(unvisited, b, target)
            chosen = tl.where(first_block < _NONE, first_block, last_block)
            target -= tl.sum(tl.where(b < chosen, unvisited, 0.0), axis=0)
            inner = (target / tl.sum(tl.where(b == chosen, unvisited, 0.0), axis=0)).to(tl.float32)
            log_block = tl.max(tl.where(b == chosen, block, float("-inf")), axis=0)
            x = _unvisited(law, row, chosen * BLOCK, offsets_ptr, visited_ptr, vocab_size, BLOCK)
            i = tl.arange(0, BLOCK)
            first_id, last_id = _pick(tl.exp(x - log_block), i, inner)
            offset = tl.where(first_id < _NONE, first_id, last_id)
            token = (chosen * BLOCK + offset).to(tl.int64)
            log_p = tl.max(tl.where(i == offset, x, float("-inf")), axis=0)

    draft = tl.load(draft_ptr + row)
    tl.store(number_ptr + row, log_h)
    tl.store(number_ptr + rows + row, log_unvisited)
    tl.store(token_ptr + row, token)
    tl.store(number_ptr + 2 * rows + row, log_p)
    tl.store(number_ptr + 3 * rows + row, log_c)
    tl.store(number_ptr + 4 * rows + row, _log_p(law, tl.maximum(draft, 0), draft >= 0))


def token_logprobs(logits: torch.Tensor, index: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """See `rows.token_logprobs`."""
    out = torch.empty(index.shape, dtype=torch.float32, device=logits.device)
    _token_logprobs_kernel[(index.numel(),)](
        logits, logits.stride(0), index.contiguous(), tokens.contiguous(), out, logits.shape[1], BLOCK=_BLOCK
    )
    return out


def row_logsumexp(logits: torch.Tensor, line: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """See `rows.row_logsumexp`."""
    out = torch.empty(line.shape, dtype=torch.float32, device=logits.device)
    _logsumexp_kernel[(line.numel(),)](
        logits, logits.stride(0), line.contiguous(), scale.contiguous(), out, logits.shape[1], BLOCK=_BLOCK
    )
    return out


def row_entropy(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """See `rows.row_entropy`."""
    index = index.contiguous()
    out = torch.empty(index.shape, dtype=torch.float32, device=logits.device)
    _entropy_kernel[(index.numel(),)](logits, logits.stride(0), index, out, logits.shape[1], BLOCK=_BLOCK)
    return out


def force(logits: torch.Tensor, index: torch.Tensor, where: torch.Tensor, tokens: torch.Tensor) -> None:
    """See `rows.force`."""
    vocab_size = logits.shape[1]
    _force_kernel[(index.numel(), triton.cdiv(vocab_size, _BLOCK))](
        logits,
        logits.stride(0),
        index.contiguous(),
        where.to(torch.int32),
        tokens.contiguous(),
        vocab_size,
        BLOCK=_BLOCK,
    )


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
    """Draws one token per row; the first six of `asap.NUMBERS`, the token as int64. Arguments as in `asap.Known`.

    A uniform number walks through the visited children in the order of ``child``, then through all other tokens in the
    order of their ids. Three kernels, each of which begins when the one before it has ended: log P and bitmap of the
    visited children; log mass of the others in every block of the vocabulary; the draw, which reads one block again.
    """
    s, width = index.shape
    vocab_size = logits.shape[1]
    blocks = triton.cdiv(vocab_size, _BLOCK)
    device = logits.device
    row = (
        logits,
        logits.stride(0),
        index.contiguous(),
        width,
        inverse_temperature.contiguous(),
        unmasked.contiguous(),
        ends.contiguous(),
        ends.shape[1],
        only_ends.contiguous().view(torch.uint8),
        no_ends.contiguous().view(torch.uint8),
        offsets.contiguous(),
    )
    child_log_p = torch.empty(child.shape, dtype=torch.float32, device=device)
    words = triton.cdiv(vocab_size, 32) if child.numel() else 0
    visited = torch.zeros(s * width * words, dtype=torch.int32, device=device)
    block = torch.empty(s * width * blocks, dtype=torch.float32, device=device)
    numbers = torch.empty(5, s, width, dtype=torch.float64, device=device)
    token = torch.empty(s, width, dtype=torch.int64, device=device)
    child, child_log_c = child.contiguous(), child_log_c.contiguous()
    if child.numel():
        _asap_children_kernel[(s * width,)](*row, child, child_log_p, visited, vocab_size, CHILDREN=_CHILDREN)
    _asap_blocks_kernel[(s * width, blocks)](*row, visited, block, vocab_size, BLOCK=_BLOCK)
    _asap_draw_kernel[(s * width,)](
        *row,
        visited,
        block,
        blocks,
        child,
        child_log_p,
        child_log_c,
        uniform.contiguous(),
        draft.contiguous(),
        numbers,
        token,
        vocab_size,
        BLOCK=_BLOCK,
        BLOCKS=triton.next_power_of_2(blocks),
        CHILDREN=_CHILDREN,
    )
    log_h, log_unvisited, token_log_p, token_log_h, draft_log_p = numbers
    return log_h, log_unvisited, token, token_log_p, token_log_h, draft_log_p


def asap_decide(
    logits: torch.Tensor,
    index: torch.Tensor,
    unmasked: torch.Tensor,
    draft: torch.Tensor,
    control: torch.Tensor,
    known: Known,
) -> torch.Tensor:
    """See `asap.decide`."""
    device = logits.device
    mask(logits, index, control)
    uniform, log_coin, log_used = send(known.of_rows, device)
    inverse_temperature, log_bank, first = send(known.of_requests, device)
    only_ends, no_ends = send(known.limits, device)
    drawn = asap_draw(
        logits, index, unmasked, inverse_temperature, uniform, draft, send(known.ends, device), only_ends, no_ends,
        send(known.offsets, device), send(known.child, device), send(known.child_log_c, device),
    )  # fmt: skip
    alive, log_rho, log_banks = thin(drawn[0], log_used, first > 0, log_bank, log_coin)
    token = torch.where(alive, drawn[2], control[send(known.otherwise, device)][:, None])
    force(logits, index, send(np.arange(index.shape[1]) < known.rows[:, None], device), token)
    return torch.stack([number.double() for number in (*drawn, alive, log_rho, log_banks)])


def thin(
    log_h: torch.Tensor, log_used: torch.Tensor, first: torch.Tensor, log_bank: torch.Tensor, log_coin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The thinning of `asap.decide`, in torch: L steps over S numbers each.

    Args:
        log_h: [S, L] log H(u).
        log_used: [S, L] log h(u), as used one row before.
        first: [S] bool, whether row 0 is an attempt's first, which is not thinned.
        log_bank: [S] log m before row 0.
        log_coin: [S, L] log of a uniform number each.

    Returns:
        [S, L] bool, [S, L] log rho, [S, L] log m after each row.
    """
    log_rho = torch.where(log_h == -torch.inf, -torch.inf, log_h - log_used)
    log_rho[:, 0] = torch.where(first & (log_h[:, 0] > -torch.inf), 0.0, log_rho[:, 0])
    alive, banks = [], []
    for r in range(log_h.shape[1]):
        with_bank = log_bank + log_rho[:, r]
        alive.append(log_coin[:, r] < with_bank)
        log_bank = with_bank.clamp(min=0.0)
        banks.append(log_bank)
    return torch.stack(alive, 1), log_rho, torch.stack(banks, 1)
