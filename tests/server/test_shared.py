"""What a client sees of `wsd=shared`, over HTTP with the openai client."""

from __future__ import annotations

import json
import threading
import time

import openai
import pytest
from serving import PROMPT

WSD = {"wsd": "shared"}
LONG = {"wsd": "shared", "wsd_gamma": 1, "wsd_max_draft": 16}
"""An opening of 16 tokens, unless the pilot ends it before."""


def stream_completion(server, **kwargs):
    """Text, finish reason, stop reason and usage per choice, from a stream."""
    choices = {}
    usage = response_id = None
    for event in server.complete(stream=True, stream_options={"include_usage": True}, **kwargs):
        response_id = event.id
        usage = event.usage or usage
        for choice in event.choices:
            seen = choices.setdefault(choice.index, {"text": "", "finish": None, "stop": None, "events": 0})
            seen["text"] += choice.text
            seen["events"] += 1
            if choice.finish_reason:
                assert seen["finish"] is None, "one end per choice"
                seen["finish"], seen["stop"] = choice.finish_reason, choice.stop_reason
    return response_id, choices, usage


def token_ids(response, index=0):
    return response.choices[index].token_ids


def test_a_response_has_the_length_asked_for_and_a_report_that_covers_it(server):
    response = server.complete(xargs=WSD, extra_body={"ignore_eos": True})
    assert response.usage.completion_tokens == 24
    assert response.choices[0].finish_reason == "length"
    (choice,) = server.report(response.id)["choices"]
    assert choice["method"] == "wsd"
    assert choice["mode"] == "shared"
    assert choice["outcome"] == "completed"
    assert choice["reason"] in ("switched", "pilot_end", "drafting")
    assert sum(count for _, count in choice["origins"]) == choice["response_tokens"] == 24
    assert choice["switch_index"] == choice["draft_tokens_kept"] - 1
    assert choice["target_forwards"] >= 2
    assert choice["tokens_per_forward"] == pytest.approx(24 / choice["target_forwards"], abs=1e-3)
    assert 0 < choice["first_token_ms"] <= choice["total_ms"]


def test_the_opening_is_as_long_as_its_bound_if_no_switch_comes(server):
    response = server.chat(xargs=LONG)
    (choice,) = server.report(response.id)["choices"]
    assert (choice["reason"], choice["draft_tokens_kept"]) == ("max_draft", 16)
    assert choice["origins"][0] == ["opening", 16]


def test_usage_counts_the_clients_prompt_and_the_clients_tokens(server):
    plain, steered = server.complete(max_tokens=7), server.complete(max_tokens=7, xargs=WSD)
    assert plain.usage.prompt_tokens == steered.usage.prompt_tokens
    assert steered.usage.completion_tokens <= 7


def test_the_clients_prompt_ids_come_back_whole(server):
    plain = server.complete(extra_body={"return_token_ids": True})
    steered = server.complete(xargs=WSD, extra_body={"return_token_ids": True})
    assert plain.choices[0].prompt_token_ids == steered.choices[0].prompt_token_ids
    assert len(token_ids(steered)) == steered.usage.completion_tokens


@pytest.mark.parametrize("more", [{}, {"temperature": 0.8, "seed": 5, "n": 3}, {"stop": ["the"]}])
def test_a_stream_adds_up_to_the_whole_answer(server, more):
    whole = server.complete(xargs=WSD, **more)
    response_id, choices, usage = stream_completion(server, xargs=WSD, **more)
    assert {c.index: c.text for c in whole.choices} == {i: c["text"] for i, c in choices.items()}
    assert {c.index: c.finish_reason for c in whole.choices} == {i: c["finish"] for i, c in choices.items()}
    assert usage == whole.usage
    assert len(server.report(response_id)["choices"]) == len(choices)


def test_a_stream_sends_the_opening_before_the_response_is_over(server):
    _, choices, _ = stream_completion(server, xargs=LONG, max_tokens=64, extra_body={"ignore_eos": True})
    assert choices[0]["events"] > 5


def test_chat_streams_too(server):
    whole = server.chat(xargs=WSD)
    text, finish = "", None
    for event in server.chat(xargs=WSD, stream=True):
        for choice in event.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    assert (text, finish) == (whole.choices[0].message.content, whole.choices[0].finish_reason)


def test_several_choices_get_seeds_of_their_own(server):
    response = server.complete(xargs={**LONG, "wsd_max_draft": 6}, n=3, temperature=1.2, seed=11, max_tokens=32)
    assert [c.index for c in response.choices] == [0, 1, 2]
    assert len({c.text for c in response.choices}) > 1
    # The opening is greedy, so all begin alike.
    report = server.report(response.id)
    assert [c["index"] for c in report["choices"]] == [0, 1, 2]
    again = server.complete(xargs={**LONG, "wsd_max_draft": 6}, n=3, temperature=1.2, seed=11, max_tokens=32)
    assert [c.text for c in again.choices] == [c.text for c in response.choices]


def test_a_list_of_prompts_is_one_report_with_a_choice_each(server):
    prompts = [PROMPT, "A list is", "Sorting a list"]
    together = server.complete(prompt=prompts, xargs=LONG, n=2, temperature=0.7, seed=3)
    assert [c.index for c in together.choices] == list(range(6))
    choices = server.report(together.id)["choices"]
    assert [c["index"] for c in choices] == list(range(6))
    assert sum(c["response_tokens"] for c in choices) == together.usage.completion_tokens
    ids = server.client.completions.create(
        model="base", prompt=[[5, 6, 7], [8, 9]], max_tokens=8, extra_body={"vllm_xargs": WSD}
    )
    assert len(ids.choices) == 2


def test_logprobs_are_the_base_models_own_of_the_very_tokens_sent(server):
    steered = server.complete(
        xargs=LONG, logprobs=3, extra_body={"return_token_ids": True, "skip_special_tokens": False}
    )
    choice = steered.choices[0]
    assert len(choice.logprobs.token_logprobs) == steered.usage.completion_tokens
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset[0] == 0
    assert all(len(top) in (3, 4) for top in choice.logprobs.top_logprobs)
    # The same tokens as a prompt: the model's own opinion, without any method.
    everything = [*choice.prompt_token_ids, *choice.token_ids]
    scored = server.complete(prompt=everything, max_tokens=1, extra_body={"prompt_logprobs": 0})
    own = [
        next(iter(entry.values()))["logprob"] for entry in scored.choices[0].prompt_logprobs[-len(choice.token_ids) :]
    ]
    assert choice.logprobs.token_logprobs == pytest.approx(own, abs=2e-3)


def test_streamed_logprobs_are_aligned(server):
    tokens, text = [], ""
    for event in server.complete(xargs=LONG, logprobs=1, stream=True, extra_body={"skip_special_tokens": False}):
        tokens += event.choices[0].logprobs.tokens
        text += event.choices[0].text
    assert "".join(tokens) == text


def test_chat_logprobs_are_aligned(server):
    response = server.chat(xargs=LONG, logprobs=True, top_logprobs=2, extra_body={"skip_special_tokens": False})
    content = response.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == response.choices[0].message.content
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in content)


@pytest.mark.parametrize("where", ["inside the opening", "after the switch"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_response_where_it_stands(server, where, stream):
    body = {"ignore_eos": True, "skip_special_tokens": False}
    free = server.complete(xargs=LONG, max_tokens=40, logprobs=0, extra_body=body).choices[0]
    tokens, text = free.logprobs.tokens, free.text
    begin = len("".join(tokens[:6])) if where == "inside the opening" else len("".join(tokens[:24]))
    stop = text[begin : begin + 6]
    at = text.index(stop)
    kwargs = {"xargs": LONG, "max_tokens": 40, "stop": [stop, "never said"], "extra_body": body}
    if stream:
        response_id, choices, usage = stream_completion(server, **kwargs)
        found = (choices[0]["text"], choices[0]["finish"], choices[0]["stop"])
    else:
        response = server.complete(**kwargs)
        response_id, usage, choice = response.id, response.usage, response.choices[0]
        found = (choice.text, choice.finish_reason, choice.stop_reason)
    assert found == (text[:at], "stop", stop)
    # The token that completes the stop string is the last one counted.
    lengths = [len("".join(tokens[: i + 1])) for i in range(len(tokens))]
    assert usage.completion_tokens == 1 + next(i for i, length in enumerate(lengths) if length >= at + len(stop))
    (choice,) = server.report(response_id)["choices"]
    assert sum(count for _, count in choice["origins"]) == usage.completion_tokens
    if usage.completion_tokens < 16:
        assert (choice["reason"], choice["origins"]) == ("drafting", [["opening", usage.completion_tokens]])


def test_stop_strings_can_stay_and_min_tokens_is_honoured(server):
    body = {"ignore_eos": True, "skip_special_tokens": False}
    text = server.complete(xargs=LONG, max_tokens=20, extra_body=body).choices[0].text
    stop = text[8:12]
    kept = server.complete(
        xargs=LONG, max_tokens=20, stop=stop, extra_body={**body, "include_stop_str_in_output": True}
    )
    assert kept.choices[0].text == text[: text.index(stop) + 4]
    late = server.complete(xargs=LONG, max_tokens=20, stop=stop, extra_body={**body, "min_tokens": 20})
    assert late.usage.completion_tokens == 20


def test_a_stop_token_of_the_pilot_ends_the_opening_and_not_the_response(server):
    free = server.complete(xargs=LONG, extra_body={"return_token_ids": True})
    last_of_prompt = free.choices[0].prompt_token_ids[-1]
    stop = next(token for token in token_ids(free)[5:] if token != last_of_prompt)
    at = token_ids(free).index(stop)
    response = server.complete(xargs=LONG, extra_body={"stop_token_ids": [stop], "return_token_ids": True})
    (choice,) = server.report(response.id)["choices"]
    assert (choice["reason"], choice["draft_tokens_kept"]) == ("pilot_end", at)
    assert token_ids(response)[:at] == token_ids(free)[:at]


def test_echo_shows_the_whole_prompt(server):
    response = server.complete(xargs=WSD, echo=True)
    assert response.choices[0].text.startswith(PROMPT)
    assert response.usage.prompt_tokens == server.complete().usage.prompt_tokens


def test_the_responses_api_reaches_us_too(server):
    response = server.client.responses.create(
        model="base", input="How can I keep my desk tidy?", max_output_tokens=20, extra_body={"vllm_xargs": LONG}
    )
    assert server.report(response.id)["choices"][0]["draft_tokens_kept"] == 16


def test_beam_search_drops_our_options(server):
    response = server.complete(xargs=WSD, n=2, max_tokens=4, extra_body={"use_beam_search": True})
    assert len(response.choices) == 2
    assert server.get(f"/v1/align_spec/reports/{response.id}")[0] == 404


REFUSED = [
    ({"wsd": "shared", "wsd_gamma": 0}, {}, "wsd_gamma=0 is not accepted; accepted: a number > 0 and <= 1"),
    ({"wsd": "shared", "wsd_gamma": 1.5}, {}, "wsd_gamma=1.5"),
    ({"wsd": "shared", "wsd_gamma": "high"}, {}, "wsd_gamma='high'"),
    ({"wsd": "shared", "wsd_window": 0}, {}, "wsd_window=0 is not accepted; accepted: an integer >= 1 and <= 64"),
    ({"wsd": "shared", "wsd_windows": 6}, {}, "unknown option wsd_windows=6"),
    ({"wsd": "on"}, {}, "wsd='on' is not accepted; accepted: 'shared' | 'handover'"),
    ({"wsd_gamma": 0.5}, {}, "wsd_gamma=0.5 has no effect without 'wsd'"),
    ({"wsd": "shared", "align_spec_id": "mine"}, {}, "unknown option align_spec_id='mine'"),
    (WSD, {"max_tokens": 5}, "max_tokens=5 is smaller than wsd_window=6"),
    (WSD, {"prompt": [9]}, "at least 2 tokens, got 1"),
    (WSD, {"prompt": [9, 2]}, "ends with the stop token 2"),
    (WSD, {"presence_penalty": 0.5}, "presence_penalty=0.5 cannot be combined with wsd; send presence_penalty=0.0"),
    (WSD, {"extra_body": {"repetition_penalty": 1.1}}, "send repetition_penalty=1.0 (the model's generation_config"),
    (WSD, {"logit_bias": {"5": 1}}, "logit_bias"),
    (WSD, {"extra_body": {"bad_words": ["tidy"]}}, "bad_words=['tidy']"),
    (WSD, {"extra_body": {"allowed_token_ids": [5, 6]}}, "allowed_token_ids"),
    (WSD, {"extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs=1"),
    (WSD, {"echo": True, "logprobs": 1}, "prompt_logprobs=1"),
    (WSD, {"extra_body": {"structured_outputs": {"regex": "a+"}}}, "structured_outputs"),
    (WSD, {"extra_body": {"response_format": {"type": "json_object"}}}, "structured_outputs"),
    (WSD, {"extra_body": {"stop_token_ids": list(range(100, 170))}}, "at most 64"),
    (WSD, {"extra_body": {"kv_transfer_params": {"do_remote_prefill": True}}}, "kv_transfer_params"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("xargs", "kwargs", "says"), REFUSED, ids=[row[2][:30] for row in REFUSED])
def test_what_cannot_be_honoured_is_a_400_that_says_so(server, xargs, kwargs, says, stream):
    if stream and "prompt_logprobs" in kwargs.get("extra_body", {}):
        pytest.skip("vLLM itself refuses prompt_logprobs with a stream")
    kwargs = dict(kwargs)
    with pytest.raises(openai.BadRequestError) as caught:
        server.complete(kwargs.pop("prompt", PROMPT), xargs, stream=stream, **kwargs)
    assert says in str(caught.value)


def test_prompt_embeddings_are_refused(server):
    with pytest.raises(openai.BadRequestError):
        server.complete(prompt=None, xargs=WSD, extra_body={"prompt_embeds": "AAAA"})


def test_refusals_are_counted_by_option(server):
    before = server.metric("align_spec:refused_total", option="wsd_gamma")
    unknown = server.metric("align_spec:refused_total", option="unknown")
    for bad in ({"wsd_gamma": 7}, {"wsd_made_up_by_a_client": 1}):
        with pytest.raises(openai.BadRequestError):
            server.complete(xargs={**WSD, **bad})
    assert server.metric("align_spec:refused_total", option="wsd_gamma") == before + 1
    assert server.metric("align_spec:refused_total", option="unknown") == unknown + 1
    assert "made_up" not in server.get("/metrics")[1]


@pytest.mark.parametrize("n", [1, 2])
def test_a_client_that_leaves_ends_its_requests(server, n):
    server.wait_idle()
    cancelled = server.metric("align_spec:requests_total", outcome="cancelled")
    stream = server.complete(
        xargs=WSD, max_tokens=900, n=n, temperature=1.0, stream=True, extra_body={"ignore_eos": True}
    )
    response_id = next(iter(stream)).id
    began = time.monotonic()
    stream.close()
    server.wait_idle(timeout_s=10)
    assert time.monotonic() - began < 8
    assert server.metric("align_spec:requests_total", outcome="cancelled") == cancelled + 1
    report = server.report(response_id)
    assert [c["outcome"] for c in report["choices"]] == ["cancelled"] * n
    assert 0 < report["choices"][0]["response_tokens"] < 900


def test_an_impatient_client_without_a_stream_ends_its_request(server):
    server.wait_idle()
    with pytest.raises(openai.APITimeoutError):
        server.complete(xargs=WSD, max_tokens=900, timeout=1, extra_body={"ignore_eos": True})
    server.wait_idle(timeout_s=10)


def test_a_report_that_is_not_there_is_a_404_that_explains_itself(server):
    status, body = server.get("/v1/align_spec/reports/cmpl-nobody")
    assert status == 404
    assert "cmpl-nobody" in json.loads(body)["error"]["message"]
    plain = server.complete(max_tokens=2)
    assert server.get(f"/v1/align_spec/reports/{plain.id}")[0] == 404


def test_the_clients_own_request_id_names_the_report(server):
    response = server.complete(xargs=WSD, extra_headers={"X-Request-Id": "desk-7"})
    assert response.id == "cmpl-desk-7"
    assert server.report("cmpl-desk-7")["id"] == "cmpl-desk-7"


def test_info_tells_methods_and_that_requests_reach_us(server):
    info = json.loads(server.get("/v1/align_spec/info")[1])
    assert info["enabled"] is info["front_end_hook"] is True
    assert "wsd_gamma" in info["methods"]["wsd"]["properties"]
    assert "reports" in info["engine_options"]["properties"]


def test_metrics_of_a_finished_request_show(server):
    counts = {"align_spec:requests_total": {"method": "wsd", "outcome": "completed"}}
    counts["align_spec:wsd_switch_total"] = {"reason": "max_draft", "mode": "shared"}
    counts |= {f"align_spec:wsd_{name}_count": {} for name in ("opening_tokens", "tokens_per_forward")}
    counts["align_spec:wsd_time_to_first_token_seconds_count"] = {}
    counts["align_spec:report_calls_total"] = {}
    before = {name: server.metric(name, **labels) for name, labels in counts.items()}
    server.report(server.complete(xargs=LONG).id)
    for name, labels in counts.items():
        assert server.metric(name, **labels) >= before[name] + 1, name
    assert server.metric("align_spec:reports_stored") > 0
    assert server.metric("align_spec:report_calls_failed_total") == 0


def test_many_at_once_each_get_their_own(server):
    prompts = [f"{PROMPT} ({i})" for i in range(12)]
    alone = [server.complete(p, LONG, extra_body={"return_token_ids": True}) for p in prompts]
    found = {}

    def ask(i):
        xargs = LONG if i % 3 else None
        found[i] = server.complete(prompts[i], xargs, extra_body={"return_token_ids": True})

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(len(prompts)):
        if i % 3:
            # The opening does not depend on how the batch looks, up to the rounding of its shape.
            assert token_ids(found[i])[:4] == token_ids(alone[i])[:4]
            assert server.report(found[i].id)["choices"][0]["response_tokens"] == found[i].usage.completion_tokens
