"""ARGS as it is published (arXiv 2402.01694, section 2.2), with nothing but transformers: what a served one is held to.

At every step the base model reads the whole sequence, and the judge reads it once for each of the k candidates::

    score(v) = z(v) + w * r([x, v])        over the k largest raw logits z, everything else excluded

The next token is the best of them, or with a temperature T one drawn from softmax(score / T). Unlike the public code it
ends at a stop id, and reads the reward at the candidate's own place, also where that is the padding token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch


@torch.inference_mode()
def args_loop(
    base: Any,
    judge: Any,
    prompt_ids: Sequence[int],
    *,
    weight: float,
    top_k: int,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
) -> list[int]:
    """The response of one prompt, one token after the other and nothing remembered between them.

    Args:
        base: a transformers causal language model.
        judge: a transformers sequence classifier with one label, over the same vocabulary.
        prompt_ids: the prompt, at least one token.
        weight: w; 0 leaves the base model's own choice among its k likeliest.
        top_k: k, candidates of a step.
        max_new_tokens: length of the response at most.
        stop_ids: ids that end it; the one that did is its last.
        temperature: 0 takes the best candidate, otherwise torch's default generator draws one.

    Returns:
        token ids of the response.
    """
    ids = torch.tensor([list(prompt_ids)])
    for _ in range(max_new_tokens):
        z, candidates = base(input_ids=ids, use_cache=False).logits[0, -1].float().topk(top_k)
        rewards = _rewards(judge, torch.cat([ids.expand(top_k, -1), candidates[:, None]], 1))
        score = z + weight * rewards
        chosen = score.argmax() if temperature == 0.0 else (score / temperature).softmax(-1).multinomial(1)[0]
        ids = torch.cat([ids, candidates[chosen].view(1, 1)], 1)
        if int(ids[0, -1]) in stop_ids:
            break
    response: list[int] = ids[0, len(prompt_ids) :].tolist()
    return response


def _rewards(judge: Any, ids: torch.Tensor) -> torch.Tensor:
    """[k] rewards at the last token of each row of [k, length]."""
    hidden = judge.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
    rewards: torch.Tensor = judge.score(hidden)[:, 0].float()
    return rewards
