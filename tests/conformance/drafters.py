"""Drafters for tests: random ones of any variant, and targets of architectures that the lab has not."""

import json
import re
import shutil

import torch
import transformers
from safetensors.torch import load_file, save_file

from vllm_align_spec.drafters.config import for_target
from vllm_align_spec.drafters.fspad import Drafter


def random_drafter(target, variant, seed=0, scale=1.0):
    """A drafter for a target's config whose norms and biases are no ones and zeros."""
    torch.manual_seed(seed)
    drafter = Drafter(for_target(target.to_dict(), variant))
    for parameter in drafter.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
        else:
            parameter.data = parameter.data * scale
    return drafter.eval()


def write(drafter, folder, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in drafter.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or drafter.config.to_hf()))
    return folder


def tiny_target(kind, folder, **changes):
    """A random target of another architecture, with the lab's vocabulary size."""
    sizes = {
        "vocab_size": 4096,
        "hidden_size": 128,  # heads of 32: smaller ones the CPU backend has not
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[kind]
    torch.manual_seed(7)
    model = model_class(config_class(**sizes)).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data = parameter.data * 3
    model.save_pretrained(folder)
    return model


def quantise(source, folder):
    """A checkpoint with its linear layers in int8, a scale for each output, as llm-compressor writes W8A8."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if re.search(r"layers\.\d+\..*_proj\.weight$", name):
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight.float() / scale).round().to(torch.int8)
            tensors[name.replace("weight", "weight_scale")] = scale
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors")
    bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**bits, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
