"""What a drafter is made of: sizes, variant, and the tensors that follow from them.

A drafter is one Transformer layer over the target's last hidden states (`fspad` has the equations). Two choices span
the family:

=======================  ================  =================
variant                  feature_sampling  partial_alignment
=======================  ================  =================
``fspad``                gated             yes
``griffin``              fused             yes
``no-feature-sampling``  none              yes
``no-partial-alignment`` gated             no
``eagle``                none              no
=======================  ================  =================

Names of tensors are those of the published FSPAD and GRIFFIN code, so checkpoints of theirs and ours differ in nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from vllm_align_spec.drafters import ARCHITECTURE

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape."""

FeatureSampling = Literal["none", "gated", "fused"]
VARIANTS: dict[str, tuple[FeatureSampling, bool]] = {
    "fspad": ("gated", True),
    "griffin": ("fused", True),
    "no-feature-sampling": ("none", True),
    "no-partial-alignment": ("gated", False),
    "eagle": ("none", False),
}

EMBEDDING = "embed_tokens.weight"
"""A copy of the target's that a checkpoint may carry; vLLM uses the target's own where they are equal."""
IGNORED = ("layers.0.self_attn.rotary_emb.inv_freq",)


class DrafterError(ValueError):
    """A drafter that cannot be served: a config that says too little, tensors that do not fit it, or another target."""


class DrafterConfig(BaseModel):
    """Sizes and variant of a drafter. In ``config.json`` these are keys beside those of a Llama of one layer."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    hidden_size: int = Field(ge=1, description="H, the target's.")
    intermediate_size: int = Field(ge=1, description="I, of the layer and of feature sampling.")
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    vocab_size: int = Field(ge=1, description="V, the target's.")
    max_position_embeddings: int = Field(ge=1)
    rms_norm_eps: float = Field(gt=0)
    rope_parameters: dict[str, Any] = Field(description="As the target's.")
    qkv_bias: bool = Field(description="Biases on queries, keys and values: as the target (Qwen2).")
    qk_norm: bool = Field(description="Norms on queries and keys: as the target (Qwen3).")
    fc_bias: bool = Field(description="Bias of the first linear layer; the published code has one.")
    feature_sampling: FeatureSampling = Field(
        description="How the sampled token acts on the feature: not at all, as a gate (FSPAD), fused (GRIFFIN)."
    )
    partial_alignment: bool = Field(description="Whether prediction and feedback are two vectors.")

    @property
    def variant(self) -> str:
        """The name of the variant."""
        return next(name for name, both in VARIANTS.items() if both == (self.feature_sampling, self.partial_alignment))

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a checkpoint must have."""
        h, i = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        fc = "fc" if self.feature_sampling == "none" else "fc.fc"
        found: dict[str, tuple[int, ...]] = {f"{fc}.weight": (h, 2 * h)}
        if self.fc_bias:
            found[f"{fc}.bias"] = (h,)
        if self.feature_sampling == "gated":
            found |= {"fc.mlp.gate_proj.weight": (i, h), "fc.mlp.up_proj.weight": (i, h)}
        elif self.feature_sampling == "fused":
            found |= {"fc.mlp.input_layernorm.weight": (h,), "fc.mlp.up_proj.weight": (i, 2 * h)}
        if self.feature_sampling != "none":
            found |= {"fc.mlp.down_proj.weight": (h, i), "fc.post_attention_layernorm.weight": (h,)}
        for name, size in (("q", q), ("k", kv), ("v", kv)):
            found[f"layers.0.self_attn.{name}_proj.weight"] = (size, h)
            if self.qkv_bias:
                found[f"layers.0.self_attn.{name}_proj.bias"] = (size,)
        if self.qk_norm:
            found |= {f"layers.0.self_attn.{name}_norm.weight": (self.head_dim,) for name in "qk"}
        return found | {
            "layers.0.self_attn.o_proj.weight": (h, q),
            "layers.0.post_attention_layernorm.weight": (h,),
            "layers.0.mlp.gate_proj.weight": (i, h),
            "layers.0.mlp.up_proj.weight": (i, h),
            "layers.0.mlp.down_proj.weight": ((2 if self.partial_alignment else 1) * h, i),
        }

    def parameters(self) -> int:
        """How many numbers are trained."""
        total = 0
        for shape in self.tensors().values():
            size = 1
            for length in shape:
                size *= length
            total += size
        return total

    def to_hf(self) -> dict[str, Any]:
        """The content of ``config.json``: a Llama of one layer, with our keys beside it."""
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "hidden_act": "silu",
            **self.model_dump(),
        }

    def to_speculators(self, target: str, num_speculative_tokens: int) -> dict[str, Any]:
        """``config.json`` in the ``speculators`` format: vLLM given this drafter alone then knows target and method."""
        layer = {key: value for key, value in self.to_hf().items() if key != "architectures"}
        return {
            "architectures": [ARCHITECTURE],
            "speculators_model_type": "eagle",
            "transformer_layer_config": layer,
            "speculators_config": {
                "algorithm": "eagle",
                "proposal_methods": [
                    {"proposal_type": "greedy", "speculative_tokens": num_speculative_tokens},
                ],
                "verifier": {"name_or_path": target, "architectures": []},
            },
        }


def for_target(target: Mapping[str, Any], variant: str, intermediate_size: int | None = None) -> DrafterConfig:
    """A drafter of a target's shape.

    Args:
        target: the target's ``config.json`` as transformers reads it (``PreTrainedConfig.to_dict()``).
        variant: one of `VARIANTS`.
        intermediate_size: I; the target's by default.

    Raises:
        DrafterError: an unknown variant, or a target that lacks what a Llama, Qwen2 or Qwen3 has.
    """
    if variant not in VARIANTS:
        raise DrafterError(f"variant={variant!r} is unknown; it would have to be one of {', '.join(VARIANTS)}")
    sampling, split = VARIANTS[variant]
    heads = target.get("num_attention_heads", 1)
    kind = str(target.get("model_type", ""))
    values = {
        "num_key_value_heads": heads,
        **{key: value for key, value in target.items() if value is not None},
        "head_dim": target.get("head_dim") or target.get("hidden_size", 0) // heads,
        "qkv_bias": kind.startswith("qwen2") or bool(target.get("attention_bias")),
        "qk_norm": kind.startswith("qwen3"),
        "fc_bias": True,
        "feature_sampling": sampling,
        "partial_alignment": split,
    }
    if intermediate_size is not None:
        values["intermediate_size"] = intermediate_size
    return _validated(values, f"target of type {kind or 'unknown'}")


def from_hf(config: Mapping[str, Any], tensors: Shapes, drafter: str) -> DrafterConfig:
    """The drafter that a ``config.json`` describes; what it does not say is read off the tensors.

    Checkpoints of the published code say only what a Llama's config says.

    Args:
        config: the content of ``config.json``, or what vLLM made of it.
        tensors: of the checkpoint; empty if they cannot be seen yet.
        drafter: name of the drafter, for messages.

    Raises:
        DrafterError: something is neither said nor visible.
    """
    values = {key: value for key, value in config.items() if value is not None}
    heads = values.get("num_attention_heads", 1)
    values.setdefault("num_key_value_heads", heads)
    values.setdefault("head_dim", values.get("hidden_size", 0) // heads)
    scaling = dict(values.get("rope_scaling") or {})
    kind = scaling.pop("type", "default")  # as older configs call it
    theta = values.get("rope_theta", 10000.0)
    values.setdefault("rope_parameters", {"rope_type": kind, "rope_theta": theta, **scaling})
    if tensors:
        down = tensors.get("layers.0.mlp.down_proj.weight", (0,))
        sampling: FeatureSampling = "none"
        if "fc.mlp.input_layernorm.weight" in tensors:
            sampling = "fused"
        elif "fc.mlp.gate_proj.weight" in tensors:
            sampling = "gated"
        for key, seen in (
            ("feature_sampling", sampling),
            ("partial_alignment", down[0] == 2 * values.get("hidden_size", 0)),
            ("fc_bias", "fc.bias" in tensors or "fc.fc.bias" in tensors),
            ("qkv_bias", "layers.0.self_attn.q_proj.bias" in tensors),
            ("qk_norm", "layers.0.self_attn.q_norm.weight" in tensors),
        ):
            values.setdefault(key, seen)
    if (layers := values.get("num_hidden_layers", 1)) != 1:
        raise DrafterError(f"drafter {drafter}: num_hidden_layers is {layers}; a drafter of this family has 1")
    return _validated(values, f"drafter {drafter}")


def _validated(values: Mapping[str, Any], whose: str) -> DrafterConfig:
    try:
        return DrafterConfig.model_validate(values)
    except ValidationError as error:
        parts = [
            f"{'.'.join(map(str, item['loc']))}: "
            + ("missing" if item["type"] == "missing" else f"{item['input']!r} ({item['msg']})")
            for item in error.errors()
        ]
        raise DrafterError(f"{whose}: its config does not describe a drafter: {'; '.join(parts)}") from None


def check_tensors(config: DrafterConfig, tensors: Shapes, drafter: str) -> None:
    """Holds a checkpoint against its config.

    Raises:
        DrafterError: a tensor is missing, unknown or misshapen; all of them are named, with both sides.
    """
    expected = config.tensors()
    problems = [f"{name} {list(shape)} is missing" for name, shape in expected.items() if name not in tensors]
    for name, shape in tensors.items():
        wanted = expected.get(name) or ((config.vocab_size, config.hidden_size) if name == EMBEDDING else None)
        if wanted is None and name not in IGNORED:
            problems.append(f"{name} {list(shape)} is unknown to a {config.variant} drafter")
        elif wanted is not None and tuple(shape) != wanted:
            problems.append(f"{name} is {list(shape)}, its config asks for {list(wanted)}")
    if problems:
        raise DrafterError(f"drafter {drafter}: tensors and config do not fit: {'; '.join(problems)}")


def check_target(config: DrafterConfig, drafter: str, *, target: str, hidden_size: int, vocab_size: int) -> None:
    """Holds a drafter against the target that it is to draft for.

    Raises:
        DrafterError: it was made for another one.
    """
    pairs = (("hidden_size", config.hidden_size, hidden_size), ("vocab_size", config.vocab_size, vocab_size))
    problems = [f"{name} is {ours}, the target's {theirs}" for name, ours, theirs in pairs if ours != theirs]
    if problems:
        raise DrafterError(f"drafter {drafter} does not fit target {target}: {'; '.join(problems)}")


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a folder's safetensors files, read from their headers.

    Raises:
        DrafterError: there is no such file, or one cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DrafterError(f"drafter {folder}: there are no *.safetensors in it; other formats are not read")
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, "np") as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DrafterError(f"drafter {folder}: {file.name} is no safetensors file: {error}") from None
    return found


def read(folder: Path) -> DrafterConfig:
    """The drafter in a folder, its tensors held against its config.

    Raises:
        DrafterError: something does not fit.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DrafterError(f"drafter {folder}: its config.json cannot be read: {error}") from None
    tensors = shapes(folder)
    found = from_hf(config.get("transformer_layer_config", config), tensors, str(folder))
    check_tensors(found, tensors, str(folder))
    return found


def of_engine(speculative_config: Any) -> DrafterConfig:
    """The drafter of an engine, held against its target and, if they are in a local folder, its tensors.

    Args:
        speculative_config: vLLM's, with target and draft model.

    Raises:
        DrafterError: something does not fit.
    """
    draft, target = speculative_config.draft_model_config, speculative_config.target_model_config
    folder = Path(draft.model)
    tensors = shapes(folder) if folder.is_dir() else {}
    config = from_hf(draft.hf_config.to_dict(), tensors, draft.model)
    check_target(
        config,
        draft.model,
        target=target.model,
        hidden_size=target.get_hidden_size(),
        vocab_size=target.get_vocab_size(),
    )
    if tensors:
        check_tensors(config, tensors, draft.model)
    return config


def refuse_misfit(speculative_config: Any) -> None:
    """Called where vLLM has just read the config of a draft model: stops a start that could not end well.

    Raises:
        DrafterError: the draft model is one of ours and does not fit.
    """
    if ARCHITECTURE in (speculative_config.draft_model_config.architectures or ()):
        of_engine(speculative_config)
