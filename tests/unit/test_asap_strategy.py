"""ASAp on the request's side, with a script instead of the engine."""

import asyncio
import dataclasses
import math
import re

import pytest

from vllm_align_spec.options import MAX_STOP_IDS, AsapOptions, OptionError
from vllm_align_spec.strategies.asap import AsapStrategy, attempt_seed, likelihood, trie_key
from vllm_align_spec.strategies.base import Chunk, EngineFacts, Request, StrategyError

REQUEST = Request(
    options=(AsapOptions(asap="exact", asap_max_attempts=5),),
    prompt_token_ids=[5, 6, 7],
    prompt_text="a prompt",
    messages=None,
    max_tokens=20,
    min_tokens=2,
    room=100,
    stop_token_ids=[2, 3],
    temperature=0.8,
    seed=11,
    grammar='{"regex": "[01]+"}',
    scope="salt",
)
ENGINE = EngineFacts(
    draft_method="eagle",
    draft_sampling="greedy",
    rejection_method="standard",
    fixed_draft_length=True,
    shards_sampling=False,
    scores_are_logprobs=True,
    pilot=False,
    control_ids=True,
    reasoning=False,
)
ABANDONED = (Chunk([8], ["a"]), Chunk([9], ["b"], control="abandon"))
ACCEPTED = (Chunk([10, 11], ["c", "d"]), Chunk([], []), Chunk([2], ["e"], "stop", 2, source="the engine's own"))


def asap(mode, request=REQUEST, attempts=5, **changes):
    return dataclasses.replace(request, options=(AsapOptions(asap=mode, asap_max_attempts=attempts),), **changes)


def worker(state="rejected", log_h0=-1.0, log_v=None, root=-2.0, **more):
    """What `processors.asap` reports of one attempt."""
    return {
        "state": state,
        "rows": 3,
        "log_h0": log_h0,
        "log_v": log_v,
        "log_bank": 0.0,
        "log_mass_at_root": root,
        "nodes_added": 2,
        "host_ms": 1.5,
        "store": {"nodes": 9, "bytes": 432, "evictions": 0, "host_seconds": 0.1},
        **more,
    }


class Script:
    """Plays one attempt after the other; the last one over and over."""

    def __init__(self, *attempts, reports=()):
        self.attempts, self.reports = attempts, reports
        self.calls, self.closed, self.log = [], 0, []

    async def generate(
        self, prompt_token_ids, *, max_tokens, min_tokens, arguments=None, seed=None, drawn=False, whole=False
    ):
        assert self.closed == len(self.calls), "an attempt began while another ran"
        self.calls.append(
            {"prompt": list(prompt_token_ids), "max": max_tokens, "min": min_tokens, "drawn": drawn, **arguments}
        )
        attempt = self.attempts[min(len(self.calls), len(self.attempts)) - 1]
        try:
            for chunk in attempt:
                if isinstance(chunk, Exception):
                    raise chunk
                self.log.append("chunk")
                yield chunk
                await asyncio.sleep(0)
        finally:
            self.closed += 1

    async def worker_reports(self):
        assert self.closed == len(self.calls), "asked for the report of an attempt that still runs"
        return self.reports


def play(request, script):
    """All chunks of one choice, and its notes."""
    notes = {}

    async def collect():
        found = []
        async for chunk in AsapStrategy().run(request, script, notes):
            script.log.append("yield")
            found.append(chunk)
        return found

    return asyncio.run(collect()), notes


# run() --------------------------------------------------------------------------------------------------------------


def test_attempts_follow_each_other_until_one_is_accepted():
    script = Script(ABANDONED, ABANDONED, ACCEPTED)
    chunks, notes = play(asap("exact"), script)
    assert [(c.token_ids, c.logprobs, c.finish_reason, c.stop_reason, c.source, c.control) for c in chunks] == [
        ([10, 11, 2], ["c", "d", "e"], "stop", 2, "the engine's own", None)
    ]
    assert notes == {"mode": "exact", "attempts": 3, "accepted": True}
    assert script.closed == 3


def test_nothing_leaves_before_an_attempt_is_complete():
    script = Script(ABANDONED, ACCEPTED)
    play(asap("adaptive"), script)
    assert script.log == ["chunk"] * 5 + ["yield"]


def test_a_response_without_logprobs_stays_without():
    script = Script([Chunk([10]), Chunk([2], None, "stop", 2)])
    assert [c.logprobs for c in play(asap("exact"), script)[0]] == [None]


def test_an_attempt_is_given_up_at_its_control_id_without_waiting_for_more():
    script = Script([Chunk([8], control="abandon"), AssertionError("the attempt went on")], ACCEPTED)
    assert len(play(asap("exact"), script)[0]) == 1


def test_what_fails_inside_the_engine_is_not_another_attempt():
    script = Script(ABANDONED, [Chunk([8]), RuntimeError("failed inside the engine")], ACCEPTED)
    with pytest.raises(RuntimeError, match="failed inside the engine"):
        play(asap("exact"), script)
    assert len(script.calls) == 2


def test_closing_the_choice_closes_its_attempt():
    script = Script([Chunk([8]), Chunk([9]), Chunk([2], None, "stop", 2)])

    async def leave():
        chunks = AsapStrategy().run(asap("exact"), script, {})
        await anext(chunks)
        await chunks.aclose()

    asyncio.run(leave())
    assert script.closed == 1


def test_every_attempt_tells_the_worker_all_that_it_needs_and_nothing_else():
    script = Script(ABANDONED, ACCEPTED)
    play(asap("exact"), script)
    for attempt, call in enumerate(script.calls):
        assert call == {
            "prompt": [5, 6, 7],
            "max": 20,
            "min": 0,
            "drawn": True,
            "asap": "exact",
            "align_spec_trie": trie_key(REQUEST),
            "align_spec_seed": attempt_seed(11, attempt),
            "align_spec_length": 20,
            "align_spec_min_tokens": 2,
            "align_spec_temperature": 0.8,
            "align_spec_stop_ids": [2, 3],
        }


def test_each_attempt_has_a_seed_of_its_own_that_the_requests_seed_reproduces():
    def seeds(request):
        script = Script(ABANDONED)
        play(dataclasses.replace(request, n=2), script)
        return [call["align_spec_seed"] for call in script.calls]

    first = seeds(asap("exact", attempts=100))
    assert first == seeds(asap("exact", attempts=100))
    others = [*seeds(asap("exact", attempts=100, seed=12)), *seeds(asap("exact", attempts=100, seed=0))]
    assert len({*first, *others}) == 300
    assert all(0 <= seed < 2**63 for seed in first)


def test_without_a_seed_no_two_attempts_are_alike():
    assert len({attempt_seed(None, 0) for _ in range(100)}) == 100


def test_the_worker_says_how_likely_acceptance_was_when_the_only_choice_runs_out_of_attempts():
    script = Script(ABANDONED, reports=[worker(root=-2.0), worker(root=-3.0), None])
    with pytest.raises(StrategyError) as error:
        play(asap("exact", attempts=3), script)
    assert len(script.calls) == 3
    bound = f"{math.exp(-3.0):.3g}"
    assert "no attempt of 3 was accepted" in str(error.value)
    assert f"within 20 tokens with probability at most {bound}" in str(error.value)
    assert "95%" in str(error.value)  # 3 / (e + e) < 1
    for way_out in ("asap_max_attempts", "max_tokens", "asap='adaptive'"):
        assert way_out in str(error.value)


def test_a_choice_among_several_that_runs_out_of_attempts_is_aborted_alone():
    chunks, notes = play(asap("adaptive", attempts=2, n=3), Script(ABANDONED, reports=[worker(), worker()]))
    assert [(chunk.token_ids, chunk.logprobs, chunk.finish_reason) for chunk in chunks] == [([], None, "abort")]
    assert "no attempt of 2 was accepted" in chunks[0].stop_reason
    assert notes == {"mode": "adaptive", "attempts": 2}


@pytest.mark.parametrize("n", [1, 4])
def test_weighted_makes_one_attempt_whatever_may_be_made(n):
    script = Script(ABANDONED, ACCEPTED, reports=[worker("dead_end")])
    request = asap("weighted", attempts=50, n=n)
    if n == 1:
        with pytest.raises(StrategyError, match="no attempt of 1 was accepted"):
            play(request, script)
    else:
        assert play(request, script)[0][0].finish_reason == "abort"
    assert len(script.calls) == 1


def test_an_exhausted_choice_without_reports_says_that_nobody_knows():
    with pytest.raises(StrategyError, match="with a probability that nobody knows"):
        play(asap("exact"), Script(ABANDONED, reports=[None] * 5))


# trie_key() ---------------------------------------------------------------------------------------------------------

PARTS = {
    "prompt_token_ids": [5, 7, 6],
    "grammar": '{"regex": "[01]*"}',
    "temperature": 0.8 + 1e-12,
    "max_tokens": 21,
    "min_tokens": 3,
    "stop_token_ids": [2, 4],
    "scope": "pepper",
}


@pytest.mark.parametrize("part", PARTS)
def test_requests_that_differ_in_what_the_law_depends_on_share_no_trie(part):
    assert trie_key(dataclasses.replace(REQUEST, **{part: PARTS[part]})) != trie_key(REQUEST)


def test_no_two_of_these_differences_give_one_key():
    keys = {trie_key(dataclasses.replace(REQUEST, **{part: value})) for part, value in PARTS.items()}
    assert len(keys) == len(PARTS)
    assert trie_key(dataclasses.replace(REQUEST, prompt_token_ids=[5, 6], max_tokens=7)) != trie_key(
        dataclasses.replace(REQUEST, prompt_token_ids=[5], max_tokens=67)
    )


@pytest.mark.parametrize(
    "same",
    [
        {"seed": 12},
        {"seed": None},
        {"n": 8},
        {"room": 50},
        {"prompt_text": "said otherwise"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"stop_token_ids": [3, 2]},
        {"prompt_token_ids": (5, 6, 7)},
        {"options": (AsapOptions(asap="weighted", asap_max_attempts=1, align_spec_strict=True),)},
        {"logprobs_of_ids": True},
    ],
    ids=lambda same: next(iter(same)),
)
def test_requests_that_differ_in_anything_else_share_one(same):
    assert trie_key(dataclasses.replace(REQUEST, **same)) == trie_key(REQUEST)


def test_a_key_is_32_bytes_in_hex():
    assert len(bytes.fromhex(trie_key(REQUEST))) == 32


# What is known of Z -------------------------------------------------------------------------------------------------


def test_the_likelihood_is_the_lowest_bound_of_the_trie_and_the_rule_of_three():
    attempts = [worker(log_h0=math.log(0.5), root=math.log(0.4)), worker(log_h0=math.log(0.25), root=math.log(0.2))]
    assert likelihood(attempts) == "with probability at most 0.2 (with 95% confidence at most 0.5)"  # 3 / (2 + 4)


def test_the_rule_of_three_is_left_out_where_it_says_nothing():
    assert likelihood([worker(log_h0=0.0, root=math.log(0.4))] * 3) == "with probability at most 0.4"


def test_an_attempt_that_met_a_dead_root_adds_nothing_to_the_rule_of_three():
    attempts = [worker(log_h0=math.log(0.1)), worker(log_h0=None)]
    assert likelihood(attempts).endswith("(with 95% confidence at most 0.3)")


def test_a_root_without_mass_means_never():
    assert likelihood([worker(), worker(root=None)]) == "never (probability 0)"


def test_without_reports_nobody_knows():
    assert likelihood([]) == "with a probability that nobody knows"


# report() and conclude() --------------------------------------------------------------------------------------------


def test_the_report_counts_attempts_and_gives_the_weight_of_the_accepted_one():
    workers = [worker("rejected", -1.0), worker("dead_end", -1.1), worker("completed", -1.2, -1.5, -2.5)]
    report = AsapStrategy().report({"mode": "exact", "attempts": 3, "accepted": True}, workers, 3, 3)
    assert report == {
        "mode": "exact",
        "attempts": 3,
        "acceptance": 0.333333,
        "rejected": 1,
        "dead_ends": 1,
        "log_weight": -1.5,
        "log_h0": [-1.0, -1.1, -1.2],
        "log_mass_at_root": -2.5,
        "nodes_added": 6,
        "host_ms": 4.5,
        "rows": 9,
        "store": workers[-1]["store"],
    }


def test_the_report_of_a_choice_without_a_response_has_no_weight():
    report = AsapStrategy().report({"mode": "weighted", "attempts": 1}, [worker("dead_end")], 0, 0)
    assert (report["acceptance"], report["log_weight"], report["dead_ends"]) == (0.0, None, 1)


def test_the_report_survives_missing_and_failed_workers():
    report = AsapStrategy().report({"mode": "exact", "attempts": 2}, [None, {"error": "RuntimeError: no"}], 0, 0)
    assert (report["error"], report["reason"]) == ("RuntimeError: no", "failed")
    assert (report["rows"], report["store"], report["log_mass_at_root"]) == (0, None, None)


def choice(log_weight, mode="weighted", complete=True):
    return {"mode": mode, "log_weight": log_weight, "complete": complete}


def test_weighted_choices_estimate_the_mass_together():
    reports = [choice(math.log(v) if v else None) for v in (0.1, 0.3, 0.0, 0.2)]
    AsapStrategy().conclude(reports)
    for report in reports:
        estimate = report["estimate"]
        assert estimate["n"] == 4
        assert estimate["sum_v"] == pytest.approx(0.6)
        assert estimate["sum_v2"] == pytest.approx(0.14)
        assert estimate["z"] == pytest.approx(0.15)
        assert estimate["z_standard_error"] == pytest.approx(math.sqrt(0.05 / 3) / 2)  # squares around the mean: 0.05
        assert estimate["effective_sample_size"] == pytest.approx(0.36 / 0.14)


def test_one_weighted_choice_has_no_standard_error():
    reports = [choice(math.log(0.25))]
    AsapStrategy().conclude(reports)
    assert reports[0]["estimate"]["z"] == pytest.approx(0.25)
    assert reports[0]["estimate"]["z_standard_error"] is None


def test_choices_that_all_died_estimate_zero():
    reports = [choice(None), choice(None)]
    AsapStrategy().conclude(reports)
    assert reports[0]["estimate"] | {"n": 2} == {
        "n": 2,
        "sum_v": 0.0,
        "sum_v2": 0.0,
        "z": 0.0,
        "z_standard_error": 0.0,
        "effective_sample_size": 0.0,
    }


@pytest.mark.parametrize(
    "reports",
    [
        [],
        [choice(-1.0, "exact"), choice(-1.0, "exact")],
        [choice(-1.0, "adaptive")],
        [choice(-1.0), choice(None, complete=False)],
    ],
    ids=["no choices", "exact", "adaptive", "a worker's report is missing"],
)
def test_there_is_no_estimate_without_all_weights(reports):
    AsapStrategy().conclude(reports)
    assert not any("estimate" in report for report in reports)


# admit() ------------------------------------------------------------------------------------------------------------


def test_the_request_that_the_refusals_below_start_from_is_accepted():
    AsapStrategy().admit(REQUEST, ENGINE)
    AsapStrategy().admit(REQUEST, dataclasses.replace(ENGINE, draft_method=None))
    AsapStrategy().admit(dataclasses.replace(REQUEST, stop_token_ids=range(MAX_STOP_IDS)), ENGINE)


@pytest.mark.parametrize(
    ("changes", "option", "named", "accepted"),
    [
        ({"grammar": None}, "asap", "asap='exact'", "accepted: response_format"),
        ({"temperature": 0.0}, "temperature", "temperature=0 ", "accepted: temperature > 0"),
        ({"truncates": {"top_p=0.9": "drop top_p"}}, "top_p", "top_p=0.9", "drop top_p"),
        ({"truncates": {"top_k=40": "drop top_k"}}, "top_k", "top_k=40", "drop top_k"),
        ({"truncates": {"min_p=0.1": "drop min_p"}}, "min_p", "min_p=0.1", "drop min_p"),
        ({"bends": {"logit_bias={3: 1.0}": "drop it"}}, "logit_bias", "logit_bias={3: 1.0}", "drop it"),
        ({"bends": {"presence_penalty=1.5": "use 0"}}, "presence_penalty", "presence_penalty=1.5", "use 0"),
        ({"ignore_eos": True}, "ignore_eos", "ignore_eos=True", "drop it"),
        ({"stop_strings": ["\n", "x"]}, "stop", r"stop=['\n', 'x']", "drop it"),
        (
            {"stop_token_ids": range(MAX_STOP_IDS + 1)},
            "stop_token_ids",
            f"{MAX_STOP_IDS + 1} stop token ids",
            f"accepted: at most {MAX_STOP_IDS}",
        ),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_a_request_that_bends_the_target_is_refused_with_the_way_out(changes, option, named, accepted):
    with pytest.raises(OptionError, match=re.escape(named)) as error:
        AsapStrategy().admit(dataclasses.replace(REQUEST, **changes), ENGINE)
    assert accepted in str(error.value)
    assert error.value.option == option


@pytest.mark.parametrize(
    ("changes", "named", "accepted"),
    [
        ({"rejection_method": "block"}, "rejection_sample_method='block'", "accepted: 'standard'"),
        ({"rejection_method": "synthetic"}, "rejection_sample_method='synthetic'", "accepted: 'standard'"),
        ({"fixed_draft_length": False}, "verification='adaptive'", "accepted: of all drafts"),
        ({"shards_sampling": True}, "enable_batch_sharded_sampling=True", "accepted: False"),
        ({"reasoning": True}, "reasoning_parser='set'", "enable_in_reasoning"),
        ({"control_ids": False}, "control ids='none to spare'", "additional_config.align_spec.control_ids"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_an_engine_that_cannot_do_it_is_named_with_what_could(changes, named, accepted):
    with pytest.raises(OptionError, match=re.escape(named)) as error:
        AsapStrategy().admit(REQUEST, dataclasses.replace(ENGINE, **changes))
    assert accepted in str(error.value)
    assert error.value.option == "asap"
