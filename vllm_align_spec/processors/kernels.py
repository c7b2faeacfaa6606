"""Triton kernels behind `rows`: one pass over a row, no copy of the logits, no synchronisation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit
def _token_logprobs_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, stride, index_ptr, token_ptr, out_ptr, vocab_size, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    line = tl.load(index_ptr + row)
    token = tl.load(token_ptr + row)
    base = logits_ptr + line * stride
    # A finite start keeps a row that begins with masked tokens from producing inf - inf.
    top = tl.full((), -3.0e38, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab_size, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        x = tl.load(base + offset, mask=offset < vocab_size, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), axis=0)
        top = new_top
    chosen = tl.load(base + tl.maximum(token, 0)).to(tl.float32)
    tl.store(out_ptr + row, tl.where(token >= 0, chosen - top - tl.log(total), float("-inf")))


@triton.jit
def _logsumexp_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, stride, line_ptr, scale_ptr, out_ptr, vocab_size, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    base = logits_ptr + tl.load(line_ptr + row) * stride
    scale = tl.load(scale_ptr + row)
    top = tl.full((), -3.0e38, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab_size, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        x = tl.load(base + offset, mask=offset < vocab_size, other=float("-inf")).to(tl.float32) * scale
        new_top = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), axis=0)
        top = new_top
    tl.store(out_ptr + row, top + tl.log(total))


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
