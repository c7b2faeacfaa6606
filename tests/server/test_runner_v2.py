"""Strategies on vLLM's runner V2, under Triton's interpreter, say what they say on V1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving import MESSAGES, MODELS, SPECULATION

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, sys

if os.environ["RUNNER"] == "v2":  # the engine's processes import this file before they import vLLM
    import v2_on_cpu


def main():
    from vllm import SamplingParams
    from vllm_align_spec.engine.offline import LLM

    setting, cases = map(json.loads, sys.argv[1:])
    found = []
    with LLM(**setting) as llm:
        for messages, how, xargs in cases:
            (answer,) = llm.chat(messages, SamplingParams(extra_args=xargs or None, **how), use_tqdm=False)
            choices = (llm.report(answer) or {}).get("choices")
            found.append([list(answer.outputs[0].token_ids), answer.outputs[0].finish_reason, choices and choices[0]])
    print("FOUND", json.dumps(found))


if __name__ == "__main__":
    main()
"""
GREEDY = {"temperature": 0.0, "max_tokens": 12}
DRAWN = {"temperature": 1.0, "max_tokens": 10, "seed": 5}
CASES = {
    "plain": (MESSAGES, GREEDY, {}),
    "handover": (MESSAGES, GREEDY, {"wsd": "handover", "wsd_gamma": 0.9, "wsd_max_draft": 6}),
    "deal": (
        MESSAGES,
        GREEDY,
        {"deal": "on", "deal_reward": "good", "deal_weights": [20.0], "deal_top_k": 4, "deal_lookahead": 2},
    ),
    "drawn": (MESSAGES, DRAWN, {}),
    "best of one": (MESSAGES, DRAWN, {"bon": 1, "bon_reward": "short"}),
    "best of three": (MESSAGES, DRAWN, {"bon": 3, "bon_reward": "good"}),
}


@pytest.fixture(scope="module")
def answers(pilot, tmp_path_factory):
    """Of each runner: tokens, finish reason and the choice's report of each case."""
    options = {
        "wsd": {"pilot": {"url": pilot.url, "model": "pilot", "timeout_s": 60, "chunk_tokens": 8}},
        "rewards": {
            "good": {"kind": "model", "model": str(MODELS / "judge"), "timeout_s": 60},
            "short": {"kind": "program", "program": "length", "parameters": {"target": 3}},
        },
    }
    setting = {
        "model": str(MODELS / "base"),
        "dtype": "float32",
        "block_size": 32,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "speculative_config": json.loads(SPECULATION),
        "additional_config": {"align_spec": options},
    }
    script = tmp_path_factory.mktemp("v2") / "script.py"
    script.write_text(SCRIPT)
    aids = str(Path(__file__).parents[1] / "conformance")
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": aids,
    }
    found = {}
    for runner in ("v1", "v2"):
        done = subprocess.run(
            [sys.executable, str(script), json.dumps(setting), json.dumps(list(CASES.values()))],
            capture_output=True,
            text=True,
            timeout=900,
            env={**os.environ, **environment, "RUNNER": runner},
        )
        line = next((one for one in done.stdout.splitlines() if one.startswith("FOUND")), "")
        assert line, done.stdout[-2000:] + done.stderr[-3000:]
        assert ("Using V2 Model Runner" in done.stdout + done.stderr) == (runner == "v2")
        found[runner] = dict(zip(CASES, json.loads(line.removeprefix("FOUND")), strict=True))
    return found


@pytest.mark.parametrize("case", ["plain", "handover", "deal"])
def test_both_runners_say_the_same(answers, case):
    v1, v2 = (answers[runner][case] for runner in ("v1", "v2"))
    assert v1[:2] == v2[:2]
    if case != "plain":
        assert v2[2]["outcome"] == "completed"
        assert answers["v2"]["plain"][0] != v2[0]
        same = ("mode", "draft_tokens_kept", "judge_calls", "changed_tokens", "sampled_tokens")
        assert any(k in v2[2] for k in same)
        assert {k: v1[2].get(k) for k in same} == {k: v2[2].get(k) for k in same}


def test_the_best_of_one_is_the_plain_sample(answers):
    assert answers["v2"]["best of one"][0] == answers["v2"]["drawn"][0]


def test_the_best_of_three_is_one_of_three(answers):
    tokens, _, report = answers["v2"]["best of three"]
    assert (report["outcome"], report["judge_calls"], len(report["samples"])) == ("completed", 3, 3)
    scores = [sample["score"] for sample in report["samples"]]
    assert report["taken"] == scores.index(max(scores))
    assert len(tokens) == report["samples"][report["taken"]]["tokens"]
