"""The Triton kernels equal the plain formulation; run under Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("triton")

CODE = """
    import torch
    from vllm_align_spec.processors import kernels, rows

    torch.manual_seed(0)
    for V in (7, 4096, 5000):
        logits = torch.randn(9, V) * 5
        logits[2, : V // 2] = float("-inf")
        logits[3, 1] = float("-inf")
        index = torch.tensor([[0, 1, 2], [3, 4, 4], [8, 7, 6]])
        tokens = torch.tensor([[0, V - 1, 3], [1, 2, -1], [5, 5, 5]])
        expected = rows.token_logprobs(logits, index, tokens)
        torch.testing.assert_close(kernels.token_logprobs(logits, index, tokens), expected, rtol=1e-5, atol=1e-5)
        assert expected[1, 0] == float("-inf") and expected[1, 2] == float("-inf")

        where = torch.tensor([[True, False, True], [False, True, False], [False, False, True]])
        a, b = logits.clone(), logits.clone()
        rows.force(a, index, where, tokens.clamp(min=0))
        kernels.force(b, index, where, tokens.clamp(min=0))
        assert torch.equal(a, b)
        untouched = [1, 3, 5, 7, 8]
        assert torch.equal(a[untouched], logits[untouched])
        assert (a[0] == 0).nonzero().tolist() == [[0]]
    print("equal")
"""


def test_kernels_equal_the_plain_formulation():
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CODE)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert out.stdout.strip() == "equal", out.stderr[-2000:]
