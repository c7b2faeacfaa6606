"""Where segments end inside the real engine, on both runners, against transformers."""

import pytest
import torch
from engines import log_probabilities, prompts, tokenizer
from laws import greedy

from vllm_align_spec.engine import control
from vllm_align_spec.processors.cards import LONGEST, SHORTEST

RUNNERS = ["v1", "v2"]
MARGIN = 2e-3
"""Where an entropy is nearer to the threshold, batch shape may decide."""


@pytest.fixture(params=RUNNERS, scope="session")
def runner(request):
    return request.param


@pytest.fixture(scope="session")
def control_ids():
    return control.choose(tokenizer(), 4096, [2])


@pytest.fixture(
    scope="session", params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["speculation", "no-speculation"]
)
def engine(request, engines, runner):
    return engines(runner, **({} if request.param else {"speculative_config": None}))


def cards(prompt, entropy, **params):
    return {"prompt": prompt, "cards": entropy, "params": {"max_tokens": LONGEST, "ignore_eos": False, **params}}


def entropies(prompt, tokens):
    """Of the row before each token, and of the one after the last."""
    log_p = log_probabilities("base", prompt, [*tokens, 0])
    return torch.special.entr(log_p.exp()).sum(-1).tolist()


def assert_segment(request, output, control_ids):
    """The boundary is the first row, from the fifth on, that reaches the threshold; returns the close calls."""
    assert "error" not in output["report"], output["report"]
    prompt, threshold = request["prompt"], request["cards"]
    ended = output["stop"] == control_ids[1]
    tokens = output["tokens"][:-1] if ended else output["tokens"]
    assert not set(control_ids) & set(tokens)
    found = entropies(prompt, tokens)
    told = output["report"]["cards"]["entropies"]
    for place, (mine, theirs) in enumerate(zip(found[: len(tokens)], told, strict=False)):
        assert abs(mine - theirs) < MARGIN, f"entropy before token {place}: {theirs}, transformers says {mine}"
    close = 0
    for place in range(SHORTEST, len(tokens)):
        assert found[place] < threshold + MARGIN, f"the segment should have ended before token {place}"
        close += found[place] >= threshold
    if ended:
        assert len(tokens) >= SHORTEST
        assert found[-1] >= threshold - MARGIN, f"entropy {found[-1]} ended the segment"
        close += found[-1] < threshold
    if not request["params"].get("temperature"):
        close += greedy("base", prompt, tokens, 0, len(tokens))
    return close


def check(engine, requests, control_ids):
    for request in requests:
        request["control_ids"] = control_ids
    outputs = engine.generate(requests)
    close = total = 0
    for request, output in zip(requests, outputs, strict=True):
        total += len(output["tokens"])
        if "cards" in request:
            close += assert_segment(request, output, control_ids)
        else:
            close += greedy("base", request["prompt"], output["tokens"], 0, len(output["tokens"]))
    assert close <= max(1, total // 100)
    return outputs


def test_segments_end_where_transformers_says(engine, runner, control_ids):
    cut = {"top_k": 40} if runner == "v1" else {}  # Triton's interpreter does not take V2's kernel for it
    requests = [
        cards(prompts()[i], threshold, temperature=temperature, seed=i, **(cut if temperature else {}))
        for i, (threshold, temperature) in enumerate(
            [(0.3, 0.0), (0.3, 0.7), (1.0, 0.0), (1.0, 0.7), (1.5, 0.7), (2.5, 0.7), (0.1, 0.7), (0.6, 0.0)]
        )
    ]
    outputs = check(engine, requests, control_ids)
    ended = [output for output in outputs if output["stop"] == control_ids[1]]
    assert len(ended) >= 4, [output["stop"] for output in outputs]
    assert len({len(output["tokens"]) for output in ended}) > 1


def test_a_threshold_of_nothing_ends_every_segment_after_four_tokens(engine, control_ids):
    outputs = check(engine, [cards(prompts()[i], 0.0) for i in range(3)], control_ids)
    assert [len(output["tokens"]) for output in outputs] == [SHORTEST + 1] * 3


def test_a_threshold_beyond_reach_leaves_plain_decoding(engine, control_ids):
    plain = {"prompt": prompts()[0], "params": {"max_tokens": 24, "ignore_eos": False}}
    outputs = check(engine, [cards(prompts()[0], 100.0, max_tokens=24), plain], control_ids)
    assert outputs[0]["tokens"] == outputs[1]["tokens"]


def test_a_bound_below_the_shortest_segment_holds(engine, control_ids):
    for bound in (1, 2, SHORTEST, SHORTEST + 1):
        (output,) = check(engine, [cards(prompts()[1], 0.0, max_tokens=bound)], control_ids)
        assert len(output["tokens"]) == min(bound, SHORTEST + 1)
        assert (output["stop"] == control_ids[1]) == (bound > SHORTEST)


def test_a_second_segment_begins_where_the_first_ended(engine, control_ids):
    (first,) = check(engine, [cards(prompts()[2], 0.3)], control_ids)
    assert first["stop"] == control_ids[1]
    joined = [*prompts()[2], *first["tokens"][:-1]]
    check(engine, [cards(joined, 0.3), cards(joined, 0.3, temperature=0.7, seed=3)], control_ids)


def test_neighbours_are_left_alone(engine, control_ids):
    plain = [{"prompt": p, "params": {"max_tokens": 16}} for p in prompts()[:3]]
    mixed = [request for i, one in enumerate(plain) for request in (one, cards(prompts()[5 + i], 0.5))]
    beside = check(engine, mixed, control_ids)[::2]
    alone = check(engine, plain, control_ids)
    assert [output["tokens"] for output in beside] == [output["tokens"] for output in alone]
