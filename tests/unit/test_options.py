"""Options say what would be accepted."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_align_spec import DISABLE_ENV
from vllm_align_spec.options import METHODS, OptionError, WsdOptions, parse_engine, parse_request


def refusal(extra_args):
    with pytest.raises(OptionError) as caught:
        parse_request(extra_args)
    return caught.value


def test_a_request_without_our_keys_has_no_options():
    assert parse_request(None) == ()
    assert parse_request({"top_secret": 1, "wsdx": 2}) == ()


def test_defaults_are_the_published_ones():
    (parsed,) = parse_request({"wsd": "shared"})
    assert parsed == WsdOptions(wsd="shared", wsd_gamma=0.8, wsd_window=6, wsd_max_draft=512)
    assert parsed.wsd_fallback == "error"
    assert not parsed.align_spec_strict


def test_other_peoples_keys_are_left_alone():
    (parsed,) = parse_request({"wsd": "handover", "kv_transfer_params": {"a": 1}})
    assert parsed.wsd == "handover"


@pytest.mark.parametrize("value", [0, -0.1, 1.0001, math.nan, math.inf, "0.5", None, [0.5]])
def test_gamma_outside_its_interval_is_refused_with_key_value_and_what_is_accepted(value):
    error = refusal({"wsd": "shared", "wsd_gamma": value})
    assert error.option == "wsd_gamma"
    assert f"wsd_gamma={value!r}" in str(error)
    assert "> 0 and <= 1" in str(error)


def test_gamma_includes_one_and_integers_over_http():
    assert parse_request({"wsd": "shared", "wsd_gamma": 1})[0].wsd_gamma == 1.0


@pytest.mark.parametrize("value", [0, -1, 65, 6.0, "6", True])
def test_a_window_that_is_no_integer_in_range_is_refused(value):
    error = refusal({"wsd": "shared", "wsd_window": value})
    assert f"wsd_window={value!r}" in str(error)
    assert "an integer >= 1 and <= 64" in str(error)


@pytest.mark.parametrize("value", ["Shared", "on", 1, True, None])
def test_an_unknown_mode_is_refused(value):
    error = refusal({"wsd": value})
    assert "'shared' | 'handover'" in str(error)


def test_an_unknown_key_with_our_prefix_is_refused_and_lists_the_known_ones():
    error = refusal({"wsd": "shared", "wsd_gama": 0.5})
    assert "wsd_gama=0.5" in str(error)
    assert "wsd_gamma" in str(error)
    # A metric's label must not be a word that a client makes up.
    assert error.option == "unknown"


@pytest.mark.parametrize("key", ["align_spec_id", "align_spec_first_token", "align_spec_stop_ids"])
def test_keys_between_front_end_and_worker_cannot_come_from_a_client(key):
    assert key in str(refusal({"wsd": "shared", key: "x"}))
    assert key in str(refusal({key: "x"}))


@pytest.mark.parametrize("key", ["wsd_gamma", "align_spec_strict"])
def test_a_key_without_its_method_says_how_to_switch_it_on(key):
    error = refusal({key: 1})
    assert "has no effect without 'wsd'" in str(error)


def test_json_booleans_arrive_as_integers():
    assert parse_request({"wsd": "shared", "align_spec_strict": 1})[0].align_spec_strict is True


def test_engine_options_default_to_on():
    parsed = parse_engine({})
    assert parsed.enabled
    assert parsed.wsd.pilot is None
    assert parse_engine(None) == parsed


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"wds": {}}, "wds"),
        ({"wsd": {"pilot": {"url": "ftp://x", "model": "m"}}}, "wsd.pilot.url='ftp://x'"),
        ({"wsd": {"pilot": {"url": "http://x"}}}, "wsd.pilot.model is missing"),
        ({"reports": {"max_reports": 0}}, "reports.max_reports=0"),
        ({"enabled": "perhaps"}, "enabled='perhaps'"),
        ({"wsd": {"pilot": {"url": "http://x", "model": "m", "engine_args": ["--dtype=float32"]}}}, "engine_args"),
    ],
)
def test_wrong_engine_options_name_their_place(tree, names):
    with pytest.raises(OptionError) as caught:
        parse_engine({"align_spec": tree})
    assert names in str(caught.value)


def test_the_environment_switches_everything_off(monkeypatch):
    monkeypatch.setenv(DISABLE_ENV, "1")
    assert not parse_engine({"align_spec": {"enabled": True}}).enabled


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=4)), max_size=3),
)
SWITCHES = {"cards": {"cards": "on", "cards_threshold": 1.0}, "bon": {"bon": 2}, "deal": {"deal": "on"}}
KEYS = [(cls.method, key) for cls in METHODS if cls.method in SWITCHES for key in cls.model_fields]


@given(st.sampled_from(KEYS), ANYTHING)
@settings(deadline=None)
def test_whatever_a_value_is_it_is_taken_or_refused_by_its_name(where, value):
    method, key = where
    refused = None
    try:
        parsed = parse_request({**SWITCHES[method], key: value})
    except OptionError as error:
        refused = str(error)
    if refused is not None:
        assert key in refused
    else:
        assert [options.method for options in parsed] == [method]
        assert not isinstance(value, float) or math.isfinite(value)


def test_one_judge_or_several_and_their_weights():
    (parsed,) = parse_request({"bon": 2, "bon_reward": "good", "bon_weights": 0.5})
    assert (parsed.bon_reward, parsed.bon_weights) == (["good"], [0.5])
    (parsed,) = parse_request({"bon": 2, "bon_reward": ["good", "short"], "bon_weights": [1, 0.5]})
    assert (parsed.bon_reward, parsed.bon_weights) == (["good", "short"], [1.0, 0.5])


def test_published_defaults_of_cards():
    (parsed,) = parse_request({"cards": "on", "cards_threshold": 8.5})
    assert (parsed.cards_entropy, parsed.cards_alpha, parsed.cards_beta) == (3.0, 0.5, 0.7)
    assert (parsed.cards_top_k, parsed.cards_max_tries) == (40, 21)
