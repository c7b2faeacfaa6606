"""Ids by which a processor ends a request on purpose."""

from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from vllm_align_spec.engine import control
from vllm_align_spec.lab import model_path


class Words:
    """As much of a tokenizer as is asked."""

    def __init__(self, size, special=(), pad=None, unk=None):
        self.size = size
        self.added_tokens_decoder = {i: SimpleNamespace(special=True, content=text) for i, text in special}
        self.pad_token_id, self.unk_token_id = pad, unk

    def __len__(self):
        return self.size


def test_rows_of_the_output_that_the_tokenizer_does_not_know_come_first():
    assert control.choose(Words(100, [(7, "<|reserved_7|>")]), 128, [2]) == (100, 101, 102)


def test_then_special_tokens_that_are_reserved_by_name_then_padding():
    words = Words(128, [(9, "<|reserved_9|>"), (7, "<unused7>"), (3, "<|user|>")], pad=0, unk=1)
    assert control.choose(words, 128, [2]) == (7, 9, 0)
    assert control.choose(words, 128, [2, 9]) == (7, 0, 1)


def test_the_labs_model_has_reserved_tokens():
    words = AutoTokenizer.from_pretrained(model_path("base"))
    texts = [words.convert_ids_to_tokens(i) for i in control.choose(words, 4096, [2])]
    assert texts == ["<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>"]


def test_a_model_without_ids_to_spare_has_none():
    assert control.choose(Words(128, [(3, "<|user|>")], pad=0), 128, [2]) is None
    assert control.choose(None, 128, [2]) is None


@pytest.mark.parametrize(
    ("extra", "tokens", "heard"),
    [
        ({control.KEY: [6, 7, 8]}, [40, 41, 7], [40, 41]),
        ({control.KEY: [6, 7, 8]}, [7], []),
        ({control.KEY: [6, 7, 8]}, [7, 40], [7, 40]),
        ({"other": 1}, [7], [7]),
        (None, [7], [7]),
    ],
)
def test_a_grammar_does_not_hear_of_a_trailing_control_id_of_ours(extra, tokens, heard):
    request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra))
    assert control.without(request, tokens) == heard


def test_a_request_without_sampling_parameters_is_left_alone():
    assert control.without(SimpleNamespace(sampling_params=None), [7]) == [7]
