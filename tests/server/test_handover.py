"""What a client sees of `wsd=handover`: a pilot with another tokenizer and chat format, at its own endpoint."""

from __future__ import annotations

import openai
import pytest
from serving import MESSAGES, MODELS, PARTS, PROMPT, TOOL_CALL, TOOLS_USED

from vllm_align_spec.processors.wsd import switch_index

WSD = {"wsd": "handover"}
LONG = {**WSD, "wsd_gamma": 1, "wsd_max_draft": 16}
IDS = {"return_token_ids": True, "skip_special_tokens": False}


@pytest.fixture(autouse=True)
def _healthy(pilot):
    pilot.fault = None
    pilot.bodies.clear()
    yield
    pilot.fault = None


@pytest.fixture(scope="module")
def base():
    """The base model, without vLLM."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")

    def probabilities(prompt_ids, ids):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt_ids, *ids]])).logits[0, len(prompt_ids) - 1 : -1]
        return logits.softmax(-1)[range(len(ids)), list(ids)].tolist()

    return tokenizer, probabilities


@pytest.fixture(scope="module")
def pilot_text(pilot):
    """The pilot's own greedy answer."""
    return "".join(pilot.pieces(pilot.prompt_ids(MESSAGES), 400))


def test_without_a_switch_the_opening_is_the_pilots_own_answer(server, pilot, pilot_text, base):
    tokenizer, _ = base
    response = server.chat(xargs=LONG, extra_body=IDS)
    (choice,) = server.report(response.id)["choices"]
    own = tokenizer.encode(pilot_text, add_special_tokens=False)
    kept = min(16, len(own))
    assert response.choices[0].token_ids[:kept] == own[:kept]
    assert (choice["mode"], choice["draft_tokens_kept"]) == ("handover", kept)
    assert choice["reason"] == ("max_draft" if len(own) >= 16 else "pilot_end")
    assert choice["origins"][0] == ["opening", kept]
    assert choice["scorings"] >= 1
    ((path, body),) = pilot.bodies
    assert path == "/v1/chat/completions"
    assert body["messages"] == MESSAGES
    assert body["temperature"] == 0


def test_text_parts_reach_the_pilot_as_one_text(server, pilot):
    server.chat(PARTS, LONG)
    assert pilot.bodies[0][1]["messages"] == MESSAGES
    server.chat(TOOLS_USED, LONG)
    _, call, told = pilot.bodies[1][1]["messages"]
    assert call == {"role": "assistant", "content": "", "tool_calls": [TOOL_CALL]}
    assert told == {"role": "tool", "content": "noon", "tool_call_id": "1"}


def test_a_plain_prompt_reaches_the_pilot_as_text_to_complete(server, pilot):
    server.complete("A tidy desk", LONG)
    ((path, body),) = pilot.bodies
    assert (path, body["prompt"]) == ("/v1/completions", "A tidy desk")


def test_the_switch_is_where_the_rule_says(server, pilot_text, base):
    tokenizer, probabilities = base
    ids = tokenizer.encode(pilot_text, add_special_tokens=False)[:40]
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    window = 3
    p = probabilities(prompt, ids)
    means = []
    for i in range(window - 1, len(p)):
        product = 1.0
        for value in p[i - window + 1 : i + 1]:
            product *= value
        means.append(product ** (1 / window))
    # Just below the largest mean, so that the switch comes late, and no mean is so near that rounding could decide.
    ordered = sorted(means)
    gamma = (ordered[-1] * ordered[-2]) ** 0.5 if ordered[-2] < 0.99 * ordered[-1] else ordered[-1] * 0.9
    response = server.chat(xargs={**WSD, "wsd_gamma": gamma, "wsd_window": window, "wsd_max_draft": 40}, max_tokens=60)
    (choice,) = server.report(response.id)["choices"]
    assert choice["switch_index"] == switch_index(p, gamma=gamma, window=window)
    assert choice["reason"] == "switched"


def test_after_the_opening_the_base_model_continues_greedily(server):
    response = server.chat(xargs=LONG, max_tokens=40, extra_body=IDS)
    kept = server.report(response.id)["choices"][0]["draft_tokens_kept"]
    ids = response.choices[0].token_ids
    plain = server.complete([*response.prompt_token_ids, *ids[:kept]], max_tokens=40 - kept, extra_body=IDS)
    assert plain.choices[0].token_ids == ids[kept:]
    assert plain.choices[0].finish_reason == response.choices[0].finish_reason


def test_usage_and_length_are_the_clients(server):
    response = server.chat(xargs=LONG, max_tokens=30, extra_body={"ignore_eos": True})
    assert (response.usage.completion_tokens, response.choices[0].finish_reason) == (30, "length")
    assert response.usage.prompt_tokens == server.chat(max_tokens=2).usage.prompt_tokens
    short = server.chat(xargs=LONG, max_tokens=9)
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (9, "length")
    (choice,) = server.report(short.id)["choices"]
    assert (choice["reason"], choice["origins"]) == ("drafting", [["opening", 9]])


@pytest.mark.parametrize("more", [{}, {"n": 2, "temperature": 0.9, "seed": 4}])
def test_a_stream_adds_up_to_the_whole_answer(server, more):
    whole = server.chat(xargs=LONG, max_tokens=40, **more)
    text, finish = {}, {}
    for event in server.chat(xargs=LONG, max_tokens=40, stream=True, **more):
        for choice in event.choices:
            text[choice.index] = text.get(choice.index, "") + (choice.delta.content or "")
            finish[choice.index] = choice.finish_reason or finish.get(choice.index)
    assert text == {c.index: c.message.content for c in whole.choices}
    assert finish == {c.index: c.finish_reason for c in whole.choices}


def test_a_stop_string_inside_the_opening_ends_the_response(server):
    text = server.chat(xargs=LONG).choices[0].message.content
    stop = text[6:10]
    response = server.chat(xargs=LONG, stop=stop)
    assert response.choices[0].message.content == text[: text.index(stop)]
    assert (response.choices[0].finish_reason, response.choices[0].stop_reason) == ("stop", stop)
    assert server.report(response.id)["choices"][0]["origins"] == [["opening", response.usage.completion_tokens]]


def test_logprobs_of_the_opening_are_the_base_models(server):
    response = server.chat(xargs=LONG, logprobs=True, top_logprobs=2, extra_body=IDS)
    content = response.choices[0].logprobs.content
    ids = response.choices[0].token_ids
    assert len(content) == len(ids)
    assert "".join(entry.token for entry in content) == response.choices[0].message.content
    scored = server.complete([*response.prompt_token_ids, *ids], max_tokens=1, extra_body={"prompt_logprobs": 0})
    own = [next(iter(entry.values()))["logprob"] for entry in scored.choices[0].prompt_logprobs[-len(ids) :]]
    assert [entry.logprob for entry in content] == pytest.approx(own, abs=2e-3)
    assert all(len(entry.top_logprobs) == 2 for entry in content)


def test_an_empty_answer_of_the_pilot_is_an_empty_opening(server, pilot):
    plain = server.chat()
    pilot.fault = "empty"
    response = server.chat(xargs=WSD)
    assert response.choices[0].message.content == plain.choices[0].message.content
    (choice,) = server.report(response.id)["choices"]
    assert (choice["reason"], choice["draft_tokens_kept"], choice["switch_index"]) == ("pilot_end", 0, None)


FAULTS = [
    ("http 500", 502, "HTTP 500"),
    ("slow", 504, "longer than timeout_s=5"),
    ("nonsense", 502, "no completion event"),
    ("breaks off", 502, "broke off"),
    ("down", 502, "cannot be reached"),
]


@pytest.fixture
def broken(request, pilot):
    """A pilot that fails in one way."""
    if request.param == "down":
        pilot.close()
        yield
        pilot.open()
    else:
        pilot.fault = request.param
        yield


@pytest.mark.parametrize(("broken", "status", "says"), FAULTS, indirect=["broken"], ids=[f[0] for f in FAULTS])
def test_a_pilot_that_fails_is_a_clear_error_or_plain_decoding(server, broken, status, says):
    # Beyond where the pilot breaks off.
    xargs = {**WSD, "wsd_gamma": 1, "wsd_max_draft": 64}
    errors = server.metric("align_spec:wsd_pilot_errors_total")
    with pytest.raises(openai.APIStatusError) as caught:
        server.chat(xargs=xargs, max_tokens=80)
    assert caught.value.status_code == status
    assert says in str(caught.value)

    response = server.chat(xargs={**xargs, "wsd_fallback": "base"}, max_tokens=80, extra_body=IDS)
    (choice,) = server.report(response.id)["choices"]
    assert (choice["reason"], choice["outcome"]) == ("failed", "completed")
    assert says in choice["error"]
    kept = choice["draft_tokens_kept"]
    ids = response.choices[0].token_ids
    plain = server.complete([*response.prompt_token_ids, *ids[:kept]], max_tokens=80 - kept, extra_body=IDS)
    assert plain.choices[0].token_ids == ids[kept:]
    assert server.metric("align_spec:wsd_pilot_errors_total") == errors + 2


def test_a_pilot_that_fails_ends_a_stream_with_an_error_event(server, pilot):
    pilot.fault = "nonsense"
    with pytest.raises(openai.APIError, match="no completion event"):
        for _ in server.chat(xargs=WSD, stream=True):
            pass


REFUSED = [
    ({"messages": [*MESSAGES, {"role": "assistant", "content": "First,"}]}, "its last message is the assistant's"),
    ({"max_tokens": 3}, "max_tokens=3 is smaller than wsd_window=6"),
    ({"frequency_penalty": 1}, "frequency_penalty=1.0 cannot be combined with wsd"),
    ({"response_format": {"type": "json_object"}}, "structured_outputs"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("kwargs", "says"), REFUSED, ids=[row[1][:20] for row in REFUSED])
def test_what_cannot_be_honoured_is_a_400_that_says_so(server, pilot, kwargs, says, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        server.chat(xargs=WSD, stream=stream, **kwargs)
    assert says in str(caught.value)
    assert not pilot.bodies


def test_a_client_that_leaves_ends_the_pilots_answer_too(server):
    server.wait_idle()
    stream = server.chat(
        xargs={**WSD, "wsd_gamma": 1}, max_tokens=800, temperature=1.0, stream=True, extra_body={"ignore_eos": True}
    )
    response_id = next(iter(stream)).id
    stream.close()
    server.wait_idle(timeout_s=10)
    assert server.report(response_id)["choices"][0]["outcome"] == "cancelled"
