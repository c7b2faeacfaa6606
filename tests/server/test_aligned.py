"""What a client sees of grammar-aligned sampling, over HTTP with the openai client."""

from __future__ import annotations

import json
import re

import openai
import pytest
from serving import MESSAGES, start_server, stop_server

SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "record", "schema": SCHEMA}}
BITS = {"regex": "[01]{6}"}
"""Short and likely enough that `exact` needs few attempts on the lab's model."""
ASK = [{"role": "user", "content": "Write 6 random bits."}]


def sample(server, mode, *, grammar=BITS, xargs=None, **kwargs):
    extra = {"structured_outputs": grammar, **kwargs.pop("extra_body", {})}
    kwargs = {"temperature": 1.0, "max_tokens": 24, **kwargs}
    return server.chat(ASK, xargs={"asap": mode, **(xargs or {})}, extra_body=extra, **kwargs)


def refused(server, mode="adaptive", **kwargs):
    with pytest.raises(openai.BadRequestError) as caught:
        sample(server, mode, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("mode", ["adaptive", "exact", "weighted"])
def test_a_response_keeps_to_the_grammar_and_has_a_report(server, mode):
    response = sample(server, mode, xargs={"asap_max_attempts": 512} if mode == "exact" else None)
    assert re.fullmatch("[01]{6}", response.choices[0].message.content)
    assert response.choices[0].finish_reason == "stop"
    assert response.usage.completion_tokens == 7
    (choice,) = server.report(response.id)["choices"]
    assert (choice["method"], choice["mode"], choice["outcome"]) == ("asap", mode, "completed")
    assert choice["attempts"] >= 1
    assert choice["log_weight"] <= 0
    assert choice["log_mass_at_root"] <= 0
    assert choice["store"]["nodes"] > 0


def test_response_format_of_the_openai_api_is_a_grammar_too(server):
    response = server.chat(MESSAGES, xargs={"asap": "adaptive"}, temperature=1.0, max_tokens=60, response_format=FORMAT)
    assert set(json.loads(response.choices[0].message.content)) == {"name"}


def test_a_stream_brings_the_whole_text_once_it_is_accepted(server):
    stream = server.client.chat.completions.create(
        model="base",
        messages=ASK,
        temperature=1.0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"structured_outputs": BITS, "vllm_xargs": {"asap": "exact", "asap_max_attempts": 512}},
    )
    pieces, finish, usage = [], None, None
    for event in stream:
        usage = event.usage or usage
        for choice in event.choices:
            if choice.delta.content:
                pieces.append(choice.delta.content)
            finish = choice.finish_reason or finish
    assert len(pieces) == 1
    assert re.fullmatch("[01]{6}", pieces[0])
    assert (finish, usage.completion_tokens) == ("stop", 7)


def test_choices_are_lanes_of_their_own_and_weights_give_an_estimate(server):
    response = sample(server, "weighted", n=8, seed=3)
    texts = [choice.message.content for choice in response.choices]
    assert all(re.fullmatch("[01]{6}", text) for text in texts)
    assert len(set(texts)) > 1
    report = server.report(response.id)["choices"]
    estimate = report[0]["estimate"]
    assert estimate["n"] == 8
    assert 0 < estimate["z"] <= 1
    assert 1 <= estimate["effective_sample_size"] <= 8
    assert all(choice["estimate"] == estimate for choice in report)


def test_one_seed_gives_one_response_on_a_trie_that_nobody_else_uses(server):
    texts = [
        sample(server, "weighted", seed=11, extra_body={"cache_salt": salt}).choices[0].message.content
        for salt in ("seed a", "seed b")
    ]
    assert texts[0] == texts[1]


def test_logprobs_are_the_models_own_and_cover_the_response(server):
    response = sample(server, "adaptive", logprobs=True, top_logprobs=1)
    entries = response.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries[:6]) == response.choices[0].message.content
    assert len(entries) == 7
    assert all(entry.logprob <= 0 for entry in entries)


def test_tenants_do_not_share_what_was_learnt(server):
    def mass(salt):
        response = sample(server, "adaptive", extra_body={"cache_salt": salt}, grammar={"regex": "[01]{4}"})
        return server.report(response.id)["choices"][0]["log_mass_at_root"]

    first = [mass("tenant a") for _ in range(4)]
    assert first[-1] <= first[0]
    assert mass("tenant b") == pytest.approx(first[0], abs=2.0)
    assert (
        server.report(
            sample(server, "adaptive", extra_body={"cache_salt": "tenant c"}, grammar={"regex": "[01]{4}"}).id
        )["choices"][0]["nodes_added"]
        >= 5
    )


def test_a_grammar_that_accepts_nothing_in_time_is_an_error_that_says_so(server):
    with pytest.raises(openai.UnprocessableEntityError, match=r"no attempt of 3 was accepted.*asap_max_attempts"):
        sample(server, "exact", max_tokens=3, xargs={"asap_max_attempts": 3})
    response = sample(server, "exact", max_tokens=3, n=2, xargs={"asap_max_attempts": 2})
    assert [choice.finish_reason for choice in response.choices] == ["abort"] * 2
    assert "no attempt of 2 was accepted" in response.choices[0].stop_reason


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"grammar": None}, "asap='adaptive' needs a grammar"),
        ({"mode": "exactly"}, "asap='exactly' is not accepted; accepted: 'adaptive' | 'exact' | 'weighted'"),
        ({"temperature": 0}, "temperature=0 cannot be combined with asap"),
        ({"top_p": 0.9}, "top_p=0.9 cannot be combined with asap; send top_p=1"),
        ({"extra_body": {"top_k": 40}}, "top_k=40"),
        ({"extra_body": {"min_p": 0.1}}, "min_p=0.1"),
        ({"presence_penalty": 0.5}, "presence_penalty=0.5"),
        ({"extra_body": {"repetition_penalty": 1.2}}, "repetition_penalty=1.2"),
        ({"logit_bias": {"5": 1}}, "logit_bias=True"),
        ({"extra_body": {"bad_words": ["x"]}}, "bad_words"),
        ({"extra_body": {"allowed_token_ids": [5, 6]}}, "allowed_token_ids"),
        ({"extra_body": {"ignore_eos": True}}, "ignore_eos=True"),
        ({"stop": ["1"]}, "stop=['1']"),
        ({"xargs": {"asap_max_attempts": 0}}, "asap_max_attempts=0 is not accepted; accepted: an integer >= 1"),
        ({"xargs": {"asap_attempts": 3}}, "unknown option asap_attempts=3"),
        ({"xargs": {"wsd": "shared"}}, "wsd and asap cannot be combined"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_honoured_is_a_400_that_names_it(server, kwargs, says):
    assert says in refused(server, **kwargs)


def test_a_grammar_that_vllm_refuses_is_refused_as_ever(server):
    assert "grammar" in refused(server, grammar={"grammar": "root ::= ("}).lower()


def test_metrics_count_attempts_and_show_the_store(server):
    before = server.metric("align_spec:asap_attempts_count", mode="exact")
    response = sample(server, "exact", xargs={"asap_max_attempts": 512})
    choice = server.report(response.id)["choices"][0]
    assert server.metric("align_spec:asap_attempts_count", mode="exact") == before + 1
    assert server.metric("align_spec:asap_nodes") >= choice["nodes_added"]
    assert server.metric("align_spec:asap_bytes") > 0
    assert server.metric("align_spec:asap_mass_at_root_count") > 0
    assert server.metric("align_spec:asap_host_seconds_count") > 0
    assert server.metric("align_spec:verified_grammar_bytes") > 0


@pytest.mark.slow
def test_tries_survive_a_restart_and_a_foreign_file_is_refused_by_name(tmp_path):
    options = {"align_spec": {"asap": {"save_path": str(tmp_path), "save_interval_s": 3600}}}
    arguments = ["--additional-config", json.dumps(options), "--max-model-len", "256", "--shutdown-timeout", "20"]

    def run():
        server = start_server(tmp_path / "log", *arguments)
        try:
            response = sample(server, "adaptive")
            return server.report(response.id)["choices"][0]
        finally:
            stop_server(server)

    first = run()
    (file,) = tmp_path.glob("*.safetensors")
    second = run()
    assert second["store"]["nodes"] >= first["store"]["nodes"]
    assert second["log_h0"][0] <= first["log_mass_at_root"] + 1e-6
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    third = run()
    assert third["nodes_added"] >= 7  # from nothing
    assert file.name in (tmp_path / "log").read_text()
