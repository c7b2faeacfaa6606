"""The formulas of the guided methods, with METHODS' values and what must hold for any numbers; digests and names."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_align_spec.options import ArgsOptions, DeraOptions, OptionError, PadOptions
from vllm_align_spec.processors.args import ArgsProcessor, guided_scores
from vllm_align_spec.processors.dera import realign
from vllm_align_spec.processors.genarm import product
from vllm_align_spec.processors.pad import personalise
from vllm_align_spec.processors.rows import Layout, Rows
from vllm_align_spec.strategies.base import CompanionFacts, EngineFacts
from vllm_align_spec.strategies.guided import BLOCK, companions, digests

rows = st.lists(st.floats(-20, 20, width=32), min_size=4, max_size=4)
INF = float("inf")


def close(a, b):
    return torch.allclose(a, torch.as_tensor(b), atol=1e-4)


def test_published_values():
    assert close(guided_scores(torch.tensor([2, 1.5, 0]), torch.tensor([0.1, 0.6, 1.2]), 1.5), [2.15, 2.4, 1.8])
    assert close(realign(torch.tensor([1.0, 1, 0]), torch.tensor([2.0, 0, -1]), 2), [3.0, -1, -2])


@given(rows, rows)
def test_the_ends_of_the_knobs(base, other):
    z, y = torch.tensor(base), torch.tensor(other)
    assert close(guided_scores(z, y, 0), z)
    assert close(realign(z, y, 0), z)
    assert close(realign(z, y, 1), y)
    assert close(personalise(z, y, 0), z)
    assert close(product(z, y, 0).softmax(-1), z.softmax(-1))
    # w = 1: what PAD makes of the base is the judge itself, among the candidates.
    assert close(personalise(z, y, 1).softmax(-1), y.softmax(-1))
    assert close(product(z, y, 2.0).softmax(-1), (z + 2 * y).softmax(-1))


@given(rows, rows, st.floats(-10, 10), st.floats(-5, 5))
def test_what_only_shifts_a_row_changes_nothing(base, other, shift, weight):
    z, y = torch.tensor(base), torch.tensor(other)
    for formula in (guided_scores, realign, personalise, product):
        assert close(formula(z, y + shift, weight).softmax(-1), formula(z, y, weight).softmax(-1))


def test_masked_candidates_stay_masked():
    z = torch.tensor([1.0, -INF, 0.5])
    for weight in (0.0, 1.0, -2.0):
        assert personalise(z, torch.tensor([3.0, 2.0, 1.0]), weight).isneginf().tolist() == [False, True, False]
        assert not personalise(z, torch.tensor([3.0, 2.0, 1.0]), weight).isnan().any()


@given(st.lists(st.integers(0, 2**31), max_size=200), st.integers(0, 200))
def test_equal_digests_are_equal_beginnings(tokens, change):
    found = digests(tokens, "")
    assert len(found) == len(tokens) // BLOCK
    assert digests([*tokens, 1, 2], "")[: len(found)] == found
    assert not set(found) & set(digests(tokens, "another tenant"))
    if change < len(tokens):
        other = list(tokens)
        other[change] ^= 1
        same = [a == b for a, b in zip(found, digests(other, ""), strict=True)]
        assert same == [at < change // BLOCK for at in range(len(found))]


def facts(**roles):
    known = {name: CompanionFacts(role, 512, 40, False, None) for name, role in roles.items()}
    return EngineFacts(None, "greedy", "standard", True, False, True, False, True, False, known)


def test_which_companion():
    one, two = facts(judge="reward", aligned="lm"), facts(a="reward", b="reward")
    assert companions(ArgsOptions(args="on"), one) == ["judge"]
    assert companions(DeraOptions(dera="on"), one) == ["aligned"]
    assert companions(ArgsOptions(args="on", args_reward=["b", "a"], args_weight=[1.0, 2.0]), two) == ["b", "a"]
    for options, engine, words in (
        (ArgsOptions(args="on"), two, "args_reward is missing"),
        (ArgsOptions(args="on", args_reward="aligned"), one, "args_reward='aligned' is not accepted"),
        (PadOptions(pad="on", pad_model="x"), one, "pad_model='x' is not accepted"),
        (DeraOptions(dera="on"), two, "dera needs a companion with the role 'lm'"),
    ):
        with pytest.raises(OptionError, match=words):
            companions(options, engine)


class Lengths:
    """A companion whose reward of a candidate is its id."""

    def rewards(self, entries, position, count, fed, candidates):
        return candidates.float()

    def enter(self, *arguments):
        pass

    def knows(self, entries):
        return entries >= 0

    def prepare(self):
        pass


def test_rows_of_others_stay_where_requests_have_unequal_numbers_of_rows():
    # A has one row, B four: as many places in the grid, repeated ones included, as the step has rows in all.
    layout = Layout(torch.device("cpu"), 4, 4, 6, companions={"judge": Lengths()})
    processor = ArgsProcessor(layout)
    for entry in (0, 1):
        processor.admit(
            entry,
            {"args_top_k": 2, "args_entropy_gate": 0.0, "args_weight": [1.0], "align_spec_companions": {"judge": {}}},
            3,
        )
    processor.flush()
    logits = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    processor.apply(
        Rows(
            logits=logits,
            index=torch.tensor([[2, 2, 2, 2], [4, 5, 6, 7]]),
            count=torch.tensor([1, 4]),
            position=torch.tensor([3, 3]),
            fed=lambda: torch.tensor([0, 0]),
            draft=torch.tensor([[-1, -1, -1, -1], [1, 2, 3, -1]]),
            entry_np=np.array([0, 1]),
        )
    )
    others = [0, 1, 3]
    assert torch.equal(logits[others], before[others])
    ours = [2, 4, 5, 6, 7]
    best = before[ours].topk(2)
    expected = torch.full((5, 6), -INF).scatter(1, best.indices, best.values + best.indices)
    assert close(logits[ours].softmax(-1), expected.softmax(-1))
