"""Offline acceptance: how many tokens a forward pass of the target yields when a drafter drafts greedy chains.

The target's own greedy continuations are written once. A chain's draft is accepted as long as it is what follows there,
and up to that point its inputs are the tokens that follow there, so all chains from all rows are computed at once by
the drafter's unrolled passes (`Drafter.chain`). Walking over the continuation as verification would then counts steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_align_spec.drafters.fspad import Drafter
from vllm_align_spec.train.losses import hits
from vllm_align_spec.train.target import Target

BATCH = 16


@dataclass(frozen=True)
class Acceptance:
    """What was counted."""

    tokens: int
    forwards: int
    accepted: tuple[float, ...]  # share of the forward passes in which the draft at this position was accepted

    @property
    def tokens_per_forward(self) -> float:
        """Mean tokens per forward pass of the target, the prompts' own passes left out."""
        return self.tokens / max(1, self.forwards)


def walk(run: Sequence[int], start: int, end: int) -> list[int]:
    """Accepted drafts of each forward pass of one continuation.

    Args:
        run: for each row, how many drafts of the chain that begins there are accepted.
        start: the row before the first token of the answer.
        end: the number of tokens in all.
    """
    found = []
    row = start
    while row + 2 < end:  # row i drafts from token i + 1 on
        found.append(run[row])
        row += run[row] + 1
    return found


def runs(hit: Tensor) -> Tensor:
    """Accepted drafts of the chain from each row, [B, T], from hits per pass and row, [passes, B, T]."""
    passes = hit.shape[0]
    alive = torch.ones_like(hit[0])
    found = torch.zeros(hit.shape[1:], dtype=torch.long, device=hit.device)
    for j in range(passes):
        # Step j + 1 of the chain from row o is row o + j of pass j + 1.
        alive = alive & torch.nn.functional.pad(hit[j][:, j:], (0, j))
        found += alive
    return found


@dataclass(frozen=True)
class Continuations:
    """Prompts with the target's own greedy answers."""

    sequences: list[list[int]]
    prompt_lengths: list[int]


def continuations(target: Target, prompts: Sequence[list[int]], tokens: int) -> Continuations:
    """Lets the target answer; answers too short to draft in are left out."""
    found = Continuations([], [])
    for start in range(0, len(prompts), BATCH):
        part = list(prompts[start : start + BATCH])
        for prompt, sequence in zip(part, target.greedy(part, tokens), strict=True):
            if len(sequence) >= len(prompt) + 2:
                found.sequences.append(sequence)
                found.prompt_lengths.append(len(prompt))
    return found


@torch.no_grad()
def measure(drafter: Drafter, target: Target, told: Continuations, drafts: int) -> Acceptance:
    """Counts over all continuations.

    Args:
        drafter: in the target's device.
        target: whose features, embedding and head are used.
        told: what the target says.
        drafts: K, draft tokens per forward pass.
    """
    lengths: list[int] = []
    tokens = 0
    for start in range(0, len(told.sequences), BATCH):
        part = told.sequences[start : start + BATCH]
        ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for b, (sequence, prompt) in enumerate(zip(part, told.prompt_lengths[start : start + BATCH], strict=True)):
            ids[b, : len(sequence)] = torch.tensor(sequence)
            mask[b, prompt - 1 : len(sequence) - 2] = True
        ids, mask = ids.to(target.device), mask.to(target.device)
        found = chain_runs(drafter, target, ids, mask, drafts)
        for b, (sequence, prompt) in enumerate(zip(part, told.prompt_lengths[start : start + BATCH], strict=True)):
            steps = walk(found[b].tolist(), prompt - 1, len(sequence))
            lengths += steps
            tokens += len(sequence) - prompt - 1
    shares = tuple(sum(n > j for n in lengths) / max(1, len(lengths)) for j in range(drafts))
    return Acceptance(tokens, len(lengths), shares)


def chain_runs(drafter: Drafter, target: Target, ids: Tensor, mask: Tensor, drafts: int) -> Tensor:
    """Accepted drafts of the chain from each masked row, [B, T]."""
    features = target.features(ids)
    passes = drafter.chain(target.following(ids), features, drafts)
    return runs(torch.stack([hits(p, ids, mask, target.logits, 1) for p, _ in passes]))
