"""Grammars that were verified are found again, and take no more room than they may."""

from vllm.sampling_params import StructuredOutputsParams

from vllm_align_spec.engine.grammars import Grammars
from vllm_align_spec.metrics import metrics


def test_the_least_recently_used_one_goes_first():
    verified = {text: StructuredOutputsParams(regex=text) for text in ("a" * 40, "b" * 40, "c" * 40)}
    a, b, c = verified
    known = Grammars(max_bytes=200)
    known.put(a, verified[a])
    known.put(b, verified[b])
    assert known.get(a) is verified[a]
    assert metrics().grammar_bytes._value.get() == 160
    known.put(c, verified[c])
    assert [known.get(text) for text in (a, b, c)] == [verified[a], None, verified[c]]
    known.put(c, verified[c])  # twice is once
    assert metrics().grammar_bytes._value.get() == 160


def test_what_is_too_large_is_not_kept():
    known = Grammars(max_bytes=200)
    known.put("x" * 20, StructuredOutputsParams(regex="x"))
    known.put("y" * 101, StructuredOutputsParams(regex="y"))
    assert known.get("y" * 101) is None
    assert known.get("x" * 20) is not None
