"""Tokens of a strategy become what vLLM would have sent."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer
from vllm.logprobs import FlatLogprobs
from vllm.sampling_params import RequestOutputKind, SamplingParams

from vllm_align_spec.engine.output import Assembler, choice_params, rows
from vllm_align_spec.lab import model_path
from vllm_align_spec.strategies.base import Chunk

TEXT = "Keep one box for pens, one for paper, and empty the desk each evening."


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path("base"))


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer.encode(TEXT, add_special_tokens=False)


PROMPT = [5, 6, 7, 8]


def run(tokenizer, chunks, **params):
    """All outputs; ``chunks`` holds (choice, chunk) pairs. Stops feeding a choice that has ended."""
    params = SamplingParams(**{"max_tokens": 100, "output_kind": RequestOutputKind.DELTA, **params})

    async def feed():
        assembler = Assembler("r", PROMPT, None, params, 0.0, tokenizer, 1)
        found, ended = [], set()

        async def collect():
            async for output in assembler.outputs():
                found.append(output)

        task = asyncio.create_task(collect())
        for index, chunk in chunks:
            if index not in ended and not assembler.put(index, chunk):
                ended.add(index)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await asyncio.wait_for(task, 5)
        return found, assembler

    return asyncio.run(feed())


def pieces(ids, sizes, finish="length", **more):
    """The tokens in chunks of the given sizes, the last one with a finish reason."""
    found, at = [], 0
    for size in sizes:
        found.append(ids[at : at + size])
        at += size
    found.append(ids[at:])
    return [(0, Chunk(part, None, finish if part is found[-1] else None, **more)) for part in found]


@pytest.mark.parametrize("sizes", [[], [1, 1, 1], [3, 5, 2], [0, 4]])
def test_text_does_not_depend_on_how_tokens_are_grouped(tokenizer, ids, sizes):
    outputs, _ = run(tokenizer, pieces(ids, sizes))
    assert "".join(output.outputs[0].text for output in outputs) == TEXT
    assert [i for output in outputs for i in output.outputs[0].token_ids] == ids
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].outputs[0].finish_reason == "length"
    assert all(output.prompt_token_ids == PROMPT and output.request_id == "r" for output in outputs)


@pytest.mark.parametrize("sizes", [[], [1] * 8, [7, 4]])
def test_a_stop_string_cuts_text_and_tokens(tokenizer, ids, sizes):
    outputs, _ = run(tokenizer, pieces(ids, sizes), stop=[", one"])
    text = "".join(output.outputs[0].text for output in outputs)
    assert text == TEXT[: TEXT.index(", one")]
    last = outputs[-1].outputs[0]
    assert (last.finish_reason, last.stop_reason) == ("stop", ", one")
    sent = [i for output in outputs for i in output.outputs[0].token_ids]
    assert sent == ids[: len(sent)]
    assert tokenizer.decode(sent).startswith(text + ", one")
    assert not tokenizer.decode(sent[:-1]).startswith(text + ", one")


def test_min_tokens_and_include_stop_are_vllms(tokenizer, ids):
    outputs, _ = run(tokenizer, pieces(ids, [4]), stop=["one"], min_tokens=len(ids))
    assert outputs[-1].outputs[0].finish_reason == "length"
    outputs, _ = run(tokenizer, pieces(ids, []), stop=["pens"], include_stop_str_in_output=True)
    assert "".join(output.outputs[0].text for output in outputs) == "Keep one box for pens"


def test_a_stop_token_is_counted_and_not_shown(tokenizer, ids):
    end = tokenizer.eos_token_id
    outputs, _ = run(tokenizer, pieces([*ids, end], [4], finish="stop"))
    assert "".join(output.outputs[0].text for output in outputs) == TEXT
    assert outputs[-1].outputs[0].token_ids[-1] == end


def test_final_only_is_one_output_and_cumulative_grows(tokenizer, ids):
    outputs, _ = run(tokenizer, pieces(ids, [2, 2]), output_kind=RequestOutputKind.FINAL_ONLY)
    assert [(o.finished, o.outputs[0].text) for o in outputs] == [(True, TEXT)]
    outputs, _ = run(tokenizer, pieces(ids, [2, 2]), output_kind=RequestOutputKind.CUMULATIVE)
    texts = [o.outputs[0].text for o in outputs]
    assert texts[-1] == TEXT
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_choices_merge_and_the_request_ends_with_the_last(tokenizer, ids, kind):
    chunks = [(1, Chunk(ids[:3])), (0, Chunk(ids[:2], None, "length")), (1, Chunk(ids[3:5], None, "stop", "x"))]
    outputs, _ = run(tokenizer, chunks, n=2, temperature=1.0, output_kind=kind)
    assert [output.finished for output in outputs][-1]
    assert not any(output.finished for output in outputs[:-1])
    ends = {c.index: c.finish_reason for output in outputs for c in output.outputs if c.finish_reason}
    assert ends == {0: "length", 1: "stop"}
    if kind == RequestOutputKind.FINAL_ONLY:
        assert [c.index for c in outputs[0].outputs] == [0, 1]


def test_logprobs_come_through_with_decoded_tokens(tokenizer, ids):
    entries = [([token, 40, 41], [-0.5, -0.1, -0.2], 3) for token in ids]
    chunks = [(0, Chunk(ids[:4], entries[:4])), (0, Chunk(ids[4:], entries[4:], "length"))]
    outputs, _ = run(tokenizer, chunks, logprobs=2)
    found = [entry for output in outputs for entry in output.outputs[0].logprobs]
    assert len(found) == len(ids)
    assert [next(iter(entry)) for entry in found] == ids
    first = found[0][ids[0]]
    assert (first.logprob, first.rank) == (-0.5, 3)
    assert "".join(entry[token].decoded_token for entry, token in zip(found, ids, strict=True)) == TEXT
    assert outputs[-1].outputs[0].cumulative_logprob == pytest.approx(-0.5 * len(ids))


def test_without_detokenisation_there_are_ids_only(ids):
    outputs, _ = run(None, pieces(ids, [3]), detokenize=False)
    assert [i for output in outputs for i in output.outputs[0].token_ids] == ids
    assert all(output.outputs[0].text == "" for output in outputs)


def test_cached_tokens_never_exceed_the_clients_prompt(tokenizer, ids):
    inner = SimpleNamespace(
        num_cached_tokens=50,
        num_cache_creation_tokens=3,
        metrics="m",
        outputs=[SimpleNamespace(spec_decode_metrics="spec")],
    )
    outputs, _ = run(tokenizer, pieces(ids, [3], source=inner))
    assert all(output.num_cached_tokens == len(PROMPT) and output.metrics == "m" for output in outputs)
    assert outputs[-1].outputs[0].spec_decode_metrics == "spec"


def test_emitted_counts_the_surplus_behind_a_stop_string(tokenizer, ids):
    outputs, assembler = run(tokenizer, pieces(ids, []), stop=["box"])
    assert assembler.emitted == [len(ids)]
    assert len(outputs[0].outputs[0].token_ids) < len(ids)


def test_dropping_the_held_back_token_drops_its_logprob_too():
    chunk = Chunk([1, 2, 3], [([1], [-1.0], 1), ([2], [-2.0], 1), ([3], [-3.0], 1)]).drop(1)
    assert chunk.token_ids == [2, 3]
    assert chunk.logprobs == [([2], [-2.0], 1), ([3], [-3.0], 1)]


def test_rows_keep_what_the_engine_sent():
    flat = FlatLogprobs()
    flat.append_fast([7, 9, 7], [-0.3, -0.1, -0.3], iter([2, 1, 2]), [None] * 3)
    flat.append_fast([8, 8, 9], [-0.2, -0.2, -0.9], iter([1, 1, 2]), [None] * 3)
    assert rows(flat, 0, 2) == [([7, 9, 7], [-0.3, -0.1, -0.3], 2), ([8, 8, 9], [-0.2, -0.2, -0.9], 1)]
    assert rows(flat, 1, 2) == [([8, 8, 9], [-0.2, -0.2, -0.9], 1)]


def test_choices_have_the_seeds_that_vllm_gives_them():
    params = SamplingParams(n=3, seed=10, temperature=1.0)
    assert [choice_params(params, i).seed for i in range(3)] == [10, 11, 12]
    assert choice_params(params, 1).n == 1
    assert choice_params(SamplingParams(n=2, temperature=1.0), 1).seed is None
    assert params.n == 3
