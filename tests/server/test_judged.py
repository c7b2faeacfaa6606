"""What a client sees of CARDS, best-of-N and DeAL, over HTTP with the openai client, and of judges that misbehave."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serving import MESSAGES, MODELS, PARTS, PROMPT, TOOLS_USED, start_server, stop_server

from vllm_align_spec.lab import heldout_prompts
from vllm_align_spec.lab.judge import Judge

CARDS = {"cards": "on", "cards_reward": "good", "cards_threshold": 1.0, "cards_entropy": 0.5}
LOCAL = {**CARDS, "cards_reward": "short", "cards_threshold": -1.0}
"""A judge that costs nothing."""
REMOTE = {**CARDS, "cards_reward": "remote"}


@pytest.fixture
def remote(judge, server):
    """The scripted judge, healthy again afterwards and not left alone."""
    yield judge
    judge.fault, judge.delay = None, 0.0
    until = time.monotonic() + 30
    while True:
        try:
            cards(server, REMOTE, max_tokens=4)
            return
        except openai.APIStatusError:
            assert time.monotonic() < until
            time.sleep(0.3)


def cards(server, xargs=CARDS, **kwargs):
    return server.chat(xargs=xargs, **({"temperature": 1.0, "max_tokens": 32, "seed": 5} | kwargs))


def choice(server, response, index=0):
    return server.report(response.id)["choices"][index]


# CARDS --------------------------------------------------------------------------------------------------------------


def test_a_response_grows_by_segments_that_the_report_lists(server):
    response = cards(server, extra_body={"return_token_ids": True})
    report = choice(server, response)
    assert (report["method"], report["outcome"]) == ("cards", "completed")
    assert sum(segment["tokens"] for segment in report["segments"]) == response.usage.completion_tokens
    assert all(segment["tokens"] >= 4 for segment in report["segments"][:-1])
    assert report["sampled_tokens"] >= response.usage.completion_tokens
    assert report["judge_calls"] == 1 + sum(report["candidates"].values()) or report["candidates"]["surplus"]
    text = response.choices[0].message.content
    ended = response.choices[0].finish_reason == "stop"
    if ended:
        expected = Judge("judge").score([[*MESSAGES, {"role": "assistant", "content": text}]])[0]
        assert report["segments"][-1]["reward"] == pytest.approx(expected, abs=1e-2)
    assert not {token for token in response.choices[0].token_ids if token >= 4096}


def test_one_seed_gives_one_response_whatever_is_under_way_at_once(server):
    texts = {cards(server, {**CARDS, "cards_candidates": n}, seed=9).choices[0].message.content for n in (1, 1, 3, 6)}
    assert len(texts) == 1
    assert cards(server, seed=10).choices[0].message.content not in texts


def test_a_conversation_of_text_parts_is_judged_as_one_of_texts(server):
    assert cards(server, messages=PARTS).choices[0].message == cards(server).choices[0].message


@pytest.mark.parametrize("xargs", [LOCAL, CARDS, REMOTE], ids=["program", "model", "http"])
def test_a_conversation_with_tools_is_judged_too(server, remote, xargs):
    response = cards(server, xargs, messages=TOOLS_USED, max_tokens=8)
    assert choice(server, response)["outcome"] == "completed"


def test_a_stream_brings_accepted_segments_and_the_same_text(server):
    whole = cards(server)
    stream = server.client.chat.completions.create(
        model="base",
        messages=MESSAGES,
        temperature=1.0,
        max_tokens=32,
        seed=5,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"vllm_xargs": CARDS},
    )
    pieces, usage, finish = [], None, None
    for event in stream:
        usage = event.usage or usage
        for part in event.choices:
            pieces += [part.delta.content] if part.delta.content else []
            finish = part.finish_reason or finish
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 1
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert finish == whole.choices[0].finish_reason


@pytest.mark.parametrize("most", [1, 3, 4, 5, 17])
def test_max_tokens_is_never_overshot(server, most):
    response = cards(server, LOCAL, max_tokens=most, extra_body={"ignore_eos": True})
    assert response.usage.completion_tokens == most
    assert response.choices[0].finish_reason == "length"


def test_an_end_of_sequence_ends_the_response(server):
    response = cards(server, max_tokens=400)
    assert response.choices[0].finish_reason == "stop"
    assert response.usage.completion_tokens < 400


def test_a_stop_string_ends_it_too_also_across_segments(server):
    text = cards(server).choices[0].message.content
    stop = text[len(text) // 2 : len(text) // 2 + 6]
    response = cards(server, stop=[stop])
    assert response.choices[0].message.content == text[: text.index(stop)]
    assert response.choices[0].finish_reason == "stop"


def test_choices_are_samples_of_their_own_and_logprobs_cover_each(server):
    response = cards(server, n=3, logprobs=True)
    texts = [one.message.content for one in response.choices]
    assert len(set(texts)) > 1
    for one in response.choices:
        report = choice(server, response, one.index)
        assert len(one.logprobs.content) == sum(segment["tokens"] for segment in report["segments"])
        assert all(entry.logprob <= 0 for entry in one.logprobs.content)


def test_completions_without_messages_are_judged_as_text(server):
    response = server.complete(PROMPT, xargs=CARDS, temperature=1.0, max_tokens=16)
    assert response.usage.completion_tokens > 0
    assert choice(server, response)["prompt_reward"] is not None


def test_a_higher_threshold_costs_more_tries(server):
    tries = []
    for threshold in (-20.0, 20.0):
        report = choice(server, cards(server, {**CARDS, "cards_threshold": threshold, "cards_max_tries": 5}))
        tries.append([segment["tries"] for segment in report["segments"]])
    assert set(tries[0]) == {1}
    assert set(tries[1]) == {5}


def test_one_try_reports_entropies_for_calibration(server):
    response = cards(server, {**CARDS, "cards_max_tries": 1})
    report = choice(server, response)
    assert len(report["entropies"]) == response.usage.completion_tokens
    assert all(0 <= entropy <= 8.4 for entropy in report["entropies"])
    assert {segment["tries"] for segment in report["segments"]} == {1}


@pytest.mark.parametrize(
    ("xargs", "kwargs", "says"),
    [
        ({"cards": "on"}, {}, "cards_threshold is missing; accepted: a number (r*, the reward asked of a whole"),
        ({**CARDS, "cards_reward": "best"}, {}, "cards_reward='best' is no judge of this engine; accepted: 'good'"),
        ({"cards": "on", "cards_threshold": 1.0}, {}, "cards_reward is missing, and this engine has several judges"),
        ({**CARDS, "cards_beta": 0}, {}, "cards_beta=0 is not accepted; accepted: a number >= 0.01"),
        ({**CARDS, "cards_max_tries": 0}, {}, "cards_max_tries=0"),
        ({**CARDS, "cards_url": "http://x"}, {}, "unknown option cards_url='http://x'"),
        ({**CARDS, "bon": 2}, {}, "cannot be combined"),
        (CARDS, {"temperature": 0}, "temperature=0 cannot be combined with cards"),
        (CARDS, {"top_p": 0.5}, "top_p=0.5 cannot be combined with cards"),
        (CARDS, {"presence_penalty": 0.5}, "presence_penalty=0.5"),
        (CARDS, {"response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"bon": 0}, {}, "bon=0 is not accepted; accepted: an integer >= 1"),
        ({"bon": 2, "bon_reward": "best"}, {}, "bon_reward='best' is no judge"),
        ({"bon": 2, "bon_reward": "good", "bon_stop": 0.5}, {}, "bon_stop=0.5 is a share of the reference"),
        ({"deal": "on", "deal_reward": "short"}, {}, "temperature=1 cannot be combined with deal"),
        ({"deal": "on", "deal_reward": "short", "deal_top_k": 200}, {"temperature": 0}, "deal_top_k=200"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_honoured_is_a_400_also_under_stream(server, xargs, kwargs, says):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            cards(server, xargs, stream=stream, **kwargs)
        assert says in str(caught.value)


# Best-of-N and DeAL -------------------------------------------------------------------------------------------------


def test_best_of_n_is_the_best_of_its_samples(server):
    response = server.chat(xargs={"bon": 6, "bon_reward": "good"}, temperature=1.0, max_tokens=60, seed=3)
    report = choice(server, response)
    rewards = [sample["rewards"][0] for sample in report["samples"]]
    assert len(rewards) == 6
    assert report["taken"] == rewards.index(max(rewards))
    assert report["samples"][report["taken"]]["tokens"] == response.usage.completion_tokens
    if response.choices[0].finish_reason == "stop":
        conversation = [*MESSAGES, {"role": "assistant", "content": response.choices[0].message.content}]
        assert Judge("judge").score([conversation])[0] == pytest.approx(max(rewards), abs=1e-2)


def test_best_of_one_is_plain_decoding(server):
    for how in ({"temperature": 0}, {"temperature": 1.0, "seed": 4}):
        plain = server.chat(max_tokens=24, **how).choices[0].message.content
        best = server.chat(xargs={"bon": 1, "bon_reward": "good"}, max_tokens=24, **how).choices[0].message.content
        assert best == plain


def test_best_of_n_calibrates_stops_early_and_takes_a_grammar(server):
    xargs = {"bon": 16, "bon_reward": ["good", "short"], "bon_weights": [1.0, 0.5], "bon_reference": 4}
    response = server.chat(xargs={**xargs, "bon_stop": 0.6}, temperature=1.0, max_tokens=12, seed=3)
    report = choice(server, response)
    assert all(0 <= sample["score"] <= 1.5 for sample in report["samples"])
    assert report["stopped_early"] == (len(report["samples"]) < 16)
    grammar = {"structured_outputs": {"choice": ["yes", "no, never"]}}
    response = server.chat(xargs={"bon": 4, "bon_reward": "short"}, temperature=1.0, extra_body=grammar)
    assert response.choices[0].message.content in ("yes", "no, never")


def test_deal_with_a_program_moves_the_response_towards_it(server):
    xargs = {"deal": "on", "deal_reward": "short", "deal_top_k": 4, "deal_lookahead": 8}
    plain = server.chat(xargs={**xargs, "deal_weights": 0.0}, max_tokens=10)
    assert plain.choices[0].message.content == server.chat(max_tokens=10).choices[0].message.content
    steered = server.chat(xargs={**xargs, "deal_weights": 100.0}, max_tokens=10)
    assert choice(server, plain)["changed_tokens"] == 0
    assert choice(server, steered)["judge_calls"] > 0
    words = [abs(len(response.choices[0].message.content.split()) - 3) for response in (plain, steered)]
    assert words[1] <= words[0]


# Judges that misbehave ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "status", "says"),
    [
        ("http 500", 502, "HTTP 500"),
        ("nan", 502, "nan"),
        ("wrong count", 502, "gave 0 rewards for 1"),
        ("die", 502, "cannot be reached"),
        ("hang", 504, "took longer than timeout_s=8"),
    ],
)
def test_a_judge_that_misbehaves_is_an_error_that_says_so_within_its_deadline(server, remote, fault, status, says):
    cards(server, REMOTE, max_tokens=4)
    remote.fault = fault
    began = time.monotonic()
    with pytest.raises(openai.APIStatusError) as caught:
        cards(server, REMOTE, max_tokens=8)
    assert caught.value.status_code == status
    assert says in str(caught.value), str(caught.value)
    assert time.monotonic() - began < 20
    assert server.metric("align_spec:judge_failures_total", judge="remote") > 0


def test_the_declared_fallback_answers_and_the_report_says_so(server, remote):
    remote.fault = "http 500"
    response = cards(server, {**REMOTE, "cards_fallback": "base"}, max_tokens=8)
    assert response.usage.completion_tokens > 0
    report = choice(server, response)
    assert (report["reason"], report["fallback_at"]) == ("failed", 0)
    assert "HTTP 500" in report["error"]
    response = server.chat(xargs={"bon": 3, "bon_reward": "remote", "bon_fallback": "first"}, temperature=1.0)
    assert choice(server, response)["reason"] == "failed"


def test_a_judge_that_keeps_failing_is_not_asked_for_a_while(server, remote):
    remote.fault = "nan"
    statuses = []
    for _ in range(12):
        with pytest.raises(openai.APIStatusError) as caught:
            cards(server, REMOTE, max_tokens=4)
        statuses.append(caught.value.status_code)
        if statuses[-1] == 503:
            break
    assert statuses[-1] == 503
    asked = remote.asked
    with pytest.raises(openai.APIStatusError, match="times in a row"):
        cards(server, REMOTE, max_tokens=4)
    assert remote.asked <= asked + 1
    assert server.metric("align_spec:judge_open", judge="remote") == 1


@pytest.mark.slow
def test_many_clients_with_a_slow_judge_do_not_stall_ordinary_requests(server, remote):
    def ordinary():
        began = time.monotonic()
        assert server.complete(max_tokens=8).usage.completion_tokens == 8
        return time.monotonic() - began

    alone = [ordinary() for _ in range(10)]
    remote.delay = 1.0
    xargs = {**REMOTE, "cards_threshold": -5.0, "cards_entropy": 0.0, "cards_candidates": 1}
    with ThreadPoolExecutor(64) as pool:
        slow = [pool.submit(cards, server, xargs, max_tokens=4, seed=i, timeout=60) for i in range(64)]
        time.sleep(1)
        beside = [ordinary() for _ in range(10)]
        done = [future.result() for future in slow]
    assert len(done) == 64
    print(f"ordinary requests: {statistics.median(alone):.3f} s alone, {statistics.median(beside):.3f} s beside 64")
    assert statistics.median(beside) < 5 * statistics.median(alone) + 0.5


def test_leaving_early_ends_every_candidate(server, remote):
    remote.delay = 2.0
    with pytest.raises(openai.APITimeoutError):
        cards(server, {**REMOTE, "cards_candidates": 4}, timeout=0.8)
    server.wait_idle()
    assert server.complete(max_tokens=4).usage.completion_tokens == 4


def test_metrics_count_segments_and_judgements(server):
    before = server.metric("align_spec:cards_tries_count")
    report = choice(server, cards(server))
    assert server.metric("align_spec:cards_tries_count") == before + len(report["segments"])
    assert server.metric("align_spec:cards_segments_total", fate="accepted") > 0
    assert server.metric("align_spec:judge_seconds_count", judge="good") > 0
    assert server.metric("align_spec:sampled_tokens_total", method="cards") >= server.metric(
        "align_spec:delivered_tokens_total", method="cards"
    )


# Calibration --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_calibration_samples_a_running_server_and_proposes_options(server, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"messages": messages} for messages in heldout_prompts("chat")[:3]] + [{"prompt": PROMPT}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "vllm_align_spec.cli", "calibrate", str(prompts), "--url", f"{server.root}/v1"]
    command += ["--n", "2", "--max-tokens", "48", "--plot", str(tmp_path / "plot.png")]
    told = subprocess.run([*command, "--reward", "good"], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    proposed = json.loads(told.stdout[told.stdout.rindex("{") :])
    assert "8 plain responses" in told.stdout
    assert proposed["cards_reward"] == "good"
    assert (tmp_path / "plot.png").exists()
    report = choice(server, cards(server, proposed))
    assert report["segments"]
    told = subprocess.run([*command, "--reward", "best"], capture_output=True, text=True)
    assert told.returncode == 1
    assert "'best' is no judge of this engine" in told.stderr


# A pooling server ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pooling_server_of_vllms_says_what_the_model_in_this_process_says(tmp_path):
    import asyncio

    from vllm_align_spec.options import parse_engine
    from vllm_align_spec.rewards import Answer, judges

    pooling = start_server(tmp_path / "log", "--runner", "pooling", model="judge")
    try:
        remote = {"kind": "http", "url": pooling.root, "model": "judge", "timeout_s": 60}
        local = {"kind": "model", "model": str(MODELS / "judge"), "timeout_s": 60}
        tree = {
            f"{kind} {route}".replace(" ", "-"): {**remote, "route": route, "input": kind}
            for kind in ("messages", "text", "token_ids")
            for route in ("classify", "pooling")
        }
        tree |= {kind: {**local, "input": kind} for kind in ("messages", "text", "token_ids")}
        made = judges(parse_engine({"align_spec": {"rewards": tree}}).rewards)
        ids = [9, 40, 41, 42]
        answers = [
            Answer([1, 5, 6], PROMPT, MESSAGES, ids, "I would be glad to help.", finished) for finished in (False, True)
        ]

        async def all_of_them():
            return {name: await judge.score(answers) for name, judge in made.items()}

        found = asyncio.run(all_of_them())
        for kind in ("messages", "text", "token_ids"):
            for route in ("classify", "pooling"):
                assert found[f"{kind}-{route}"] == pytest.approx(found[kind], abs=2e-2), (kind, route)
    finally:
        stop_server(pooling)
