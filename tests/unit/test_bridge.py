"""A companion with another tokenizer: what it is told is the text, and what it says is what it would say of it."""

import foreign_judge
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from vllm_align_spec import lab
from vllm_align_spec.companion.bridge import MAX_PIECES, BridgedCompanion, pieces
from vllm_align_spec.companion.model import Companion
from vllm_align_spec.options import CompanionOptions

ROWS, SLOTS, VOCAB = 4, 5, 4096


@pytest.fixture(scope="module")
def base_tokenizer():
    return AutoTokenizer.from_pretrained(lab.model_path("base"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    return folder, *foreign_judge.save(folder)


@pytest.fixture(scope="module")
def table(base_tokenizer, foreign):
    return pieces(base_tokenizer, foreign[2], VOCAB)


@pytest.fixture(scope="module")
def bridged(foreign, table):
    options = CompanionOptions(model=str(foreign[0]), role="reward", dtype="float32", max_candidates=3)

    def make(fed):
        return Companion(
            "foreign", options, device=torch.device("cpu"), dtype=torch.float32, slots=SLOTS, rows=fed, entries=32,
            max_len=1000,
        )  # fmt: skip

    return BridgedCompanion(table, ROWS, 32, make)


def test_pieces_spell_the_tokens_own_text(base_tokenizer, foreign, table):
    tokenizer = foreign[2]
    text = 'A sentence of  several words, {"x": [1, 22]}\n\tand naïve 日本 🙂 the end'
    ids = base_tokenizer.encode(text, add_special_tokens=False)
    assert all(1 <= len(p) <= MAX_PIECES for p in table)
    assert len(table) == VOCAB
    plain = [t for t in ids if "\ufffd" not in base_tokenizer.decode([t]) and len(table[t]) < MAX_PIECES]
    assert len(plain) > 15
    for token in plain:
        assert tokenizer.decode(table[token]) == base_tokenizer.decode([token])
    assert table[base_tokenizer.eos_token_id] == [tokenizer.eos_token_id]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_equals_a_plain_forward_over_the_pieces(seed, bridged, foreign, table):
    """Ragged batches, speculation with rejected drafts, preemption; prompts that have nothing to do with each other."""
    rng = np.random.default_rng(seed)
    model = foreign[1]
    own_vocabulary = len(foreign[2])
    for entry in range(32):
        bridged.leave(entry)
    requests = []
    for entry in range(rng.integers(1, SLOTS + 1)):
        prompt = rng.integers(own_vocabulary, size=rng.integers(1, 40)).tolist()
        requests.append((entry, prompt, int(rng.integers(1, 60)), []))

    def enter(entry, prompt, prompt_len, response):
        tokens = torch.tensor(response, dtype=torch.int64)
        bridged.enter(entry, torch.tensor(prompt), tokens, prompt_len, ())

    for request in requests:
        enter(*request)
    for _ in range(rng.integers(2, 7)):
        for request in requests:
            if rng.random() < 0.2:
                bridged.leave(request[0])
                enter(*request)
        bridged.prepare()
        batch = [requests[i] for i in rng.permutation(len(requests))[: rng.integers(1, len(requests) + 1)]]
        width = int(rng.integers(1, ROWS + 1))
        drafts = [rng.integers(VOCAB, size=rng.integers(0, width)).tolist() for _ in batch]
        candidates = rng.integers(VOCAB, size=(len(batch), width, 3))
        chain = torch.zeros(len(batch), width, dtype=torch.int64)
        for line, ((_, _, _, response), drafted) in enumerate(zip(batch, drafts, strict=True)):
            # The target's last prompt token may be any: the companion has its own.
            chain[line, : 1 + len(drafted)] = torch.tensor([response[-1] if response else 7, *drafted])
        said = bridged.rewards(
            np.array([entry for entry, *_ in batch]),
            torch.tensor([length + len(response) - 1 for _, _, length, response in batch]),
            torch.tensor([1 + len(drafted) for drafted in drafts]),
            chain,
            torch.from_numpy(candidates),
        )
        for line, ((_, prompt, _, response), drafted) in enumerate(zip(batch, drafts, strict=True)):
            r, j = int(rng.integers(len(drafted) + 1)), int(rng.integers(3))
            whole = [*response, *drafted[:r], int(candidates[line, r, j])]
            ids = prompt + [piece for token in whole for piece in table[token]]
            with torch.inference_mode():
                hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
                expected = model.score(hidden[0, -1]).item()
            assert said[line, r, j].item() == pytest.approx(expected, abs=2e-3)
            response += [*drafted[: rng.integers(len(drafted) + 1)], int(rng.integers(VOCAB))]
