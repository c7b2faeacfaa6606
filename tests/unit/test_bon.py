"""Best-of-N and its calibration, against what the definitions say."""

import asyncio
import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judged import FACTS, Script, play, request, segment

from vllm_align_spec.options import BonOptions, OptionError
from vllm_align_spec.rewards import JudgeError
from vllm_align_spec.strategies.bon import BonStrategy, calibrated

WORDS = range(10, 30)


def law(_):
    return [(1.0, segment(word, 2, finish="stop")) for word in WORDS]


def reward(response):
    return float(random.Random(response[0]).randrange(8)) if response else 0.0


def options(n, **more):
    return BonOptions(bon=n, bon_reward=["good"], **more)


def run(n, *, script=None, seed=1, **more):
    script = script or Script(law, reward)
    chunks, notes = play(BonStrategy(), request(options(n, **more), seed=seed), script)
    assert len(chunks) == 1
    return chunks[0], notes, script


# Calibration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("r", "reference", "expected"),
    [(1.0, [0.0], 1.0), (0.0, [1.0], 0.0), (0.0, [0.0], 0.5), (2.0, [1, 2, 2, 3], 0.5), (9.0, [1, 2, 3, 9], 0.875)],
)
def test_a_calibrated_reward_is_the_share_that_it_beats(r, reference, expected):
    assert calibrated(r, reference) == expected


@given(st.lists(st.floats(-10, 10), min_size=1), st.floats(-10, 10), st.floats(-10, 10), st.floats(0.1, 10))
@settings(deadline=None)
def test_calibration_is_monotone_bounded_and_forgets_the_judges_scale(reference, a, b, scale):
    low, high = sorted((a, b))
    assert 0 <= calibrated(low, reference) <= calibrated(high, reference) <= 1
    doubled = [2 * r for r in reference]
    assert calibrated(2 * a, doubled) == calibrated(a, reference)


# Choice -------------------------------------------------------------------------------------------------------------


def test_one_judge_takes_the_best_of_n_the_earliest_on_ties():
    for seed in range(20):
        chunk, notes, script = run(8, seed=seed)
        sampled = [sample for _, sample in script.judged]
        rewards = [reward(sample) for sample in sampled]
        order = [sample["rewards"][0] for sample in notes["samples"]]
        assert sorted(order) == sorted(rewards)
        assert notes["taken"] == order.index(max(order))
        assert reward(chunk.token_ids) == max(rewards)


@pytest.mark.parametrize("reference", [1, 5, 20])
def test_calibration_of_one_judge_without_a_stop_changes_nothing(reference):
    for seed in range(20):
        plain = run(6, seed=seed)[1]["samples"]
        _, notes, script = run(6, seed=seed, bon_reference=reference, bon_parallel=3)
        rewards = [sample["rewards"][0] for sample in notes["samples"]]
        assert notes["taken"] == rewards.index(max(rewards))
        assert len(script.judged) == reference + 6
        assert len(plain) == len(notes["samples"]) == 6


def test_n_1_is_what_the_request_would_have_brought_anyway():
    _, _, script = run(1, seed=5)
    (call,) = script.calls
    assert call["seed"] is None, "the choice's own seed"
    assert call.get("temperature") is None
    assert call["arguments"] is None


def test_a_sample_that_is_good_enough_is_taken_at_once_whoever_finishes_first():
    for seed in range(10):
        slow = Script(law, reward, slow=lambda chunks: chunks[0].token_ids[0])
        _, notes, _ = run(12, seed=seed, script=slow, bon_reference=8, bon_stop=0.75, bon_parallel=6)
        one_by_one = run(12, seed=seed, bon_reference=8, bon_stop=0.75, bon_parallel=1)[1]
        assert notes["samples"] == one_by_one["samples"]
        assert notes["taken"] == one_by_one["taken"]
        scores = [sample["score"] for sample in notes["samples"]]
        if notes["stopped"]:
            assert scores[-1] >= 0.75
            assert max(scores[:-1], default=0) < 0.75
        else:
            assert len(scores) == 12 or scores[-1] >= 0.75


def test_several_judges_add_up_by_their_weights():
    class Two(Script):
        async def judge(self, name, responses):
            rewards = await super().judge(name, responses)
            return rewards if name == "good" else [100.0 - 10 * r for r in rewards]

    asked = BonOptions(bon=6, bon_reward=["good", "other"], bon_weights=[1.0, 0.5])
    _, notes = play(BonStrategy(), request(asked, seed=3), Two(law, reward))
    for sample in notes["samples"]:
        good, other = sample["rewards"]
        assert sample["score"] == pytest.approx(good + 0.5 * other)
    asked = BonOptions(bon=6, bon_reward=["good", "other"], bon_weights=[1.0, 0.5], bon_reference=4)
    _, notes = play(BonStrategy(), request(asked, seed=3), Two(law, reward))
    assert all(0 <= sample["score"] <= 1.5 for sample in notes["samples"])


def test_no_more_samples_are_under_way_than_asked_for():
    _, _, script = run(12, bon_parallel=3)
    assert script.most_open == 3


def test_a_stop_string_ends_a_sample_early():
    script = Script(
        lambda _: [(1.0, [*segment(10, 11, 12), *segment(13, finish="length")])],
        stop=lambda r: 2 if len(r) > 1 else None,
    )
    chunk, _, _ = run(2, script=script)
    assert (chunk.token_ids, chunk.finish_reason) == ([10, 11], None)
    assert [r for _, r in script.judged] == [[10, 11]] * 2


def test_a_failing_judge_is_an_error_or_the_first_sample():
    def fails(response):
        return JudgeError("judge 'good' is gone")

    with pytest.raises(JudgeError):
        run(4, script=Script(law, fails))
    chunk, notes, _ = run(4, script=Script(law, fails), bon_fallback="first", seed=2)
    assert chunk.token_ids == run(1, seed=2)[0].token_ids
    assert BonStrategy().report(notes, [], 2, 2)["reason"] == "failed"


@pytest.mark.parametrize(
    ("made", "changes", "says"),
    [
        ({"bon_reward": ["none"]}, {}, "bon_reward='none' is no judge"),
        ({"bon_reward": ["good", "good"]}, {}, "names a judge twice"),
        ({"bon_weights": [1.0, 2.0]}, {}, r"bon_weights=\[1.0, 2.0\] is not accepted; accepted: 1 numbers"),
        ({}, {"temperature": 0.0}, "temperature=0 makes all samples of bon=4 the same"),
        ({"bon_stop": 0.5}, {}, "bon_stop=0.5 is a share of the reference"),
        ({}, {"bends": {"prompt_logprobs=1": "drop it"}}, "prompt_logprobs=1 cannot be combined with bon"),
    ],
)
def test_what_cannot_be_honoured_is_refused(made, changes, says):
    asked = request(BonOptions(**({"bon": 4, "bon_reward": ["good"]} | made)), **changes)
    with pytest.raises(OptionError, match=says):
        BonStrategy().admit(asked, FACTS)


def test_what_bends_each_sample_alike_is_no_obstacle():
    bends = {"presence_penalty=0.5": "", "logit_bias=True": "", "bad_words=['x']": ""}
    BonStrategy().admit(request(options(4), bends=bends), FACTS)
    BonStrategy().admit(request(options(1), temperature=0.0), FACTS)
    BonStrategy().admit(request(BonOptions(bon=2)), dataclasses.replace(FACTS, rewards=("good",)))


def test_leaving_early_cancels_every_sample():
    script = Script(law, reward, slow=lambda chunks: 100)

    async def leave():
        generator = BonStrategy().run(request(options(8), seed=0), script, {})
        task = asyncio.ensure_future(anext(generator))
        for _ in range(10):
            await asyncio.sleep(0)
        assert script.open == 8
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    assert script.open == 0
