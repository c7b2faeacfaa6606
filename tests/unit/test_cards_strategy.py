"""Cascade reward sampling on the request's side: the published formulas, and the law of its parallel form."""

import asyncio
import dataclasses
import functools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judged import FACTS, Script, play, request, segment, tokens
from scipy import stats

from vllm_align_spec.options import CardsOptions, OptionError
from vllm_align_spec.rewards import JudgeError
from vllm_align_spec.strategies import candidates, cards
from vllm_align_spec.strategies.base import Chunk
from vllm_align_spec.strategies.candidates import Seeds
from vllm_align_spec.strategies.cards import CardsStrategy, acceptance, threshold


def options(**more):
    return CardsOptions(**({"cards": "on", "cards_threshold": 2.0, "cards_reward": "good"} | more))


# Formulas -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "expected"), [(0, 5.25), (64, 6.875), (128, 8.5), (256, 8.5)])
def test_the_threshold_rises_from_between_to_its_target_and_no_further(length, expected):
    assert threshold(length, prompt_reward=2, target_reward=8.5, alpha=0.5, max_tokens=128) == pytest.approx(expected)


@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(0, 1), st.integers(1, 1000), st.integers(0, 1000))
@settings(deadline=None)
def test_a_threshold_is_never_above_its_target_and_alpha_1_is_the_target(prompt, target, alpha, most, length):
    found = threshold(length, prompt_reward=prompt, target_reward=target, alpha=alpha, max_tokens=most)
    assert found <= target
    always = threshold(length, prompt_reward=prompt, target_reward=target, alpha=1.0, max_tokens=most)
    assert always == pytest.approx(target)


@pytest.mark.parametrize(("reward", "expected"), [(5.0, 1.0), (6.0, 1.0), (1e9, 1.0), (4.3, math.exp(-1)), (-1e9, 0.0)])
def test_acceptance_is_certain_at_the_threshold_and_falls_by_e_with_each_beta_below(reward, expected):
    assert acceptance(reward, 5.0, 0.7) == pytest.approx(expected)


# The law ------------------------------------------------------------------------------------------------------------

Q = {(10, 11, 12, 13): 0.5, (20, 21, 22, 23): 0.3, (30, 31, 32, 33): 0.15, (40, 41, 42, 43): 0.05}
REWARDS = {(): -1.0, **dict(zip(Q, (-1.0, 0.2, 1.0, 2.5), strict=True))}
TRIES, BETA, TARGET = 4, 0.7, 0.5


def one_segment(_):
    return [(q, segment(*s)) for s, q in Q.items()]


def law(tries=TRIES):
    """q a (1 - R) / a^ + R P(best of the rejected and one fresh)."""
    tau = threshold(4, prompt_reward=-1.0, target_reward=TARGET, alpha=0.5, max_tokens=4)
    a = {s: acceptance(REWARDS[s], tau, BETA) for s in Q}
    mean = sum(q * a[s] for s, q in Q.items())
    rest = (1 - mean) ** (tries - 1)
    below, rejected, last = 0.0, 0.0, 0.0
    found = {}
    for s in sorted(Q, key=REWARDS.__getitem__):
        rejected += Q[s] * (1 - a[s]) / (1 - mean)
        last += Q[s]
        best = rejected ** (tries - 1) * last
        found[s] = Q[s] * a[s] * (1 - rest) / mean + rest * (best - below)
        below = best
    assert sum(found.values()) == pytest.approx(1)
    return found


def sample(count, width, **more):
    script = Script(one_segment, REWARDS.__getitem__, slow=lambda chunks: 40 - chunks[0].token_ids[0])
    found = Counter()

    async def run():
        for seed in range(count):
            how = {"cards_threshold": TARGET, "cards_max_tries": TRIES, "cards_candidates": width, **more}
            asked = request(options(**how), max_tokens=4, seed=seed)
            chunks = [chunk async for chunk in CardsStrategy().run(asked, script, {})]
            found[tuple(tokens(chunks))] += 1

    asyncio.run(run())
    return found


def p_value(found, expected):
    count = sum(found.values())
    observed = [found[s] for s in expected]
    assert sum(observed) == count
    assert min(expected.values()) * count >= 8
    return stats.chisquare(observed, [p * count for p in expected.values()]).pvalue


def test_the_law_itself_is_what_tries_one_after_the_other_give():
    # Enumerated: which of the tries is taken, and by which of the two rules.
    tau = threshold(4, prompt_reward=-1.0, target_reward=TARGET, alpha=0.5, max_tokens=4)

    @functools.cache
    def taken(tries_left, best):
        found = Counter()
        for s, q in Q.items():
            now = s if best is None or REWARDS[s] > REWARDS[best] else best
            if tries_left == 1:
                found[now] += q
                continue
            a = acceptance(REWARDS[s], tau, BETA)
            found[s] += q * a
            for other, p in taken(tries_left - 1, now).items():
                found[other] += q * (1 - a) * p
        return found

    for s, p in law().items():
        assert taken(TRIES, None)[s] == pytest.approx(p)


@pytest.mark.parametrize(("width", "count"), [(1, 1200), (3, 5000), (8, 1200)])
def test_candidates_that_are_under_way_at_once_follow_the_law_of_one_after_the_other(width, count):
    assert p_value(sample(count, width), law()) > 1e-4


async def first_to_finish(launch, count, width):
    """A mutant of `in_order`."""
    running, launched = set(), 0
    try:
        while launched < count or running:
            while launched < count and len(running) < width:
                running.add(asyncio.create_task(launch(launched)))
                launched += 1
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()


async def best_of_the_round(launch, count, width):
    """Another: of what is launched together, the judge's favourite first."""
    for first in range(0, count, width):
        found = await asyncio.gather(*(launch(i) for i in range(first, min(count, first + width))))
        for one in sorted(found, key=lambda candidate: -candidate.reward):
            yield one


def one_uniform_for_all(self, *name):
    return Seeds.integer(self, name[0], "uniform") / 2**62


def one_seed_for_all(self, *name):
    return hash((self._seed, name[0])) % 2**62


@pytest.mark.parametrize(
    ("module", "name", "mutant"),
    [
        (cards, "in_order", first_to_finish),
        (cards, "in_order", best_of_the_round),
        (candidates.Seeds, "uniform", one_uniform_for_all),
        (candidates.Seeds, "integer", one_seed_for_all),
        (cards, "acceptance", lambda reward, tau, beta: float(reward >= tau)),
    ],
    ids=["first to finish", "best of the round", "one uniform", "one seed", "hard threshold"],
)
def test_the_same_test_rejects_mutants(monkeypatch, module, name, mutant):
    monkeypatch.setattr(module, name, mutant)
    assert p_value(sample(5000, 4), law()) < 1e-4


def test_with_one_try_segments_are_the_models_own():
    assert p_value(sample(400, 1, cards_max_tries=1), Q) > 1e-4


# One request --------------------------------------------------------------------------------------------------------


def test_seeds_are_distinct_and_follow_from_the_requests():
    def seeds(seed):
        script = Script(one_segment, lambda response: -100.0)
        play(CardsStrategy(), request(options(), max_tokens=8, seed=seed), script)
        return [call["seed"] for call in script.calls]

    assert seeds(1) == seeds(1)
    assert len(set(seeds(1))) == 42
    assert not set(seeds(1)) & set(seeds(2))
    assert not set(seeds(None)) & set(seeds(None))


def test_the_last_try_takes_the_best_so_far_and_the_earliest_on_ties():
    script = Script(one_segment, lambda response: -50.0 if not response else -float(response[0] == 10))
    chunks, notes = play(CardsStrategy(), request(options(cards_threshold=1e6), max_tokens=4, seed=4), script)
    best = next(r for _, r in script.judged if r and r[0] != 10)
    assert tokens(chunks) == best
    assert notes["candidates"] == {"accepted": 0, "best": 1, "rejected": 20, "surplus": 0}
    assert notes["segments"][0]["tries"] == 21


def test_segments_are_resubmitted_as_joined_tokens_and_leave_one_by_one():
    script = Script(one_segment, lambda response: 1e9)
    chunks, notes = play(CardsStrategy(), request(options(cards_candidates=1), max_tokens=12, seed=0), script)
    out = []
    for call, chunk in zip(script.calls, chunks, strict=True):
        assert call["prompt"] == [5, 6, 7, *out]
        assert call["max"] == 12 - len(out)
        assert call["arguments"] == {"cards": "on", "cards_entropy": 3.0}
        assert (call["temperature"], call["top_k"]) == (0.7, 40)
        out += chunk.token_ids
    assert notes["judge_calls"] == len(script.judged) == len(chunks) + 1
    assert [r for _, r in script.judged if not r] == [[]], "the prompt is judged once"


def test_a_segment_is_at_most_64_tokens_and_never_beyond_max_tokens():
    def endless(_):
        return [(1.0, segment(*range(10, 10 + most), finish="length"))]

    most = 64
    most_of = []

    class Bounded(Script):
        def generate(self, prompt, *, max_tokens, **more):
            nonlocal most
            most = max_tokens
            most_of.append(max_tokens)
            return super().generate(prompt, max_tokens=max_tokens, **more)

    script = Bounded(endless, lambda response: 1e9)
    chunks, _ = play(CardsStrategy(), request(options(cards_candidates=1), max_tokens=150), script)
    assert most_of == [64, 64, 22]
    assert len(tokens(chunks)) == 150
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "length"]


def test_an_end_of_sequence_ends_the_response():
    script = Script(lambda _: [(1.0, [Chunk([10, 2], None, "stop")])], lambda response: 1e9)
    chunks, _ = play(CardsStrategy(), request(options()), script)
    assert [(c.token_ids, c.finish_reason, c.stop_reason) for c in chunks] == [([10, 2], "stop", None)]


def test_a_rejected_end_of_sequence_does_not():
    def either(_):
        return [(0.5, [Chunk([2], None, "stop")]), (0.5, segment(10, 11, 12, 13))]

    script = Script(either, lambda response: -1e9 if response == (2,) else 1e9)
    chunks, _ = play(CardsStrategy(), request(options(cards_candidates=3), max_tokens=8, seed=1), script)
    assert tokens(chunks) == [10, 11, 12, 13] * 2


def test_what_follows_a_stop_string_is_neither_judged_nor_sent():
    script = Script(one_segment, lambda response: 1e9, stop=lambda response: 3 if len(response) >= 3 else None)
    chunks, _ = play(CardsStrategy(), request(options(cards_candidates=1), max_tokens=7, seed=0), script)
    assert len(chunks[0].token_ids) == 3
    assert [len(r) for _, r in script.judged] == [0, 3, 7]
    assert chunks[0].finish_reason is None, "vLLM's own detokenizer finds the stop string, or the response goes on"


def test_a_failing_judge_is_an_error_or_the_declared_fallback():
    def fails(response):
        return JudgeError("judge 'good' is gone") if len(response) > 4 else 1e9

    with pytest.raises(JudgeError, match="is gone"):
        play(CardsStrategy(), request(options(), seed=0), Script(one_segment, fails))

    def then(response):
        return one_segment(response) if len(response) < 4 else [(1.0, [Chunk([60, 61], None, "length")])]

    script = Script(then, fails)
    chunks, notes = play(CardsStrategy(), request(options(cards_fallback="base"), max_tokens=20, seed=0), script)
    assert tokens(chunks)[4:] == [60, 61]
    assert script.calls[-1]["arguments"] is None
    assert script.calls[-1]["max"] == 16
    report = CardsStrategy().report(notes, [], 6, 6)
    assert (report["reason"], report["fallback_at"], report["error"]) == ("failed", 4, "judge 'good' is gone")


def test_leaving_early_cancels_every_candidate():
    script = Script(one_segment, lambda response: 1e9, slow=lambda chunks: 100)

    async def leave():
        generator = CardsStrategy().run(request(options(cards_candidates=5), seed=0), script, {})
        task = asyncio.ensure_future(anext(generator))
        for _ in range(10):
            await asyncio.sleep(0)
        assert script.open == 5
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await generator.aclose()

    asyncio.run(leave())
    assert script.open == 0


# Admission and report -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "facts", "says"),
    [
        ({"cards_reward": "none"}, {}, r"cards_reward='none' is no judge of this engine; accepted: 'good', 'other'"),
        ({"cards_reward": ""}, {}, "cards_reward is missing, and this engine has several judges"),
        ({}, {"rewards": ()}, "cards needs a judge"),
        ({}, {"control_ids": False}, "control ids"),
        ({}, {"rejection_method": "synthetic"}, "rejection_sample_method='synthetic'"),
        ({}, {"shards_sampling": True}, "enable_batch_sharded_sampling"),
        ({"min_tokens": 3}, {}, "min_tokens=3 cannot be combined with cards"),
        ({"temperature": 0.0}, {}, "temperature=0 cannot be combined with cards"),
        ({"bends": {"presence_penalty=0.5": "drop it"}}, {}, "presence_penalty=0.5 cannot be combined with cards"),
        ({"truncates": {"top_p=0.5": "send top_p=1"}}, {}, "top_p=0.5 cannot be combined with cards; send top_p=1"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused(changes, facts, says):
    ours = {key: value for key, value in changes.items() if key.startswith("cards_")}
    asked = request(options(**ours), **{key: value for key, value in changes.items() if key not in ours})
    with pytest.raises(OptionError, match=says):
        CardsStrategy().admit(asked, dataclasses.replace(FACTS, **facts))
    CardsStrategy().admit(request(options()), FACTS)
    CardsStrategy().admit(request(options(cards_reward="")), dataclasses.replace(FACTS, rewards=("good",)))


def test_the_report_has_entropies_where_nothing_was_tested():
    script = Script(one_segment, lambda response: 1.0)
    _, notes = play(CardsStrategy(), request(options(cards_max_tries=1), max_tokens=8, seed=0), script)
    workers = [{"entropies": [0.5] * 64}, {"entropies": [1.5] * 64}]
    report = CardsStrategy().report(notes, workers, 8, 8)
    assert report["entropies"] == [0.5] * 4 + [1.5] * 4
    assert [call["reported"] for call in script.calls] == [True, True]
    assert report["prompt_reward"] == 1.0
    assert CardsStrategy().report({}, [], 0, 0) == {}
