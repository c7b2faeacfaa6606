"""What the processor of CARDS does to rows; where segments end in an engine, `tests/conformance/test_cards.py` says."""

import numpy as np
import torch

from vllm_align_spec.processors.cards import CardsProcessor
from vllm_align_spec.processors.rows import Control, Layout, Rows

VOCAB, PROMPT = 12, 5
CONTROL = torch.tensor([9, 11, 4])


def test_a_control_id_is_above_minus_infinity_only_where_it_is_forced():
    processor = CardsProcessor(Layout(torch.device("cpu"), entries=4, rows=2, vocab_size=VOCAB))
    for entry, threshold in ((2, 1.0), (0, 99.0)):  # no row of twelve tokens has 99 nats
        processor.admit(entry, {"cards_entropy": threshold}, PROMPT)
    processor.flush()
    logits = torch.zeros(5, VOCAB)
    logits[:, CONTROL] = 3.0  # what the model likes best
    before = logits.clone()
    index = np.array([[3, 0], [1, 4]])
    limit = processor.apply(
        Rows(
            logits,
            index=index,
            count=np.array([2, 2]),
            position=np.array([PROMPT + 5, PROMPT + 5]),
            fed=lambda: np.zeros(2, np.int64),
            draft=np.array([[1, -1], [1, -1]]),
            entry_np=np.array([2, 0]),
            control=CONTROL,
        )
    )
    assert limit is None
    others = [token for token in range(VOCAB) if token not in CONTROL]
    for line in index[0]:
        assert logits[line].isfinite().nonzero().tolist() == [[int(CONTROL[Control.SEGMENT_END])]]
    for line in index[1]:
        assert torch.isneginf(logits[line, CONTROL]).all()
        assert torch.equal(logits[line, others], before[line, others])
    assert torch.equal(logits[2], before[2]), "a row of a neighbour"
