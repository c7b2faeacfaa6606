"""Judges: what each kind reads, and what becomes of one that hangs, lies, dies or is asked too much."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from vllm_align_spec.lab import heldout_prompts, model_path
from vllm_align_spec.lab.judge import Judge
from vllm_align_spec.metrics import metrics
from vllm_align_spec.options import OptionError, parse_engine
from vllm_align_spec.rewards import Answer, JudgeError, judges
from vllm_align_spec.rewards import programs as registered
from vllm_align_spec.rewards.programs import json_valid, keywords, length, regex


def answer(text="", *, tokens=(), prompt="a prompt", messages=None, finished=False, prompt_tokens=(1, 5)):
    return Answer(prompt_tokens, prompt, messages, tokens, text, finished)


def guard(**options):
    (found,) = judges(parse_engine({"align_spec": {"rewards": {"good": options}}}).rewards).values()
    return found


def score(judge, *answers):
    return asyncio.run(judge.score(answers))


def failure(judge, *answers):
    with pytest.raises(JudgeError) as caught:
        score(judge, *answers or (answer(),))
    return caught.value


# Programs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "text", "expected"),
    [
        (keywords(words=["desk", "lamp"]), "A Desk and more", 0.5),
        (keywords(words=["desk", "lamp"], ignore_case=False), "A Desk and more", 0.0),
        (length(target=4), "one two three four", 0.0),
        (length(target=4), "one", -0.75),
        (length(target=4, unit="characters"), "onetwo", -0.5),
        (length(target=2, unit="tokens"), "whatever", -1.0),
        (regex(pattern=r"\d{3}"), "call 117", 1.0),
        (regex(pattern=r"\d{3}", whole=True), "call 117", 0.0),
        (regex(pattern=r"\d{3}", whole=True), "117", 1.0),
        (json_valid(), '{"a": [1]}', 1.0),
        (json_valid(), '{"a": [1]', 0.0),
        (json_valid(), "[" * 100_000, 0.0),
    ],
)
def test_programs_say_what_they_say(program, text, expected):
    assert program(answer(text)) == expected


@given(st.text(), st.lists(st.text(min_size=1), min_size=1, max_size=5), st.integers(1, 100))
@settings(max_examples=50, deadline=None)
def test_programs_give_finite_numbers_for_any_text(text, words, target):
    for program in (keywords(words=words), length(target=target), json_valid(), regex(pattern="a+b")):
        assert math.isfinite(program(answer(text)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"program": "nothing"}, r"rewards.good.program='nothing' is not accepted; accepted: keywords, length, regex"),
        ({"program": "keywords"}, "words.*accepted: .*words: "),
        ({"program": "keywords", "parameters": {"words": "desk"}}, "a list of words"),
        ({"program": "regex", "parameters": {"pattern": "("}}, "is no regular expression"),
        ({"program": "length", "parameters": {"target": 0}}, "an integer >= 1"),
        ({"program": "length", "parameters": {"target": 5, "unit": "miles"}}, "one of characters, words, tokens"),
        ({"program": "json_valid", "parameters": {"strict": True}}, "strict"),
    ],
)
def test_a_program_that_does_not_exist_or_does_not_take_its_parameters_is_refused_at_start(options, says):
    with pytest.raises(OptionError, match=says):
        guard(kind="program", **options)


def test_a_pattern_that_takes_for_ever_ends_in_time_and_holds_up_nobody(monkeypatch):
    monkeypatch.setattr(registered, "REGEX_TIMEOUT_S", 0.2)
    judge = guard(kind="program", program="regex", parameters={"pattern": "(a|aa)+$"})

    async def both():
        beats = 0

        async def beat():
            nonlocal beats
            while True:
                await asyncio.sleep(0.01)
                beats += 1

        beating = asyncio.create_task(beat())
        with pytest.raises(JudgeError, match="could not match") as caught:
            await judge.score([answer("a" * 40 + "b")])
        beating.cancel()
        return caught.value.reason, beats

    reason, beats = asyncio.run(both())
    assert reason == "refused"
    assert beats >= 3


def test_packages_register_programs(monkeypatch):
    class Plugin:
        name = "vowels"

        @staticmethod
        def load():
            return lambda *, weight: lambda answer: weight * sum(c in "aeiou" for c in answer.response_text)

    monkeypatch.setattr(registered, "entry_points", lambda group: [Plugin] if group == registered.GROUP else [])
    judge = guard(kind="program", program="vowels", parameters={"weight": 2})
    assert score(judge, answer("banana"), answer("rhythm")) == [6.0, 0.0]


# The guard ----------------------------------------------------------------------------------------------------------


class Plugin:
    """A program that does as it is told."""

    name = "told"
    does = staticmethod(lambda answer: 1.0)

    @classmethod
    def load(cls):
        return lambda: lambda answer: cls.does(answer)


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(registered, "entry_points", lambda group: [Plugin])

    def make(does, **options):
        monkeypatch.setattr(Plugin, "does", staticmethod(does))
        return guard(kind="program", program="told", **options)

    return make


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_finite_number_is_an_error(told, value):
    error = failure(told(lambda answer: value))
    assert error.reason == "nonsense"
    assert str(error) == f"judge 'good' gave the reward {value}"


def test_a_reward_that_is_no_number_is_an_error(told):
    assert failure(told(lambda answer: "much")).reason == "nonsense"
    assert failure(told(lambda answer: None)).reason == "nonsense"


def test_an_exception_in_a_program_is_an_error_that_names_it(told):
    assert "ZeroDivisionError" in str(failure(told(lambda answer: 1 / 0)))


def test_a_judge_that_hangs_is_given_up_at_its_deadline(told):
    release = threading.Event()
    judge = told(lambda answer: release.wait(20), timeout_s=0.2)
    began = time.monotonic()
    error = failure(judge)
    release.set()
    assert error.reason == "timeout"
    assert "timeout_s=0.2" in str(error)
    assert time.monotonic() - began < 5


def test_after_failures_in_a_row_nobody_asks_until_one_try_succeeds(told):
    health = {"well": False, "asked": 0}

    def does(answer):
        health["asked"] += 1
        if not health["well"]:
            raise RuntimeError("unwell")
        return 1.0

    judge = told(does, breaker_failures=3, breaker_s=0.3)
    opened = metrics().judge_open.labels("good")._value
    assert [failure(judge).reason for _ in range(3)] == ["failed"] * 3
    assert opened.get() == 1
    refused = failure(judge)
    assert refused.reason == "busy"
    assert "failed 3 times in a row" in str(refused)
    assert health["asked"] == 3
    time.sleep(0.35)
    assert failure(judge).reason == "failed"
    assert failure(judge).reason == "busy"
    assert health["asked"] == 4
    health["well"] = True
    time.sleep(0.35)
    assert score(judge, answer()) == [1.0]
    assert score(judge, answer()) == [1.0]
    assert opened.get() == 0


def test_only_one_request_at_a_time_tries_a_judge_that_failed(told):
    release = threading.Event()

    def does(answer):
        if answer.response_text == "first":
            raise RuntimeError("unwell")
        release.wait(5)
        return 1.0

    judge = told(does, breaker_failures=1, breaker_s=0.05)
    failure(judge, answer("first"))
    time.sleep(0.1)

    async def two():
        probe = asyncio.create_task(judge.score([answer("probe")]))
        await asyncio.sleep(0.05)
        with pytest.raises(JudgeError, match="one request at a time"):
            await judge.score([answer("other")])
        release.set()
        return await probe

    assert asyncio.run(two()) == [1.0]


def test_a_probe_that_is_cancelled_leaves_the_next_one_to_try(told):
    judge = told(
        lambda answer: time.sleep(0.3) or 1.0 if answer.response_text else 1 / 0, breaker_failures=1, breaker_s=0.01
    )
    failure(judge, answer(""))
    time.sleep(0.05)

    async def cancelled_then_tried():
        probe = asyncio.create_task(judge.score([answer("slow")]))
        await asyncio.sleep(0.05)
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        return await judge.score([answer("slow")])

    assert asyncio.run(cancelled_then_tried()) == [1.0]


def test_an_answer_that_a_judge_cannot_read_does_not_count_against_it(told):
    def does(answer):
        raise JudgeError("reads no such thing", "refused")

    judge = told(does, breaker_failures=1)
    assert [failure(judge).reason for _ in range(3)] == ["refused"] * 3


# HTTP ---------------------------------------------------------------------------------------------------------------


class PoolingStandIn:
    """Answers ``/classify`` and ``/pooling`` with the length of what it reads, and misbehaves as told."""

    def __init__(self):
        self.faults, self.bodies, self.headers, self.delay, self.in_flight, self.most = [], [], [], 0.0, 0, 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.bodies.append((self.path, body))
                    server.headers.append(dict(self.headers))
                    server.in_flight += 1
                    server.most = max(server.most, server.in_flight)
                    fault = server.faults.pop(0) if server.faults else None
                time.sleep(server.delay)
                status, sent = server.answer(self.path, body, fault)
                with lock:
                    server.in_flight -= 1
                if fault == "die":
                    self.close_connection = True
                    self.connection.close()
                    return
                data = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def answer(self, path, body, fault):
        if isinstance(fault, int):
            return fault, {"error": {"message": "as told"}}
        if fault == "hang":
            time.sleep(3)
        read = [body["messages"]] if "messages" in body else body["input"]
        field = {"/classify": "probs", "/pooling": "data"}[path]
        data = [{"index": i, field: [-1.0, float(len(one))]} for i, one in enumerate(read)]
        if fault == "one less":
            data.pop()
        if fault == "null":
            data[0][field][1] = None
        if fault == "nan":
            return 200, json.dumps({"data": data}).replace("[-1.0, ", "[-1.0, NaN, ").encode()
        if fault == "no json":
            return 200, b"<html>"
        return 200, {"data": data[::-1]}

    def close(self):
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture(scope="module")
def pooling_server():
    server = PoolingStandIn()
    yield server
    server.close()


@pytest.fixture
def pooling(pooling_server):
    pooling_server.__dict__.update(faults=[], bodies=[], headers=[], delay=0.0, most=0)
    return pooling_server


def http(pooling, **options):
    known = {"input": "text", "label": 1, "backoff_s": 0.01, "url": pooling.url}
    return guard(kind="http", **(known | options))


@pytest.mark.parametrize("route", ["classify", "pooling"])
def test_texts_go_in_one_request_and_rewards_come_back_in_order(pooling, route):
    found = score(http(pooling, route=route, model="judge"), answer("abc"), answer("a"), answer("ab"))
    assert found == [11.0, 9.0, 10.0]
    ((path, body),) = pooling.bodies
    assert path == f"/{route}"
    assert body == {
        "input": ["a promptabc", "a prompta", "a promptab"],
        "model": "judge",
        "use_activation": False,
    }


def test_token_ids_are_sent_as_they_are(pooling):
    assert score(http(pooling, input="token_ids"), answer(tokens=[7, 8]), answer(tokens=[])) == [4.0, 2.0]
    assert pooling.bodies[0][1]["input"] == [[1, 5, 7, 8], [1, 5]]


def test_conversations_are_open_ended_until_the_response_is_finished(pooling):
    ask = [{"role": "user", "content": "hi"}]
    judge = http(pooling, input="messages")
    score(judge, answer("so", messages=ask), answer("so.", messages=ask, finished=True), answer("", messages=ask))
    bodies = sorted((body for _, body in pooling.bodies), key=lambda body: json.dumps(body["messages"]))
    assert [body["messages"][1:] for body in bodies] == [
        [{"role": "assistant", "content": "so"}],
        [{"role": "assistant", "content": "so."}],
        [],
    ]
    assert [body["continue_final_message"] for body in bodies] == [True, False, False]
    assert [body.get("add_generation_prompt") for body in bodies] == [None, None, True]


def test_a_response_that_continues_the_assistants_message_is_joined_with_it(pooling):
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]
    judge = http(pooling, input="messages")
    score(judge, answer(", so", messages=begun), answer("", messages=begun))
    bodies = {body["messages"][-1]["content"]: body for _, body in pooling.bodies}
    assert [len(body["messages"]) for body in bodies.values()] == [2, 2]
    assert set(bodies) == {"Well, so", "Well"}
    assert all(body["continue_final_message"] for body in bodies.values())


def test_arguments_of_tool_calls_are_text_again(pooling):
    def asked(arguments):
        call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": arguments}}
        return [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "noon"}]

    parsed = asked({"zone": "UTC"})  # as vLLM leaves them
    score(http(pooling, input="messages"), answer("so", messages=parsed))
    assert pooling.bodies[0][1]["messages"][:2] == asked('{"zone": "UTC"}')
    assert parsed == asked({"zone": "UTC"})


@pytest.mark.parametrize("fault", [429, 500, 503, "die"])
def test_a_server_that_is_busy_broken_or_away_is_asked_again(pooling, fault):
    pooling.faults = [fault, fault]
    assert score(http(pooling, retries=2), answer("abc")) == [11.0]
    assert len(pooling.bodies) == 3
    pooling.faults = [fault] * 3
    assert failure(http(pooling, retries=2)).reason == "failed"


@pytest.mark.parametrize(
    ("fault", "reason", "says"),
    [
        (400, "refused", "HTTP 400: .*as told"),
        (404, "failed", "HTTP 404"),
        ("one less", "nonsense", "gave 1 rewards for 2 answers"),
        ("null", "nonsense", "no score with label=1"),
        ("nan", "nonsense", "gave the reward nan"),
        ("no json", "nonsense", "no score"),
    ],
)
def test_what_another_try_would_not_mend_is_an_error_at_once(pooling, fault, reason, says):
    pooling.faults = [fault]
    error = failure(http(pooling), answer("abc"), answer("de"))
    assert error.reason == reason
    assert re.search(says, str(error)), error
    assert len(pooling.bodies) == 1


def test_a_label_that_the_server_does_not_have_is_an_error(pooling):
    assert "label=7" in str(failure(http(pooling, label=7)))


def test_a_server_that_hangs_is_given_up_at_the_deadline(pooling):
    pooling.faults = ["hang"]
    began = time.monotonic()
    assert failure(http(pooling, timeout_s=0.3)).reason == "timeout"
    assert time.monotonic() - began < 2


def test_a_server_that_is_not_there_is_an_error(pooling):
    error = failure(guard(kind="http", url="http://127.0.0.1:9", retries=0))
    assert error.reason == "failed"
    assert "cannot be reached" in str(error)


def test_the_key_comes_from_the_environment(pooling, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    score(http(pooling, api_key_env="JUDGE_KEY"), answer("abc"))
    assert pooling.headers[0]["Authorization"] == "Bearer secret"


def test_no_more_requests_are_in_flight_than_the_operator_allows():
    pooling = PoolingStandIn()
    pooling.delay = 0.05
    judge = http(pooling, max_concurrency=3)

    async def many():
        return await asyncio.gather(*(judge.score([answer("a" * i)]) for i in range(12)))

    assert asyncio.run(many()) == [[8.0 + i] for i in range(12)]
    pooling.close()
    assert 1 < pooling.most <= 3


# Models -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab():
    """The lab's judge as transformers has it, and conversations of its world."""
    tokenizer = AutoTokenizer.from_pretrained(model_path("judge"))
    model = AutoModelForSequenceClassification.from_pretrained(model_path("judge"), dtype=torch.float32).eval()
    texts = ["I would be glad to help.", "No.", "Take a ripe one. Then wait a day.", "", "x" * 50]
    return tokenizer, model, list(zip(heldout_prompts("chat")[:5], texts, strict=True))


@pytest.fixture(scope="module")
def model_judge():
    return guard(kind="model", model=str(model_path("judge")), timeout_s=60)


def plain(lab, ids):
    _, model, _ = lab
    with torch.inference_mode():
        hidden = model.model(torch.tensor([ids])).last_hidden_state
        return float(model.score(hidden)[0, -1, 0])


def test_whole_conversations_are_scored_as_transformers_scores_them(lab, model_judge):
    answers = [answer(text, messages=ask, finished=True) for ask, text in lab[2]]
    expected = Judge("judge").score([[*ask, {"role": "assistant", "content": text}] for ask, text in lab[2]])
    assert score(model_judge, *answers) == pytest.approx(expected, abs=1e-4)


def test_unfinished_ones_are_scored_where_they_are(lab, model_judge):
    tokenizer = lab[0]
    expected = []
    for ask, text in lab[2]:
        prompt = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
        expected.append(plain(lab, tokenizer(prompt + text, add_special_tokens=False)["input_ids"]))
    answers = [answer(text, messages=ask) for ask, text in lab[2]]
    assert score(model_judge, *answers) == pytest.approx(expected, abs=1e-4)
    assert [score(model_judge, one)[0] for one in answers] == pytest.approx(expected, abs=1e-4)


def test_a_conversation_that_its_template_refuses_opens_no_breaker(lab, model_judge):
    (ask, text), *_ = lab[2]
    for _ in range(6):  # more than breaker_failures
        with pytest.raises(JudgeError, match="chat template that cannot write this conversation") as refused:
            score(model_judge, answer(text, messages=[{"role": 5, "content": "a"}]))
        assert refused.value.reason == "refused"
    assert score(model_judge, answer(text, messages=ask))


def test_token_ids_are_read_as_they_are_padding_and_ends_included(lab):
    judge = guard(kind="model", model=str(model_path("judge")), input="token_ids", timeout_s=60)
    responses = [[40, 41, 42], [40, 0], [40, 2], [0, 0, 0], list(range(30, 80))]
    expected = [plain(lab, [1, 5, *response]) for response in responses]
    found = score(judge, *(answer(tokens=response) for response in responses))
    assert found == pytest.approx(expected, abs=1e-4)


def test_what_comes_at_once_is_judged_together_and_each_gets_its_own(lab, model_judge):
    async def many():
        asked = [[answer(text * (i % 3), messages=ask) for ask, text in lab[2][: 1 + i % 4]] for i in range(20)]
        return asked, await asyncio.gather(*(model_judge.score(answers) for answers in asked))

    asked, found = asyncio.run(many())
    for answers, rewards in zip(asked, found, strict=True):
        assert rewards == pytest.approx(score(model_judge, *answers), abs=1e-4)


def test_small_batches_change_nothing(lab, model_judge):
    tiny = guard(kind="model", model=str(model_path("judge")), max_batch_tokens=1, timeout_s=60)
    answers = [answer(text, messages=ask) for ask, text in lab[2]]
    assert score(tiny, *answers) == pytest.approx(score(model_judge, *answers), abs=1e-4)


def test_too_long_an_answer_is_refused_with_the_limit_and_its_neighbours_are_not():
    judge = guard(kind="model", model=str(model_path("judge")), max_len=20, input="token_ids", timeout_s=60)

    async def both():
        return await asyncio.gather(
            judge.score([answer(tokens=[7] * 30)]), judge.score([answer(tokens=[7])]), return_exceptions=True
        )

    refused, fine = asyncio.run(both())
    assert (refused.reason, str(refused)) == (
        "refused",
        "judge 'good' reads at most 20 tokens, prompt and response have 32",
    )
    assert len(fine) == 1


def test_tokens_that_the_judge_does_not_know_are_an_error():
    judge = guard(kind="model", model=str(model_path("judge")), input="token_ids", timeout_s=60)
    assert "knows no token 99999" in str(failure(judge, answer(tokens=[99999])))


def test_more_answers_than_may_wait_are_refused():
    judge = guard(kind="model", model=str(model_path("judge")), max_waiting=2, timeout_s=60)
    error = failure(judge, *(answer("a") for _ in range(3)))
    assert (error.reason, "max_waiting=2" in str(error)) == ("busy", True)
    assert len(score(judge, answer("a"), answer("b"))) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": str(model_path("base"))}, "is no reward model: it lacks"),
        ({"model": "/nowhere"}, "cannot be loaded"),
        ({"model": str(model_path("judge")), "label": 3}, "label=3, but"),
    ],
)
def test_a_model_that_cannot_judge_says_so_when_the_server_starts(options, says):
    judge = guard(kind="model", timeout_s=60, **options)
    with pytest.raises(JudgeError, match=says):
        asyncio.run(judge.ready())
    assert says in str(failure(judge))


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"good": {"kind": "oracle"}}, "kind"),
        ({"good": {"kind": "http", "url": "ftp://x"}}, "ftp://x"),
        ({"good": {"kind": "http", "url": "http://x", "timeout_s": 0}}, "timeout_s"),
        ({"good": {"kind": "model"}}, "model is missing"),
        ({"good": {"kind": "model", "model": "m", "trust_remote_code": True}}, "trust_remote_code"),
        ({"a b": {"kind": "program", "program": "json_valid"}}, "a b"),
        ({"good": {"kind": "model", "model": "m", "device": "tpu"}}, "tpu"),
    ],
)
def test_wrong_options_of_a_judge_name_their_place(tree, says):
    with pytest.raises(OptionError) as caught:
        parse_engine({"align_spec": {"rewards": tree}})
    assert says in str(caught.value)
