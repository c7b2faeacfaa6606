"""LoRA adapters: grammar-aligned sampling from the adapted model, and other methods' refusal."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import save_file
from serving import MODELS

pytestmark = pytest.mark.slow

RANK, SCALE = 4, 2.0
SENTENCE = "The desk of oak costs "
CHOICES = ["0", "7"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A random adapter of the lab's base model, and the model with the adapter merged into its weights."""
    folder = tmp_path_factory.mktemp("adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            down = torch.randn(RANK, module.in_features, generator=generator) * 0.1
            up = torch.randn(module.out_features, RANK, generator=generator) * 0.1
            tensors |= {
                f"base_model.model.{name}.lora_A.weight": down,
                f"base_model.model.{name}.lora_B.weight": up,
            }
            module.weight.data += SCALE * up @ down
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK * SCALE, "bias": "none"}
    config |= {"target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": str(MODELS / "base")}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, model


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    from vllm_align_spec.engine.offline import LLM

    judge = {"kind": "program", "program": "length", "parameters": {"target": 8}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        with LLM(
            str(MODELS / "base"),
            dtype="float32",
            max_model_len=512,
            max_num_seqs=8,
            enforce_eager=True,
            enable_lora=True,
            max_lora_rank=8,
            additional_config={"align_spec": {"rewards": {"short": judge}}},
        ) as llm:
            yield llm


def request(folder, name="adapter", number=1, **options):
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(folder), **options)


def first(llm, lora, **extra):
    """The report of one choice whose trie may be new."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = SamplingParams(
        temperature=1.0,
        max_tokens=4,
        seed=1,
        structured_outputs=StructuredOutputsParams(choice=CHOICES),
        extra_args={"asap": "weighted", **extra},
    )
    (output,) = llm.generate(SENTENCE, params, lora_request=lora, use_tqdm=False)
    assert output.outputs[0].text in CHOICES
    return llm.report(output)["choices"][0]


def mass(model):
    """log of the probability of a legal first token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODELS / "base")
    ids = tokenizer(SENTENCE)["input_ids"]
    legal = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in CHOICES]
    assert all(len(tokens) == 1 for tokens in legal)
    with torch.no_grad():
        row = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    return float(row[[tokens[0] for tokens in legal]].logsumexp(0))


def test_a_trie_is_of_one_adapter(llm, adapter):
    folder, merged = adapter
    base = transformers.AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype=torch.float32).eval()
    assert abs(mass(base) - mass(merged)) > 0.05, "this adapter changes nothing"
    for lora, model in ((None, base), (request(folder), merged)):
        report = first(llm, lora)
        assert math.isclose(report["log_h0"][0], mass(model), abs_tol=1e-3)
    # The second sample knows what became of the first, of the same adapter and of no other.
    assert first(llm, request(folder))["log_h0"][0] < mass(merged) - 1e-3
    assert math.isclose(first(llm, request(folder, "other", 2))["log_h0"][0], mass(merged), abs_tol=1e-3)


def test_what_is_loaded_anew_under_its_name_is_never_known(llm, adapter):
    folder, merged = adapter
    for _ in range(2):
        report = first(llm, request(folder, "again", 3, load_inplace=True))
        assert math.isclose(report["log_h0"][0], mass(merged), abs_tol=1e-3)


def test_the_best_of_one_is_what_the_adapter_says(llm, adapter):
    from vllm import SamplingParams

    folder, _ = adapter
    params = {"temperature": 1.0, "max_tokens": 12, "seed": 5}
    texts = [
        llm.generate(SENTENCE, SamplingParams(**params, **extra), lora_request=lora, use_tqdm=False)[0].outputs[0].text
        for lora, extra in (
            (request(folder), {}),
            (request(folder), {"extra_args": {"bon": 1, "bon_reward": "short"}}),
            (None, {}),
        )
    ]
    assert texts[0] == texts[1] != texts[2]


def test_methods_that_cannot_say_so(llm, adapter):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    extra = {"cards": "on", "cards_reward": "short", "cards_threshold": 0.0}
    params = SamplingParams(temperature=1.0, max_tokens=8, extra_args=extra)
    with pytest.raises(VLLMValidationError, match="lora_request='adapter' cannot be combined with cards; name the"):
        llm.generate(SENTENCE, params, lora_request=request(adapter[0]), use_tqdm=False)
