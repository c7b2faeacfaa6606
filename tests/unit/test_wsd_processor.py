"""The switch on grids of rows equals the pure rule, whatever the steps' widths."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_align_spec.processors.rows import Layout, Rows
from vllm_align_spec.processors.wsd import WsdProcessor, switch_index

STOP, VOCAB, DRAFTS, PROMPT = 1, 40, 4, 9


def processor():
    return WsdProcessor(Layout(torch.device("cpu"), entries=8, rows=DRAFTS + 1, vocab_size=VOCAB))


def arguments(gamma, window, bound):
    return {
        "align_spec_stop_ids": [STOP],
        "align_spec_first_token": 3,
        "wsd_gamma": gamma,
        "wsd_window": window,
        "wsd_max_draft": bound,
    }


def step(proc, entry, out, p_of_drafts, tokens):
    """One step of one request: row r gives its draft the probability asked for."""
    n = len(tokens)
    logits = torch.full((n + 1, VOCAB), 0.0)
    for row, (p, token) in enumerate(zip(p_of_drafts, tokens, strict=True)):
        logits[row] = math.log((1 - p) / (VOCAB - 1)) if p < 1 else -math.inf
        logits[row, token] = math.log(p) if p > 0 else -math.inf
    before = logits.clone()
    position = torch.tensor([PROMPT + out])
    proc.observe(torch.tensor([entry]), position, torch.tensor([True]))
    limit = proc.apply(
        Rows(
            logits=logits,
            index=torch.arange(n + 1)[None],
            count=torch.tensor([n + 1]),
            position=position,
            fed=lambda: torch.tensor([0]),
            draft=torch.tensor([[*tokens, -1]]),
            entry_np=np.array([entry]),
        )
    )
    forced = [r for r in range(n + 1) if not torch.equal(logits[r], before[r]) or (before[r] == 0).sum() == 1]
    return int(limit[0]), forced, logits


@settings(deadline=None, max_examples=150)
@given(
    p=st.lists(st.sampled_from([0.2, 0.5, 0.79, 0.8, 0.81, 0.9, 0.99]), min_size=1, max_size=30),
    gamma=st.sampled_from([0.3, 0.6, 0.8, 0.9]),
    window=st.integers(1, 8),
    bound=st.integers(1, 40),
    widths=st.lists(st.integers(1, DRAFTS), min_size=30, max_size=30),
)
def test_steps_of_any_width_switch_where_the_pure_rule_does(p, gamma, window, bound, widths):
    proc = processor()
    proc.admit(0, arguments(gamma, window, bound), PROMPT)
    proc.flush()
    out = 0
    while proc.active(np.array([0]))[0] and out < len(p):
        width = min(widths.pop(), len(p) - out)
        limit, _, _ = step(proc, 0, out, p[out : out + width], [5 + (out + j) % 30 for j in range(width)])
        report = proc.reports([0])[0]
        out = report["kept"]
        if report["reason"] == "drafting":
            assert limit == width
    report = proc.reports([0])[0]
    found = switch_index(p, gamma=gamma, window=window)
    reached = found < len(p) - 1 or (len(p) >= window and _mean(p[-window:]) >= math.log(gamma) - 1e-6)
    if reached and found < bound:
        assert (report["kept"], report["reason"]) == (found + 1, "switched")
    elif len(p) >= bound:
        assert (report["kept"], report["reason"]) == (bound, "max_draft")
    else:
        assert (report["kept"], report["reason"]) == (len(p), "drafting")


def _mean(p):
    return sum(math.log(x) for x in p) / len(p)


def test_the_held_back_token_comes_first_and_alone():
    proc = processor()
    proc.admit(2, arguments(0.8, 6, 512), PROMPT)
    proc.flush()
    limit, forced, logits = step(proc, 2, -1, [], [])
    assert (limit, forced) == (1, [0])
    assert int(logits[0].argmax()) == 3


def test_a_stop_id_ends_the_opening_before_it_and_frees_the_rest():
    proc = processor()
    proc.admit(0, arguments(0.8, 64, 512), PROMPT)
    proc.flush()
    limit, forced, _ = step(proc, 0, 0, [0.5] * 4, [7, 8, STOP, 9])
    assert forced == [0, 1]
    assert limit == DRAFTS + 1
    assert proc.reports([0])[0] | {"starts": 0} == {"reason": "pilot_end", "kept": 2, "steps": 1, "starts": 0}


def test_a_masked_draft_is_never_forced():
    proc = processor()
    proc.admit(0, arguments(0.8, 64, 512), PROMPT)
    proc.flush()
    _, forced, logits = step(proc, 0, 0, [0.5, 0.0, 0.5], [7, 8, 9])
    assert forced == [0]
    assert logits[1, 8] == -math.inf
    assert proc.reports([0])[0]["reason"] == "pilot_end"


def test_a_row_without_a_usable_draft_ends_the_opening():
    for tokens, kept in (([7, -1, 9], 1), ([], 0)):
        proc = processor()
        proc.admit(0, arguments(0.8, 64, 512), PROMPT)
        proc.flush()
        p = [0.5] * len(tokens)
        step(proc, 0, 0, p, tokens)
        assert (proc.reports([0])[0]["reason"], proc.reports([0])[0]["kept"]) == ("interrupted", kept)


def test_a_step_that_was_taken_back_ends_the_opening():
    proc = processor()
    proc.admit(0, arguments(0.8, 64, 512), PROMPT)
    proc.flush()
    step(proc, 0, 0, [0.5] * 3, [7, 8, 9])
    _, forced, _ = step(proc, 0, 1, [0.5] * 3, [8, 9, 10])
    assert forced == []
    assert proc.reports([0])[0]["reason"] == "interrupted"


def test_an_entry_that_is_reused_starts_anew():
    proc = processor()
    proc.admit(0, arguments(0.8, 2, 512), PROMPT)
    proc.flush()
    step(proc, 0, 0, [0.9] * 4, [7, 8, 9, 10])
    assert not proc.active(np.array([0]))[0]
    proc.admit(0, arguments(0.8, 64, 512), PROMPT)
    proc.flush()
    assert proc.active(np.array([0]))[0]
    assert proc.reports([0])[0] == {"reason": "drafting", "kept": 0, "steps": 0, "starts": []}
