"""Admission, dispatch and reports, with a stand-in for the engine behind them."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import re
from contextlib import aclosing
from types import SimpleNamespace

import msgspec
import pytest
from transformers import AutoTokenizer
from vllm.config import StructuredOutputsConfig
from vllm.exceptions import GenerationError, GracefulHTTPError, VLLMValidationError
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from vllm_align_spec.engine import frontend
from vllm_align_spec.engine.facade import AlignSpecLogitsProcessor
from vllm_align_spec.lab import model_path
from vllm_align_spec.options import OptionError, ReportOptions, WsdOptions
from vllm_align_spec.report import INTERVAL_S, UNHURRIED_S, ReportCollector, ReportStore
from vllm_align_spec.strategies.base import Chunk, EngineFacts, PilotError, Request, Scored
from vllm_align_spec.strategies.wsd import WsdStrategy

ANSWER = list(range(300, 330))
LORA = SimpleNamespace(lora_name="lora", lora_int_id=1, lora_path="somewhere", load_inplace=True)
PROMPT = [1, 50, 60, 70]
SHARED = {"wsd": "shared", "wsd_gamma": 0.5}
PILOT = {"wsd": {"pilot": {"url": "http://127.0.0.1:9/v1", "model": "pilot"}}}


class StandIn:
    """As much of an ``AsyncLLM`` as the front end touches. ``original`` answers with the prompt's rest and ANSWER."""

    def __init__(self, speculative=True, additional=None, worker=None, **speculative_options):
        tokenizer = AutoTokenizer.from_pretrained(model_path("base"))
        self.model_config = SimpleNamespace(
            max_model_len=64,
            logprobs_mode="raw_logprobs",
            max_logprobs=20,
            is_diffusion=False,
            get_vocab_size=lambda: 4096,
        )
        options = {"method": "draft_model", "draft_sample_method": "greedy", "rejection_sample_method": "standard"}
        options |= {"enable_adaptive_verification": False, **speculative_options}
        dynamic = options.pop("dynamic", False)
        config = SimpleNamespace(**options, uses_dynamic_speculative_decoding=lambda: dynamic) if speculative else None
        self.vllm_config = SimpleNamespace(
            device_config=SimpleNamespace(device_type="cpu"),
            additional_config={"align_spec": additional or {}},
            model_config=self.model_config,
            speculative_config=config,
            structured_outputs_config=StructuredOutputsConfig(),
            parallel_config=SimpleNamespace(enable_batch_sharded_sampling=False),
        )
        self.renderer = SimpleNamespace(
            tokenizer=tokenizer, get_tokenizer=lambda: tokenizer, get_eos_token_id=lambda: tokenizer.eos_token_id
        )
        self.input_processor = SimpleNamespace(generation_config_fields={"eos_token_id": [2, 3]})
        self.output_processor = SimpleNamespace(stream_interval=1)
        self.engine_core = self
        self.worker = worker or {"reason": "switched", "kept": 6, "steps": 3, "starts": [0, 5, 8]}
        self.calls = []
        self.closed = 0
        self.rpcs = []

    async def call_utility_all_async(self, *args):
        self.rpcs.append(args)
        what, ids = args[3]
        assert what == "reports"
        return [[None, {i: {"wsd": self.worker} for i in ids}]]


async def original(engine, prompt, params, request_id, **kwargs):
    """One token an output, as DELTA has it: first the held-back token, if our key says so."""
    engine.calls.append((prompt, params, request_id, kwargs))
    extra = params.extra_args or {}
    tokens = [extra["align_spec_first_token"]] if "align_spec_first_token" in extra else []
    tokens = [*tokens, *ANSWER][: params.max_tokens]
    flat = FlatLogprobs()
    try:
        for place, token in enumerate(tokens):
            await asyncio.sleep(0)
            flat.append_fast([token], [-1.0], iter([1]), [None])
            finish = "length" if place == len(tokens) - 1 else None
            logprobs = None if params.logprobs is None else flat[place : place + 1]
            completion = CompletionOutput(0, "", [token], None, logprobs, None, finish)
            yield RequestOutput(request_id, None, prompt["prompt_token_ids"], None, [completion], finish is not None)
    finally:
        engine.closed += 1


def ask(engine, extra_args, prompt=None, kwargs=None, take=None, **params):
    """Outputs of one request through the front end, and its report."""
    params = {"max_tokens": 10, "output_kind": RequestOutputKind.DELTA, "extra_args": extra_args, **params}
    prompt = prompt or {"type": "token", "prompt_token_ids": PROMPT, "cache_salt": "salt", "arrival_time": 5.0}

    async def run():
        generator = frontend.generate(original, engine, prompt, SamplingParams(**params), "cmpl-1-0", **(kwargs or {}))
        outputs = []
        async for output in generator:
            outputs.append(output)
            if take is not None and len(outputs) == take:
                await generator.aclose()
                break
        report = await frontend.of(engine).reports.find("cmpl-1")
        return outputs, report

    return asyncio.run(run())


def refusal(engine, extra_args, prompt=None, **params):
    kwargs = params.pop("kwargs", {})
    params = SamplingParams(**{"max_tokens": 10, "extra_args": extra_args, **params})
    prompt = {"type": "token", "prompt_token_ids": PROMPT} if prompt is None else prompt
    with pytest.raises(VLLMValidationError) as caught:
        # Not awaited: what cannot be honoured is refused before a stream could begin.
        frontend.generate(original, engine, prompt, params, "r", **kwargs)
    assert not engine.calls
    return str(caught.value)


def test_requests_without_our_keys_are_handed_over_untouched():
    seen = []
    prompt, params = object(), SamplingParams(extra_args={"kv_transfer_params": {}})
    result = frontend.generate(
        lambda *args, **kwargs: seen.append((args, kwargs)) or "generator", "engine", prompt, params, "r", a=1
    )
    assert result == "generator"
    assert seen == [(("engine", prompt, params, "r"), {"a": 1})]


def test_the_inner_request_is_what_the_worker_expects():
    engine = StandIn()
    client_args = {**SHARED, "other": 1}
    outputs, report = ask(engine, client_args, stop=["never"], min_tokens=3, logprobs=0, kwargs={"priority": 4})
    ((prompt, params, request_id, kwargs),) = engine.calls
    assert prompt["prompt_token_ids"] == PROMPT[:-1]
    assert (prompt["cache_salt"], prompt["arrival_time"]) == ("salt", 5.0)
    assert (params.max_tokens, params.min_tokens, params.n, params.detokenize, params.stop) == (11, 4, 1, False, [])
    assert params.output_kind == RequestOutputKind.DELTA
    assert request_id == "cmpl-1-0"
    assert kwargs == {"priority": 4}
    extra = dict(params.extra_args)
    assert re.fullmatch(r"[0-9a-f]{32}-\d+", extra.pop("align_spec_id"))
    assert extra == {
        "other": 1,
        "wsd": "shared",
        "wsd_gamma": 0.5,
        "wsd_window": 6,
        "wsd_max_draft": 512,
        "align_spec_strict": False,
        "align_spec_first_token": 70,
        "align_spec_stop_ids": [2, 3],
    }
    assert client_args == {**SHARED, "other": 1}
    sent = [i for output in outputs for i in output.outputs[0].token_ids]
    assert sent == ANSWER[:10]
    assert outputs[0].prompt_token_ids == PROMPT
    assert len([e for o in outputs for e in o.outputs[0].logprobs]) == 10
    (choice,) = report["choices"]
    assert choice["origins"] == [("opening", 6), ("draft", 1), ("base", 1), ("draft", 1), ("base", 1)]
    assert (choice["target_forwards"], choice["tokens_per_forward"]) == (4, 2.5)
    assert (choice["switch_index"], choice["reason"]) == (5, "switched")


def test_draining_waits_for_what_is_under_way_and_for_nothing_that_comes_later():
    engine = StandIn()
    prompt = {"type": "token", "prompt_token_ids": PROMPT}

    def begin(name):
        params = SamplingParams(max_tokens=10, output_kind=RequestOutputKind.DELTA, extra_args=SHARED)
        return frontend.generate(original, engine, prompt, params, name)

    async def run():
        drain = functools.partial(asyncio.to_thread, frontend.drain, engine)
        assert await drain(9) > 8.5
        first, second = begin("first"), begin("second")
        await anext(first)
        assert frontend.drain(engine, 9) == 9  # on the thread that they need to go on: no waiting
        assert await drain(0.2) == 1.0  # they take longer than they may
        waiting = asyncio.create_task(drain(9))
        await asyncio.sleep(0.2)
        await anext(second)
        assert not waiting.done()
        async for _ in first:
            pass
        left = await asyncio.wait_for(waiting, 5)
        assert 1.0 < left < 9
        await second.aclose()
        assert await drain(9) > 8.5

    asyncio.run(run())
    assert frontend.drain(StandIn(), 9) == 9  # an engine that nobody asked for a method


def test_choices_are_requests_of_their_own():
    engine = StandIn()
    outputs, report = ask(engine, SHARED, n=3, seed=7, temperature=1.0, output_kind=RequestOutputKind.FINAL_ONLY)
    assert len(outputs) == 1
    assert [c.index for c in outputs[0].outputs] == [0, 1, 2]
    assert sorted(params.seed for _, params, _, _ in engine.calls) == [7, 8, 9]
    assert len({params.extra_args["align_spec_id"] for _, params, _, _ in engine.calls}) == 3
    assert [c["index"] for c in report["choices"]] == [0, 1, 2]
    assert len(engine.rpcs) == 1, "one call asks for all"


@pytest.mark.parametrize("n", [1, 2])
def test_leaving_early_closes_every_inner_request(n):
    engine = StandIn()
    _, report = ask(engine, SHARED, n=n, temperature=1.0, take=2)
    assert engine.closed == n
    assert [c["outcome"] for c in report["choices"]] == ["cancelled"] * n


def test_a_stop_string_closes_the_inner_request():
    engine = StandIn()
    word = engine.renderer.tokenizer.decode([ANSWER[2]])
    outputs, _ = ask(engine, SHARED, stop=[word])
    assert outputs[-1].outputs[0].stop_reason == word
    assert engine.closed == 1


def test_without_max_tokens_the_context_is_the_bound():
    engine = StandIn()
    ask(engine, SHARED, max_tokens=None)
    assert engine.calls[0][1].max_tokens == 64 - len(PROMPT) + 1


def test_what_went_wrong_in_a_worker_is_in_the_report_and_strict_requests_fail():
    failed = {"reason": "failed", "kept": 2, "steps": 3, "starts": [0, 2, 3], "error": "RuntimeError: x"}
    _, report = ask(StandIn(worker=failed), SHARED)
    assert (report["choices"][0]["reason"], report["choices"][0]["error"]) == ("failed", "RuntimeError: x")
    with pytest.raises(GenerationError, match=r"align_spec_strict.*RuntimeError: x"):
        ask(StandIn(worker=failed), {**SHARED, "align_spec_strict": True})
    outputs, _ = ask(StandIn(), {**SHARED, "align_spec_strict": 1})
    assert outputs[-1].finished


def test_a_worker_that_does_not_answer_costs_the_report_and_not_the_request():
    engine = StandIn()

    async def broken(*args):
        raise RuntimeError("no workers")

    engine.call_utility_all_async = broken
    outputs, report = ask(engine, SHARED)
    assert outputs[-1].finished
    assert not report["complete"]
    assert report["choices"][0]["reason"] is None


REFUSED = [
    ({"speculative": False}, {}, {}, "needs the pilot as the engine's draft model"),
    ({"draft_sample_method": "probabilistic"}, {}, {}, "draft_sample_method='probabilistic'; accepted: 'greedy'"),
    ({"rejection_sample_method": "block"}, {}, {}, "rejection_sample_method='block'"),
    ({"enable_adaptive_verification": True}, {}, {}, "draft length per step"),
    ({"dynamic": True}, {}, {}, "draft length per step"),
    ({"additional": {"enabled": False}}, {}, {}, "wsd, wsd_gamma: the align_spec plugin is switched off"),
    ({}, {"wsd": "handover"}, {}, "wsd='handover' needs a pilot"),
    ({"additional": PILOT}, {"wsd": "handover"}, {"logprob_token_ids": [5]}, "logprob_token_ids cannot be combined"),
    ({}, {}, {"max_tokens": 5}, "max_tokens=5 is smaller than wsd_window=6"),
    ({}, {}, {"prompt": {"type": "token", "prompt_token_ids": [9]}}, "at least 2 tokens, got 1"),
    ({}, {}, {"prompt": {"type": "token", "prompt_token_ids": [9, 3]}}, "ends with the stop token 3"),
    ({}, {}, {"prompt": {"type": "token", "prompt_token_ids": [9] * 64}}, "64 tokens; accepted: 1 to 63"),
    ({}, {}, {"prompt": {"type": "embeds", "prompt_embeds": None}}, "type 'embeds'"),
    ({}, {}, {"prompt": {"type": "multimodal", "prompt_token_ids": PROMPT}}, "type 'multimodal'"),
    ({}, {}, {"prompt": {"prompt_embeds": None}}, "type dict"),
    ({}, {}, {"prompt": original(None, None, None, None)}, "type async_generator"),
    ({}, {}, {"kwargs": {"lora_request": LORA}}, "lora_request='lora'"),
    ({}, {}, {"thinking_token_budget": 5}, "thinking_token_budget=5"),
    ({}, {}, {"repetition_penalty": 1.2}, "send repetition_penalty=1.0 (the model's generation_config"),
    ({}, {}, {"stop_token_ids": list(range(71, 141))}, "72 stop token ids"),
    ({}, {"kv_transfer_params": {"x": 1}}, {}, "kv_transfer_params"),
]


@pytest.mark.parametrize(("engine", "extra", "params", "says"), REFUSED, ids=[row[3][:28] for row in REFUSED])
def test_what_cannot_be_honoured_is_refused_at_once(engine, extra, params, says):
    assert says in refusal(StandIn(**engine), {**SHARED, **extra}, **params)


def test_the_logits_processor_refuses_keys_that_bypassed_the_front_end():
    with pytest.raises(ValueError, match=r"vllm_align_spec\.engine\.offline\.LLM"):
        AlignSpecLogitsProcessor.validate_params(SamplingParams(extra_args=SHARED))


# Hand-over ---------------------------------------------------------------------------------------------------------


class Words:
    """An engine handle whose tokens are words, one id each, and whose opinions are given."""

    def __init__(self, draft, probabilities, error=None):
        self.pieces, self.probabilities, self.error = draft, probabilities, error
        self.vocabulary = {}
        self.scored = []
        self.continued = None

    def encode(self, prompt, text):

        found = list(re.finditer(r"\s*\S+|\s+$", text))
        ids = [self.vocabulary.setdefault(match[0], 100 + len(self.vocabulary)) for match in found]
        return ids, [match.end() for match in found]

    async def score(self, ids, start):
        first = start - len(PROMPT)
        self.scored.append((first, len(ids) - len(PROMPT)))
        return Scored(self.probabilities[first : len(ids) - len(PROMPT)], None)

    async def draft(self, request):
        for piece in self.pieces:
            yield piece
        if self.error:
            raise self.error

    async def generate(self, prompt, *, max_tokens, min_tokens, arguments=None):
        assert arguments is None, "the base model's part is an ordinary request"
        self.continued = (list(prompt), max_tokens, min_tokens)
        yield Chunk([7] * max_tokens, None, "length")


def hand_over(words, max_tokens=12, **options):
    options = WsdOptions(wsd="handover", **{"wsd_gamma": 0.5, "wsd_window": 2, **options})
    request = Request((options,), PROMPT, None, None, max_tokens, 0, 100, (2,))
    notes = {}

    async def run():
        return [chunk async for chunk in WsdStrategy().run(request, words, notes)]

    chunks = asyncio.run(run())
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    return tokens, chunks, WsdStrategy().report(notes, None, len(tokens), len(tokens))


def test_the_base_model_takes_over_after_the_first_window_that_reaches_gamma():
    words = Words(["a b c ", "d e f ", "g h i"], [0.1, 0.9, 0.1, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9])
    tokens, _, report = hand_over(words)
    assert (report["reason"], report["switch_index"]) == ("switched", 4)
    assert words.continued == ([*PROMPT, *tokens[:5]], 7, 0)
    assert report["origins"] == [("opening", 5), ("base", 7)]
    # Each word was scored once, and the last word of the first piece not before it was complete.
    assert words.scored == [(0, 3), (3, 6)]


def test_no_switch_falls_inside_the_last_word_of_a_piece_but_may_in_the_last_piece():
    words = Words(["a b"], [0.9, 0.9])
    _, _, report = hand_over(words)
    assert (report["reason"], report["switch_index"]) == ("switched", 1)
    assert words.scored == [(0, 1), (1, 2)]


def test_the_opening_streams_as_it_becomes_final():
    words = Words(["a b c ", "d e f ", "g h i"], [0.1] * 9)
    _, chunks, report = hand_over(words)
    assert [len(chunk.token_ids) for chunk in chunks] == [3, 3, 2, 1, 3]
    assert report["reason"] == "pilot_end"


def test_the_bound_counts_the_base_models_tokens():
    words = Words(["a b c ", "d e f ", "g h i"], [0.1] * 9)
    tokens, _, report = hand_over(words, wsd_max_draft=4)
    assert (report["reason"], report["draft_tokens_kept"], len(tokens)) == ("max_draft", 4, 12)


def test_a_response_may_end_inside_the_opening():
    words = Words(["a b c ", "d e f ", "g h i"], [0.1] * 9)
    tokens, chunks, report = hand_over(words, max_tokens=5)
    assert (len(tokens), chunks[-1].finish_reason, report["reason"]) == (5, "length", "drafting")
    assert words.continued is None


def test_a_draft_that_splits_anew_keeps_what_the_client_has():
    words = Words(["a b c ", "d e f"], [0.1] * 9)
    plain = words.encode
    # Once more text is there, the first words melt into one token, unless they were sent before.
    words.encode = lambda prompt, text: plain(prompt, text.replace("a b", "a_b", 1) if "f" in text else text)
    tokens, _, report = hand_over(words, max_tokens=6)
    assert len(tokens) == 6
    assert [words.vocabulary[word] for word in ("a", " b", " c")] == tokens[:3]
    assert sum(count for _, count in report["origins"]) == 6


def test_a_failing_pilot_is_an_error_or_plain_decoding_after_what_was_sent():
    broken = PilotError("the pilot is gone")
    with pytest.raises(PilotError):
        hand_over(Words(["a b c ", "d"], [0.1] * 9, broken))
    words = Words(["a b c ", "d"], [0.1] * 9, broken)
    tokens, _, report = hand_over(words, wsd_fallback="base")
    assert (report["reason"], report["error"], report["draft_tokens_kept"]) == ("failed", "the pilot is gone", 3)
    assert words.continued == ([*PROMPT, *tokens[:3]], 9, 0)


def test_a_pilot_that_cannot_be_reached_is_a_bad_gateway():
    engine = StandIn(additional=PILOT)
    with pytest.raises(GracefulHTTPError) as caught:
        ask(engine, {"wsd": "handover"})
    assert caught.value.http_status == 502
    assert "cannot be reached" in str(caught.value)
    outputs, report = ask(engine, {"wsd": "handover", "wsd_fallback": "base"})
    assert outputs[-1].finished
    assert engine.calls[0][1].extra_args is None
    assert report["choices"][0]["reason"] == "failed"


@pytest.mark.parametrize(
    "prompt", ["A desk", "A desk ", "", "Line\n", "caf\u00e9 \U0001f642", "<|user|>\nHi<|end|>\n<|assistant|>\n"]
)
@pytest.mark.parametrize("text", ["Keep it tidy.", " and", "\nnext", "2+2=4", "\u00e9t\u00e9 \U0001f642!", ""])
def test_a_text_behind_a_prompt_is_encoded_so_that_it_reads_the_same(prompt, text):
    tokenizer = AutoTokenizer.from_pretrained(model_path("base"))
    engine = StandIn()
    choice = frontend._Choice(frontend.of(engine), SimpleNamespace(params=SamplingParams()), 0)
    before = tokenizer.encode(prompt, add_special_tokens=False)
    ids, ends = choice.encode(before, text)
    assert tokenizer.decode([*before, *ids]) == prompt + text
    assert len(ids) == len(ends)
    assert ends == sorted(ends)
    assert not ends or ends[-1] == len(text)


def test_shared_wsd_warns_of_a_drafter_that_is_no_model_of_its_own(caplog):
    facts = EngineFacts("eagle", "greedy", "standard", True, False, True, False, True, False)
    request = Request((WsdOptions(wsd="shared"),), PROMPT, None, None, 10, 0, 50, (2,))
    WsdStrategy().admit(request, facts)
    WsdStrategy().admit(request, facts)
    assert sum("eagle" in record.message for record in caplog.records) == 1
    with pytest.raises(OptionError):
        WsdStrategy().admit(request, dataclasses.replace(facts, draft_method=None))


# Reports -----------------------------------------------------------------------------------------------------------


def test_reports_are_asked_for_in_batches_one_call_at_a_time():
    calls, running = [], 0

    async def workers(ids):
        nonlocal running
        running += 1
        assert running == 1
        calls.append((asyncio.get_running_loop().time(), ids))
        await asyncio.sleep(0.01)
        running -= 1
        return {i: {"wsd": {}} for i in ids if i != "lost"}

    async def run():
        collector = ReportCollector(workers)
        first = [collector.collect(i) for i in ("a", "b", "lost")]
        collector.hurry()
        await first[0]
        second = [collector.collect(i) for i in ("c", "d")]
        collector.hurry()
        await second[0]
        third = [collector.collect("e")]  # nobody waits for it
        return [await future for future in [*first, *second, *third]]

    answers = asyncio.run(run())
    assert answers == [{"wsd": {}}, {"wsd": {}}, None, {"wsd": {}}, {"wsd": {}}, {"wsd": {}}]
    assert [ids for _, ids in calls] == [["a", "b", "lost"], ["c", "d"], ["e"]]
    assert INTERVAL_S <= calls[1][0] - calls[0][0] < UNHURRIED_S <= calls[2][0] - calls[1][0] + 1e-3


def stored(store, request_id, choices=1):
    entry = store.open(request_id)
    entry.choices = [{"index": i, "complete": True} for i in range(choices)]
    entry.done.set()


def test_reports_are_found_by_the_id_that_the_client_saw():
    async def run():
        store = ReportStore(ReportOptions())
        stored(store, "cmpl-x-0", 2)
        stored(store, "cmpl-x-1", 2)
        stored(store, "chatcmpl-y")
        stored(store, "resp_z_0")
        found = [await store.find(i) for i in ("cmpl-x", "chatcmpl-y", "resp_z", "cmpl-x-1", "cmpl")]
        return [None if r is None else [c["index"] for c in r["choices"]] for r in found]

    assert asyncio.run(run()) == [[0, 1, 2, 3], [0], [0], [0, 1], None]


def test_reports_are_bounded_in_number_and_age(monkeypatch):
    async def run():
        store = ReportStore(ReportOptions(max_reports=2, max_age_s=60))
        for request_id in ("cmpl-a-0", "cmpl-b-0", "cmpl-c-0"):
            stored(store, request_id)
        found = [await store.find(i) is not None for i in ("cmpl-a", "cmpl-b", "cmpl-c")]
        assert await store.find("cmpl-c") is not None, "reading drops nothing"
        later = __import__("time").monotonic() + 61
        monkeypatch.setattr("vllm_align_spec.report.time.monotonic", lambda: later)
        return found, await store.find("cmpl-c"), len(store._by_response)

    assert asyncio.run(run()) == ([False, True, True], None, 0)


def test_a_report_that_is_still_on_its_way_says_so():
    async def run():
        store = ReportStore(ReportOptions())
        store.open("cmpl-a-0")
        return await store.find("cmpl-a", timeout_s=0.01)

    assert asyncio.run(run())["complete"] is False


def choice_of(engine, extra_args, prompt_text="A question.", **params):
    """The engine as the strategy of one choice sees it, and its request."""
    prompt = {"type": "token", "prompt_token_ids": PROMPT, "prompt": prompt_text}
    found = frontend.of(engine)
    call = found.admit(original, prompt, SamplingParams(max_tokens=20, extra_args=extra_args, **params), "r", {})
    return frontend._Choice(found, call, 0)


JUDGED = {"rewards": {"short": {"kind": "program", "program": "length", "parameters": {"target": 2}}}}
CARDS = {"cards": "on", "cards_threshold": 1.0}


@pytest.mark.parametrize(("device", "temperature"), [("cpu", 0.0), ("cuda", 0.7)])
def test_what_the_worker_draws_is_sampled_in_the_way_that_costs_least(device, temperature):
    engine = StandIn(additional=JUDGED)
    engine.vllm_config.device_config.device_type = device
    choice = choice_of(engine, CARDS, seed=5, temperature=0.7)

    async def launch(**kwargs):
        async with aclosing(choice.generate(PROMPT, max_tokens=2, min_tokens=0, **kwargs)) as chunks:
            async for _ in chunks:
                pass

    for kwargs in ({}, {"drawn": True}, {"seed": 9}):
        asyncio.run(launch(**kwargs))
    found = [(params.seed, params.temperature) for _, params, _, _ in engine.calls]
    assert found == [(5, 0.7), (None, temperature), (9, 0.7)]


def test_an_inner_request_says_on_the_wire_what_vllm_reads_there():
    """Its parameters are of a class of ours, which the engine's process decodes as vLLM's own."""
    engine = StandIn(additional=JUDGED)
    choice = choice_of(engine, CARDS, seed=5, stop_token_ids=[50], top_p=1.0, stop=["x"], logprobs=2)

    async def launch():
        async with aclosing(choice.generate(PROMPT, max_tokens=2, min_tokens=0, arguments={"cards": "on"})) as chunks:
            async for _ in chunks:
                pass

    asyncio.run(launch())
    (_, params, _, _) = engine.calls[0]
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    for name in SamplingParams.__struct_fields__:
        assert getattr(read, name) == getattr(params, name), name
    assert (read.seed, read.stop, read.logprobs, read.max_tokens) == (5, [], 2, 2)
    control_ids = list(frontend.of(engine).control_ids)
    assert read.stop_token_ids == [50, *control_ids]
    assert {50, *control_ids} <= read._all_stop_token_ids
    assert choice._params.stop_token_ids == [50], "what the client asked for stays as it was"
    assert not set(control_ids) & choice._params._all_stop_token_ids


def test_a_judge_sees_the_response_up_to_its_first_stop_string():
    engine = StandIn(additional=JUDGED)
    encode = engine.renderer.tokenizer.encode
    response = encode("one two three four", add_special_tokens=False)
    choice = choice_of(engine, CARDS, stop=[" three"])
    assert engine.renderer.tokenizer.decode(response[: choice.stop_at(response)]).endswith("three")
    assert choice.stop_at(response[:1]) is None
    assert asyncio.run(choice.judge("short", [response, response[:1], []])) == [0.0, -0.5, -1.0]
    assert asyncio.run(choice_of(engine, CARDS).judge("", [response])) == [-1.0], "the only judge there is"


@pytest.mark.parametrize(
    ("extra_args", "params", "says"),
    [
        ({"cards": "on"}, {}, "cards_threshold is missing"),
        ({**CARDS, "cards_reward": "x"}, {}, "cards_reward='x' is no judge of this engine; accepted: 'short'"),
        (CARDS, {"top_k": 5}, "top_k=5 cannot be combined with cards"),
        (CARDS, {"min_tokens": 2}, "min_tokens=2 cannot be combined with cards"),
        ({"bon": 2}, {"prompt_logprobs": 1}, "prompt_logprobs=1 cannot be combined with bon"),
        ({"deal": "on"}, {"temperature": 0.5}, "temperature=0.5 cannot be combined with deal"),
        ({"deal": "on", "bon": 2}, {}, "cannot be combined in one request"),
    ],
)
def test_what_a_judge_cannot_be_asked_for_is_refused(extra_args, params, says):
    assert says in refusal(StandIn(additional=JUDGED), extra_args, **params)
    assert "needs a judge" in refusal(StandIn(), CARDS)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("as it is", "as it is"),
        (None, ""),
        ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "one\ntwo"),
        (["bare", {"type": "refusal", "refusal": "no"}, {"type": "text", "text": None}], "bare\nno"),
        ([{"type": "tool_reference", "name": "clock"}, {"type": "thinking", "thinking": "so"}], "clock\nso"),
        ([], ""),
    ],
)
def test_a_conversations_parts_become_the_text_that_vllm_makes_of_them(content, text):
    messages = [{"role": "user", "content": content, "name": "me"}]
    assert frontend._conversation(messages) == [{"role": "user", "content": text, "name": "me"}]
    assert messages[0]["content"] is content
    assert frontend._conversation(None) is None
