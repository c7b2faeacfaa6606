"""vLLM's drafter against the equations in torch, on what the real engine fed it: prefill and chained draft steps."""

import pytest
import torch
from drafters import random_drafter, tiny_target, write
from engines import prompts, reference

from vllm_align_spec import lab
from vllm_align_spec.drafters.config import VARIANTS
from vllm_align_spec.drafters.fspad import Past

STEPS = 3
TOLERANCE = 2e-4


def speculative(folder, k=STEPS):
    return {"method": "eagle", "model": str(folder), "num_speculative_tokens": k}


def assert_passes_follow_the_equations(passes, drafter, embedding, prompt):
    """Prefill and the chain behind it: what went in is the target's, what came out is the equations'."""
    start = next(i for i, p in enumerate(passes) if p["input_ids"][: len(prompt) - 1].tolist() == prompt[1:])
    first, *chained = passes[start : start + STEPS]
    length = len(prompt)
    ids, features = first["input_ids"][:length].long(), first["hidden_states"][:length]
    assert first["positions"][:length].tolist() == list(range(length))
    with torch.no_grad():
        past = Past()
        p, r = drafter(embedding(ids)[None], features[None], past)
        torch.testing.assert_close(first["predict"][:length], p[0], atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(first["regress"][:length], r[0], atol=TOLERANCE, rtol=TOLERANCE)
        # The chain as one more row a step: rows before it are the first pass's, so its passes are recomputed whole.
        fed = r[0, -1]
        for number, step in enumerate(chained, start=1):
            torch.testing.assert_close(step["hidden_states"][0], fed, atol=TOLERANCE, rtol=TOLERANCE)
            assert step["positions"][0] == length - 1 + number
            ids = torch.cat([ids, step["input_ids"][:1].long()])
            features = torch.cat([features, fed[None]])
            p, r = drafter(embedding(ids)[None], features[None])
            torch.testing.assert_close(step["predict"][0], p[0, -1], atol=TOLERANCE, rtol=TOLERANCE)
            torch.testing.assert_close(step["regress"][0], r[0, -1], atol=TOLERANCE, rtol=TOLERANCE)
            fed = r[0, -1]


@pytest.mark.parametrize(
    "variant", ["fspad", *(pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS if v != "fspad")]
)
@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
def test_the_engines_drafter_computes_the_equations(engines, runner, variant, tmp_path):
    base = reference("base")
    drafter = random_drafter(base.config, variant)
    engine = engines(runner, speculative_config=speculative(write(drafter, tmp_path / variant)), record_drafts=True)
    engine.passes(tmp_path / "warm-up.safetensors")
    prompt = prompts()[0]
    engine.generate([{"prompt": prompt, "params": {"max_tokens": 3}}])
    passes = engine.passes(tmp_path / "passes.safetensors")
    with torch.no_grad():
        features = base.model(torch.tensor([prompt])).last_hidden_state[0]
    start = next(p for p in passes if p["input_ids"][: len(prompt) - 1].tolist() == prompt[1:])
    torch.testing.assert_close(start["hidden_states"][: len(prompt)], features, atol=1e-3, rtol=1e-3)
    assert_passes_follow_the_equations(passes, drafter, base.get_input_embeddings(), prompt)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 64, "tie_word_embeddings": False}),
        (
            "llama",
            {
                "num_key_value_heads": 1,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 128,
                },
            },
        ),
    ],
)
def test_other_targets_biases_norms_heads_and_rope(engines, tmp_path, kind, changes):
    target = tiny_target(kind, tmp_path / "target", **changes)
    drafter = random_drafter(target.config, "fspad")
    engine = engines(
        "v1",
        model=str(tmp_path / "target"),
        tokenizer=str(lab.model_path("base")),
        speculative_config=speculative(write(drafter, tmp_path / "drafter")),
        record_drafts=True,
    )
    engine.passes(tmp_path / "warm-up.safetensors")
    prompt = prompts()[1]
    engine.generate([{"prompt": prompt, "params": {"max_tokens": 3}}])
    passes = engine.passes(tmp_path / "passes.safetensors")
    assert_passes_follow_the_equations(passes, drafter, target.get_input_embeddings(), prompt)
