"""Offline inference goes through the same front end."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from serving import MESSAGES, MODELS, PROMPT

SETTING = {
    "dtype": "float32",
    "block_size": 32,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "speculative_config": {"method": "draft_model", "model": str(MODELS / "pilot"), "num_speculative_tokens": 5},
}


@pytest.fixture(scope="module")
def llm():
    from vllm_align_spec.engine.offline import LLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        with LLM(str(MODELS / "base"), **SETTING) as llm:
            yield llm


def params(**kwargs):
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0.0, "max_tokens": 24, **kwargs})


LONG = {"wsd": "shared", "wsd_gamma": 1.0, "wsd_max_draft": 8}


def test_prompts_come_back_in_order_each_with_a_report(llm):
    plain, steered, twice = llm.generate(
        [PROMPT] * 3,
        [params(), params(extra_args=LONG), params(extra_args=LONG, n=2, temperature=0.9, seed=1)],
        use_tqdm=False,
    )
    assert llm.report(plain) is None
    (choice,) = llm.report(steered)["choices"]
    assert choice["response_tokens"] == len(steered.outputs[0].token_ids)
    assert choice["draft_tokens_kept"] == 8
    assert [output.index for output in twice.outputs] == [0, 1]
    assert twice.outputs[0].token_ids[:8] == twice.outputs[1].token_ids[:8] == steered.outputs[0].token_ids[:8]
    assert steered.prompt_token_ids == plain.prompt_token_ids


def test_chat_is_the_rendered_prompt(llm):
    (answer,) = llm.chat(MESSAGES, params(extra_args=LONG), use_tqdm=False)
    (same,) = llm.generate([PROMPT], params(extra_args=LONG), use_tqdm=False)
    assert answer.outputs[0].text == same.outputs[0].text


def test_a_request_that_cannot_be_honoured_raises_and_leaves_nothing_behind(llm):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="wsd_gamma=2"):
        llm.generate([PROMPT, PROMPT], [params(), params(extra_args={"wsd": "shared", "wsd_gamma": 2})], use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
    assert llm.generate(PROMPT, params(max_tokens=2), use_tqdm=False)[0].finished


def test_raw_prompts_of_the_asynchronous_engine_are_rendered_at_admission(llm):
    async def ask():
        engine = llm.llm_engine.engine
        return [output async for output in engine.generate("A desk", params(extra_args=LONG), "raw")][-1]

    (same,) = llm.generate("A desk", params(extra_args=LONG), use_tqdm=False)
    assert llm.llm_engine.call(ask()).outputs[0].text == same.outputs[0].text


@pytest.mark.slow
def test_vllms_own_class_refuses_our_options_and_names_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    script = f"""
        from vllm import LLM, SamplingParams
        if __name__ == "__main__":
            llm = LLM({str(MODELS / "base")!r}, **{SETTING!r})
            try:
                llm.generate("A desk", SamplingParams(max_tokens=8, extra_args={{"wsd": "shared"}}))
            except Exception as error:
                print("REFUSED", error)
    """
    path = tmp_path / "script.py"  # a file, for the engine's own process to import
    path.write_text(textwrap.dedent(script))
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=400)
    assert "REFUSED" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert "vllm_align_spec.engine.offline.LLM" in done.stdout
