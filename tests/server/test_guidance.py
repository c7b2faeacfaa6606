"""What a client sees of the methods over a companion, over HTTP with the openai client."""

import functools
import re

import openai
import pytest
import torch
from serving import MESSAGES, MODELS, PARTS, PROMPT
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from vllm_align_spec.bench.args_loop import args_loop

ARGS = {"args": True, "args_reward": "judge"}
IDS = {"return_token_ids": True, "ignore_eos": True}


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS / "base")


@functools.cache
def loop(weight, top_k, tokens):
    """The published loop's answer to `PROMPT`."""
    base = AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype=torch.float32).eval()
    judge = AutoModelForSequenceClassification.from_pretrained(MODELS / "judge", dtype=torch.float32).eval()
    prompt = tokenizer().encode(PROMPT, add_special_tokens=False)
    return args_loop(base, judge, prompt, weight=weight, top_k=top_k, max_new_tokens=tokens, stop_ids=())


@functools.cache
def pilots_answer(prompt, tokens):
    pilot = AutoModelForCausalLM.from_pretrained(MODELS / "pilot", dtype=torch.float32).eval()
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(tokens):
            ids.append(int(pilot(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def refused(call, *words):
    with pytest.raises(openai.BadRequestError) as error:
        call()
    for word in words:
        assert word in str(error.value), str(error.value)


def test_args_answers_as_the_published_loop_does(server):
    response = server.complete(xargs={**ARGS, "args_weight": 1.5, "args_top_k": 5}, extra_body=IDS)
    expected = loop(1.5, 5, 24)
    found = response.choices[0].token_ids
    assert found[:12] == expected[:12]
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 22
    (choice,) = server.report(response.id)["choices"]
    assert choice["method"] == "args"
    assert choice["companions"] == ["judge"]
    assert choice["rows"] >= 24
    assert choice["unanswered"] == 0
    assert server.metric("align_spec:guided_rows_total", method="args") >= 24


def test_a_judge_with_another_tokenizer_reads_the_text(server, foreign):
    from vllm_align_spec.companion.bridge import pieces

    _, judge, theirs = foreign
    base = AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype=torch.float32).eval()
    prompt, table = tokenizer().encode(PROMPT, add_special_tokens=False), pieces(tokenizer(), theirs, 4096)
    xargs = {"args": True, "args_reward": "foreign", "args_weight": 2.0, "args_top_k": 4}
    found = server.complete(xargs=xargs, extra_body=IDS, max_tokens=16).choices[0].token_ids
    close = 0
    for t, chosen in enumerate(found):
        with torch.inference_mode():
            values, candidates = base(torch.tensor([prompt + found[:t]])).logits[0, -1].topk(4)
            for j, candidate in enumerate(candidates.tolist()):
                text = theirs.encode(PROMPT) + [p for token in [*found[:t], candidate] for p in table[token]]
                hidden = judge.model(input_ids=torch.tensor([text])).last_hidden_state
                values[j] += 2.0 * judge.score(hidden[0, -1])[0]
        close += int((values > values.max() - 1e-2).sum() > 1)
        assert chosen == candidates[values.argmax()] or close
    assert close <= 1


def test_a_stream_says_the_same(server):
    whole = server.complete(xargs=ARGS).choices[0].text
    streamed = "".join(event.choices[0].text for event in server.complete(xargs=ARGS, stream=True) if event.choices)
    assert streamed == whole


def test_choices_and_neighbours_do_not_disturb_each_other(server):
    plain = server.complete(extra_body=IDS).choices[0].token_ids
    response = server.complete(xargs=ARGS, n=3, temperature=1, seed=5, extra_body=IDS)
    assert len({tuple(choice.token_ids) for choice in response.choices}) == 3
    assert server.complete(extra_body=IDS).choices[0].token_ids == plain
    assert len(server.report(response.id)["choices"]) == 3


def test_dera_at_one_is_the_companion_itself(server):
    prompt = tuple(tokenizer().encode(PROMPT, add_special_tokens=False))
    response = server.complete(xargs={"dera": True, "dera_lambda": 1}, extra_body=IDS)
    assert response.choices[0].token_ids == pilots_answer(prompt, 24)


def test_a_persona_is_the_companions_alone(server):
    without = server.chat(xargs={"pad": True, "pad_weight": 3})
    with_persona = server.chat(xargs={"pad": True, "pad_weight": 3, "pad_persona": "You write like a pirate." * 8})
    assert without.usage.prompt_tokens == with_persona.usage.prompt_tokens
    for response in (without, with_persona):
        (choice,) = server.report(response.id)["choices"]
        assert (choice["method"], choice["companions"]) == ("pad", ["aligned"])
    in_parts = server.chat(PARTS, xargs={"pad": True, "pad_weight": 3, "pad_persona": "You write like a pirate." * 8})
    assert in_parts.choices[0].message == with_persona.choices[0].message


def test_a_grammar_holds(server):
    response = server.chat(xargs={"genarm": True}, extra_body={"structured_outputs": {"choice": ["left", "right"]}})
    assert response.choices[0].message.content in ("left", "right")
    response = server.chat(
        xargs={**ARGS, "args_weight": -5.0}, extra_body={"structured_outputs": {"regex": "[a-c]{3}(, [a-c]{3})?"}}
    )
    assert re.fullmatch("[a-c]{3}(, [a-c]{3})?", response.choices[0].message.content)


def test_stop_strings_and_the_bound_on_tokens(server):
    text = server.complete(xargs=ARGS, max_tokens=20).choices[0].text
    stop = text[len(text) // 2 :][:4]
    stopped = server.complete(xargs=ARGS, max_tokens=20, stop=[stop]).choices[0]
    assert stopped.text == text.split(stop)[0]
    assert stopped.finish_reason == "stop"
    assert server.complete(xargs=ARGS, max_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize(
    ("xargs", "kwargs", "words"),
    [
        ({"args": 1}, {}, ["args_reward is missing", "'judge' | 'judge-other'"]),
        ({"args": 1, "args_reward": "judy"}, {}, ["args_reward='judy'", "'judge' | 'judge-other'"]),
        ({"args": 1, "args_reward": "aligned"}, {}, ["args_reward='aligned'", "'judge' | 'judge-other'"]),
        ({**ARGS, "args_top_k": 0}, {}, ["args_top_k=0", ">= 1"]),
        ({**ARGS, "args_top_k": 41}, {}, ["args_top_k=41", "1 to 40"]),
        ({**ARGS, "args_weight": 1e9}, {}, ["args_weight=1000000000", ">= -1000"]),
        ({**ARGS, "args_weight": [1.0, 2.0]}, {}, ["args_weight=[1.0, 2.0]", "one for each reward"]),
        ({**ARGS, "args_wait": 1}, {}, ["args_wait=1", "args_weight"]),
        ({"args_weight": 1.0}, {}, ["args_weight=1.0", "without 'args'"]),
        ({"dera": 1, "dera_lambda": -1}, {}, ["dera_lambda=-1", ">= 0"]),
        ({"dera": 1, "dera_model": "judge"}, {}, ["dera_model='judge'", "'aligned'"]),
        ({"pad": 1, "pad_persona": "a pirate"}, {}, ["pad_persona='a pirate'", "chat"]),
        ({"genarm": 1, **ARGS}, {}, ["genarm", "args", "cannot be combined"]),
        (ARGS, {"max_tokens": 600}, ["max_tokens=600", "'judge' follows 512"]),
        (ARGS, {"presence_penalty": 1.0}, ["presence_penalty=1.0", "args"]),
        (ARGS, {"logit_bias": {"5": 1}}, ["logit_bias", "args"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_honoured_is_a_400(server, xargs, kwargs, words, stream):
    refused(lambda: server.complete(xargs=xargs, stream=stream, **kwargs), *words)


def test_not_a_number_over_http(server):
    refused(lambda: server.complete(xargs={**ARGS, "args_weight": "NaN"}), "args_weight='NaN'")


def test_mean_reward_rises(server):
    """A hundred tokens of difference; the figures with their intervals are `bench args`'."""
    judge = AutoModelForSequenceClassification.from_pretrained(MODELS / "judge-other", dtype=torch.float32).eval()

    def reward(xargs):
        found = []
        for seed in range(6):
            said = server.chat(xargs=xargs, temperature=1.0, seed=seed, max_tokens=60).choices[0].message.content
            text = tokenizer().apply_chat_template([*MESSAGES, {"role": "assistant", "content": said}], tokenize=False)
            ids = tokenizer().encode(text, add_special_tokens=False)
            with torch.inference_mode():
                found.append(judge(torch.tensor([ids])).logits[0, 0].item())
        return sum(found) / len(found)

    assert reward({**ARGS, "args_weight": 2.0}) > reward(None)
