"""DeAL against a loop that does as the paper says, one call after the other."""

import asyncio
import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judged import FACTS, Script, play, request, tokens

from vllm_align_spec.options import DealOptions, OptionError
from vllm_align_spec.rewards import JudgeError
from vllm_align_spec.strategies.base import Chunk
from vllm_align_spec.strategies.deal import DealStrategy, best_token

END = 2


def test_the_score_is_log_probability_and_weighted_heuristics_together():
    assert best_token([-0.1, -2.0], [], []) == 0
    assert best_token([-0.1, -2.0], [[0.0, 1.0]], [1.8]) == 0
    assert best_token([-0.1, -2.0], [[0.0, 1.0]], [2.0]) == 1
    assert best_token([-1.0, -1.0], [[3.0, 3.0]], [1.0]) == 0, "the likeliest on ties"
    assert best_token([-1.0, -1.0], [[0.0, 3.0], [10.0, 0.0]], [4.0, 1.0]) == 1


class Chain(Script):
    """A model whose next-token law is a function of all tokens, deterministic and made up by a seed."""

    def __init__(self, seed, reward):
        super().__init__(None, reward)
        self.seed = seed

    def log_p(self, response):
        rng = random.Random(f"{self.seed} {response}")
        return sorted(((-rng.random() * 3, token) for token in (END, *range(10, 16))), reverse=True)

    def greedy(self, response, most):
        found = []
        while len(found) < most and (not found or found[-1] != END):
            found.append(self.log_p([*response, *found])[0][1])
        return found

    async def candidates(self, prompt, count):
        await asyncio.sleep(0)
        return [(token, log_p) for log_p, token in self.log_p(list(prompt[3:]))[:count]]

    async def generate(self, prompt, *, max_tokens, min_tokens, arguments=None, **more):
        self.calls.append({"max": max_tokens, **more})
        for token in self.greedy(list(prompt[3:]), max_tokens):
            await asyncio.sleep(0)
            yield Chunk([token], None, "stop" if token == END else None)


def by_the_paper(chain, reward, k, ahead, most, weight):
    response = []
    while len(response) < most and END not in response:
        scored = []
        for log_p, token in chain.log_p(response)[:k]:
            seen = [*response, token]
            if token != END:
                seen += chain.greedy(seen, min(ahead, most - len(seen)))
            scored.append((log_p + weight * reward(tuple(seen)), token))
        response.append(max(scored, key=lambda pair: pair[0])[1])
    return response


@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(0, 5), st.integers(1, 9), st.floats(0, 5))
@settings(max_examples=60, deadline=None)
def test_tokens_are_those_of_the_loop_in_the_paper(seed, k, ahead, most, weight):
    def reward(seen):
        return float(random.Random(f"{seed}: {seen}").random())

    chain = Chain(seed, reward)
    made = DealOptions(deal="on", deal_reward="good", deal_top_k=k, deal_lookahead=ahead, deal_weights=weight)
    chunks, notes = play(DealStrategy(), request(made, max_tokens=most, temperature=0.0), chain)
    expected = by_the_paper(chain, reward, k, ahead, most, weight)
    assert tokens(chunks) == expected
    assert [c.finish_reason for c in chunks][-1] == ("stop" if expected[-1] == END else "length")
    assert all(call["temperature"] == 0.0 for call in chain.calls)
    assert notes["judge_calls"] == len(chain.judged)


def test_a_weight_of_nothing_is_greedy_decoding():
    chain = Chain(3, lambda seen: float(len(seen)))
    made = DealOptions(deal="on", deal_weights=0.0, deal_reward="good", deal_lookahead=3)
    chunks, notes = play(DealStrategy(), request(made, max_tokens=6, temperature=0.0), chain)
    assert tokens(chunks) == chain.greedy([], 6)
    assert notes["changed"] == 0


def test_a_failing_judge_is_an_error_or_the_declared_fallback():
    def fails(seen):
        return JudgeError("judge 'good' is gone") if len(seen) > 3 else 0.0

    made = DealOptions(deal="on", deal_reward="good", deal_lookahead=0)
    with pytest.raises(JudgeError):
        play(DealStrategy(), request(made, max_tokens=8, temperature=0.0), Chain(11, fails))
    made = dataclasses.replace(
        request(made.model_copy(update={"deal_fallback": "base"})), max_tokens=8, temperature=0.0
    )
    chain = Chain(11, fails)
    chunks, notes = play(DealStrategy(), made, chain)
    assert tokens(chunks) == chain.greedy([], 8)
    assert DealStrategy().report(notes, [], 8, 8)["fallback_at"] == 3


@pytest.mark.parametrize(
    ("made", "changes", "facts", "says"),
    [
        ({"deal_reward": "none"}, {}, {}, "deal_reward='none' is no judge"),
        ({}, {"temperature": 0.7}, {}, "temperature=0.7 cannot be combined with deal, .* accepted: temperature=0"),
        ({"deal_top_k": 21}, {}, {}, "deal_top_k=21 is more than this engine tells; accepted: at most 20"),
        ({}, {}, {"scores_are_logprobs": False}, "--logprobs-mode"),
        ({}, {"logprobs": True}, {}, "logprobs=True cannot be combined"),
        ({}, {"ignore_eos": True}, {}, "ignore_eos=True cannot be combined"),
        ({}, {"min_tokens": 3}, {}, "min_tokens=3 cannot be combined"),
        ({}, {"bends": {"logit_bias=True": "drop it"}}, {}, "logit_bias=True cannot be combined with deal"),
        ({"deal_weights": [1.0, 2.0]}, {}, {}, "deal_weights"),
    ],
)
def test_what_cannot_be_honoured_is_refused(made, changes, facts, says):
    options = DealOptions(**({"deal": "on", "deal_reward": "good"} | made))
    asked = request(options, **({"temperature": 0.0} | changes))
    with pytest.raises(OptionError, match=says):
        DealStrategy().admit(asked, dataclasses.replace(FACTS, **facts))
