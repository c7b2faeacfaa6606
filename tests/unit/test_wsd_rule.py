"""The switch as a pure rule, and what the strategy makes of it."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_align_spec.processors.wsd import switch_index
from vllm_align_spec.strategies.wsd import _before_last_word, origins


def reference(probabilities, gamma, window):
    """The definition, in exact arithmetic: the product over the window against gamma to its length."""
    for i in range(len(probabilities)):
        if i + 1 >= window:
            product = math.prod(Fraction(p) for p in probabilities[i - window + 1 : i + 1])
            if product >= Fraction(gamma) ** window:
                return i
    return len(probabilities) - 1


@pytest.mark.parametrize(("probabilities", "index"), [([0.9] * 10, 5), ([1.0] * 5, 4), ([0.79] * 20, 19), ([], -1)])
def test_published_oracles(probabilities, index):
    assert switch_index(probabilities) == index


def test_equality_counts_for_every_gamma_in_thousandths():
    for thousandth in range(1, 1001):
        gamma = thousandth / 1000
        assert switch_index([gamma] * 8, gamma=gamma, window=6) == 5


def test_a_zero_is_forgotten_when_it_leaves_the_window():
    assert switch_index([0.0, *[0.9] * 7], window=6) == 6


@given(
    st.lists(st.floats(0.0, 1.0, allow_subnormal=False), max_size=30),
    st.sampled_from([0.1, 0.5, 0.8, 0.95, 1.0]),
    st.integers(1, 8),
)
def test_the_rule_is_the_definition(probabilities, gamma, window):
    found = switch_index(probabilities, gamma=gamma, window=window)
    # Within the stated tolerance either neighbour of the threshold is right.
    assert reference(probabilities, gamma * (1 - 2e-6), window) <= found <= reference(probabilities, gamma, window)


def test_origins_follow_the_steps():
    worker = {"starts": [0, 5, 8, 11], "steps": 4}
    # Step 2 switches after its token 6: token 7 is an accepted draft's successor, the base model's own.
    after = [("base", 1), ("draft", 2), ("base", 1), ("draft", 2), ("base", 1)]
    assert origins(7, worker, 14, 14) == [("opening", 7), *after]


def test_origins_cover_what_the_client_got_and_no_more():
    worker = {"starts": [0, 5], "steps": 2}
    assert origins(5, worker, 7, 10) == [("opening", 5), ("draft", 2)]
    assert origins(5, worker, 3, 10) == [("opening", 3)]
    assert origins(0, None, 4, 4) == [("base", 4)]
    assert origins(None, None, 4, 4) == [("unknown", 4)]
    assert origins(None, None, 0, 0) == []


def test_steps_beyond_the_table_are_unknown_but_for_the_last():
    worker = {"starts": [0, 2, 9], "steps": 5}
    assert origins(2, worker, 11, 11) == [("opening", 2), ("unknown", 7), ("draft", 1), ("base", 1)]


@given(st.integers(0, 40), st.lists(st.integers(1, 6), max_size=12), st.integers(0, 60))
def test_origins_always_add_up(kept, lengths, tokens):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    emitted = sum(lengths)
    tokens = min(tokens, emitted)
    runs = origins(kept, {"starts": starts, "steps": len(starts)}, tokens, emitted)
    assert sum(count for _, count in runs) == tokens
    assert all(count > 0 for _, count in runs)
    assert all(a[0] != b[0] for a, b in pairwise(runs))


@pytest.mark.parametrize(
    ("text", "ends", "final"),
    [
        ("Hello wor", [5, 9], 1),
        ("Hello ", [5, 6], 1),
        ("Hello", [5], 0),
        ("a b c", [1, 3, 5], 2),
        ("", [], 0),
        ("字" * 40, list(range(1, 41)), 16),
    ],
)
def test_the_last_word_of_a_draft_is_not_final(text, ends, final):
    assert _before_last_word(text, ends) == final
