"""Weak-to-strong decoding inside the real engine, on both runners, against transformers."""

import pytest
from engines import DRAFTS, log_probabilities, prompts
from laws import assert_wsd, greedy

RUNNERS = ["v1", "v2"]
SLOW_ON_V2 = pytest.mark.parametrize(
    "runner", ["v1", pytest.param("v2", marks=pytest.mark.slow)], indirect=True, scope="session"
)
"""An engine of its own under the interpreter costs minutes: V2's share of these belongs to ``make test-slow``."""
UNREACHABLE = {"wsd_window": 64}
"""No opening shorter than its window can switch."""


@pytest.fixture(params=RUNNERS, scope="session")
def runner(request):
    """Of session scope, so that pytest runs one runner's tests after the other's and engines start once."""
    return request.param


@pytest.fixture
def engine(engines, runner):
    return engines(runner)


def wsd(prompt, options=None, **params):
    return {"prompt": prompt, "wsd": options or {}, "params": params}


def check(engine, requests, **kwargs):
    """Runs a batch and holds every response against the law; close calls must stay rare."""
    outputs = engine.generate(requests)
    close = total = 0
    for request, output in zip(requests, outputs, strict=True):
        total += len(output["tokens"])
        if "wsd" in request:
            close += assert_wsd(request["prompt"], output, request["wsd"], **kwargs)
        elif not request.get("params", {}).get("temperature") and "grammar" not in request.get("params", {}):
            close += greedy("base", request["prompt"], output["tokens"], 0, len(output["tokens"]))
    assert close <= max(1, total // 100)
    return outputs


def test_every_patch_of_the_runner_is_in_force(engine, runner):
    applied = engine.patches()
    needed = {
        "v1": {
            "worker_calls",
            "v1_facade",
            "v1_rows",
            "v1_drafter_fits",
            "v1_draft_rows",
            "v1_truncation",
        },
        "v2": {"worker_calls", "v2_truncation"},
    }[runner]
    assert {name for name in needed if applied.get(name) == "applied"} == needed


def test_without_a_switch_the_opening_is_the_pilots_own_greedy_answer(engine):
    bounds = [1, 4, 5, 6, 19]
    outputs = check(engine, [wsd(prompts()[0], UNREACHABLE | {"wsd_max_draft": bound}) for bound in bounds])
    for bound, output in zip(bounds, outputs, strict=True):
        report = output["report"]["wsd"]
        assert (report["reason"], report["kept"]) == ("max_draft", bound)


def test_the_switch_is_where_the_pure_rule_puts_it(engine):
    options = [
        {"wsd_gamma": gamma, "wsd_window": window}
        for gamma, window in [(0.05, 1), (0.3, 2), (0.5, 3), (0.8, 6), (0.6, 7), (1e-9, 6), (1e-9, 1)]
    ]
    outputs = check(engine, [wsd(prompts()[1 + i % 4], o) for i, o in enumerate(options)])
    reasons = [output["report"]["wsd"]["reason"] for output in outputs]
    assert reasons.count("switched") >= 4
    assert outputs[5]["report"]["wsd"]["kept"] == 6
    assert outputs[6]["report"]["wsd"]["kept"] == 1


def test_a_sampled_continuation_keeps_the_pilots_opening(engine):
    requests = [
        wsd(p, UNREACHABLE | {"wsd_max_draft": 8}, temperature=0.9, seed=i) for i, p in enumerate(prompts()[:4])
    ]
    requests.append(wsd(prompts()[5], {}))
    outputs = check(engine, requests[:4], temperature=0.9) + check(engine, requests[4:])
    assert all(o["report"]["wsd"]["kept"] == 8 for o in outputs[:4])


def test_greedy_and_sampled_requests_may_share_a_batch(engine):
    requests = [wsd(prompts()[0], {}), wsd(prompts()[1], {}, temperature=1.0), {"prompt": prompts()[2]}]
    outputs = engine.generate(requests)
    assert_wsd(requests[0]["prompt"], outputs[0], {})
    assert_wsd(requests[1]["prompt"], outputs[1], {}, temperature=1.0)
    greedy("base", requests[2]["prompt"], outputs[2]["tokens"], 0, len(outputs[2]["tokens"]))


def test_logprobs_of_forced_tokens_are_the_base_models_own(engine):
    request = wsd(prompts()[3], UNREACHABLE | {"wsd_max_draft": 7}, logprobs=1, max_tokens=12)
    (output,) = check(engine, [request])
    rows = log_probabilities("base", request["prompt"], output["tokens"])
    assert len(output["logprobs"]) == len(output["tokens"])
    for row, token, given in zip(rows, output["tokens"], output["logprobs"], strict=True):
        assert abs(given[str(token)] - float(row[token])) < 1e-3


def test_short_bounds_on_the_response_hold(engine):
    for length in (1, 2, DRAFTS, DRAFTS + 1):
        (output,) = check(engine, [wsd(prompts()[6], UNREACHABLE, max_tokens=length)])
        assert len(output["tokens"]) == length


def test_a_neighbour_under_a_grammar_neither_disturbs_nor_is_disturbed(engine):
    grammar = {"prompt": prompts()[8], "params": {"grammar": {"choice": ["yes, indeed", "no"]}, "ignore_eos": False}}
    outputs = check(engine, [wsd(prompts()[7], UNREACHABLE | {"wsd_max_draft": 9}), grammar, wsd(prompts()[9], {})])
    assert outputs[0]["report"]["wsd"]["kept"] == 9
    assert outputs[1]["finish"] == "stop"


def test_prefix_caching_changes_nothing(engine):
    request = wsd(prompts()[10], {}, max_tokens=20)
    (first,) = check(engine, [dict(request)])
    (second,) = check(engine, [dict(request)])
    assert first["tokens"] == second["tokens"]
    assert first["report"] == second["report"]


def test_keys_that_no_front_end_admitted_are_refused(engine):
    answer = engine.start([{"prompt": prompts()[0], "params": {"extra_args": {"wsd": "shared"}}}])
    assert "vllm_align_spec.engine.offline.LLM" in answer["error"]


@SLOW_ON_V2
def test_mixed_batches_leave_neighbours_as_an_engine_without_the_plugin_serves_them(engines, engine, runner):
    plain = [{"prompt": p, "params": {"max_tokens": 16}} for p in prompts()[:4]]
    mixed = [request for pair in zip(plain, (wsd(p) for p in prompts()[4:8]), strict=True) for request in pair]
    beside = [o["tokens"] for r, o in zip(mixed, check(engine, mixed), strict=True) if "wsd" not in r]
    alone = engines(runner, env={"VLLM_ALIGN_SPEC_DISABLE": "1"}).generate(plain)
    for request, got, expected in zip(plain, beside, alone, strict=True):
        if got != expected["tokens"]:
            # Batch shape moves logits; only a close call may differ.
            assert greedy("base", request["prompt"], got, 0, len(got)) > 0


@pytest.mark.slow
def test_preempted_requests_keep_to_the_law(engines, runner):
    # So few blocks of 32 tokens cannot hold what the requests need together.
    blocks, count, length = (14, 6, 90) if runner == "v1" else (8, 4, 44)
    engine = engines(runner, num_gpu_blocks_override=blocks, enable_prefix_caching=False, max_model_len=224)
    requests = [wsd(p, UNREACHABLE | {"wsd_max_draft": 63}, max_tokens=length) for p in prompts()[:count]]
    outputs = check(engine, requests)
    assert all(len(o["tokens"]) == length for o in outputs)
    assert "interrupted" in {o["report"]["wsd"]["reason"] for o in outputs}, (
        "nothing was preempted: the test shows nothing"
    )


@pytest.mark.slow
def test_chunked_prefill_and_a_neighbour_beyond_the_drafters_length(engines, runner):
    drafter = {"method": "draft_model", "num_speculative_tokens": DRAFTS, "max_model_len": 192}
    from vllm_align_spec import lab

    drafter["model"] = str(lab.model_path("pilot"))
    engine = engines(runner, speculative_config=drafter, max_num_batched_tokens=64)
    # Its first step after the prompt is beyond the drafter already, while the other request is drafting.
    long = (prompts()[0] * 20)[: 192 - 2]
    neighbour = {"prompt": long, "params": {"max_tokens": 24}}
    requests = [wsd(prompts()[1], UNREACHABLE | {"wsd_max_draft": 63}, max_tokens=64), neighbour]
    outputs = engine.generate(requests)
    assert_wsd(requests[0]["prompt"], outputs[0], requests[0]["wsd"])
    if runner == "v1":  # V2 keeps drafting
        assert outputs[0]["report"]["wsd"]["reason"] == "interrupted"


@pytest.mark.slow
def test_asynchronous_scheduling_keeps_to_the_law(engines, runner):
    engine = engines(runner, async_scheduling=True)
    requests = [wsd(prompts()[0], UNREACHABLE | {"wsd_max_draft": 12}), wsd(prompts()[1], {}), {"prompt": prompts()[2]}]
    outputs = check(engine, requests)
    assert outputs[0]["report"]["wsd"]["kept"] == 12


@SLOW_ON_V2
def test_a_processor_that_raises_takes_nothing_down(engines, runner):
    engine = engines(runner, broken_processor=True)
    requests = [wsd(prompts()[0], {"wsd_max_draft": 77}), {"prompt": prompts()[1]}, wsd(prompts()[2], {})]
    broken, neighbour, _ = engine.generate(requests)
    assert "broken on purpose" in broken["report"]["error"]
    assert broken["report"]["wsd"]["reason"] == "failed"
    greedy("base", requests[1]["prompt"], neighbour["tokens"], 0, len(neighbour["tokens"]))
    assert len(broken["tokens"]) == 24
    check(engine, [wsd(prompts()[3], {})])


@pytest.mark.slow
def test_with_the_target_as_its_own_pilot_any_gamma_gives_the_targets_answer(engines, runner):
    from vllm_align_spec import lab

    base = str(lab.model_path("base"))
    engine = engines(
        runner, speculative_config={"method": "draft_model", "model": base, "num_speculative_tokens": DRAFTS}
    )
    requests = [wsd(prompts()[0], {"wsd_gamma": gamma}, max_tokens=20) for gamma in (0.2, 0.8, 1.0)]
    outputs = engine.generate(requests)
    for request, output in zip(requests, outputs, strict=True):
        greedy("base", request["prompt"], output["tokens"], 0, len(output["tokens"]))
