"""Thresholds of CARDS from samples."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_align_spec.calibrate import entropy_for, expected_tries, quantile, read_prompts, segments
from vllm_align_spec.processors.cards import LONGEST, SHORTEST


@pytest.mark.parametrize(("share", "expected"), [(0, 1.0), (0.5, 2.5), (1, 4.0), (0.75, 3.25)])
def test_quantiles_are_linear_between_values(share, expected):
    assert quantile([4.0, 1.0, 3.0, 2.0], share) == expected


def test_a_segment_ends_before_the_first_uncertain_token_from_the_fifth_on():
    assert segments([9, 9, 9, 9, 0, 9, 0], 5.0) == [5, 2]
    assert segments([0] * 4 + [9] + [0] * 3 + [9], 5.0) == [4, 4, 1]
    assert segments([0] * 200, 5.0) == [64, 64, 64, 8]
    assert segments([], 5.0) == []


@given(st.lists(st.floats(0, 9), max_size=200), st.floats(0, 9))
@settings(deadline=None)
def test_segments_are_the_response_and_keep_their_bounds(entropies, threshold):
    found = segments(entropies, threshold)
    assert sum(found) == len(entropies)
    assert all(SHORTEST <= length <= LONGEST for length in found[:-1])


def test_the_entropy_is_the_one_whose_segments_come_nearest_to_the_wished_length():
    entropies = [[0.0] * 7 + [1.0] + [0.0] * 7 + [2.0]] * 3
    assert entropy_for(entropies, 4) == 0.0
    assert entropy_for(entropies, 5.5) == 1.0
    assert entropy_for(entropies, 9) == 2.0


def test_expected_tries_are_those_of_a_geometric_law_cut_off():
    assert expected_tries([5.0, 5.0], 0.0, 0.7, 21) == 1.0
    assert expected_tries([0.0, -1e9], 0.0, 0.7, 21) == pytest.approx(2.0, abs=1e-4)
    assert expected_tries([-1e9], 0.0, 0.7, 21) == 21


def test_a_line_without_a_prompt_is_named(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl:3 has to be a JSON object"):
        read_prompts(file)
    file.write_text("")
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(file)
