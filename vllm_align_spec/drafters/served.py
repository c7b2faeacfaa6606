"""The drafter that vLLM serves: the equations of `fspad` in vLLM's parallel layers.

vLLM's ``eagle`` method, on both runners, hands ``forward`` the target's last hidden states and feeds the second of the
two vectors it returns back as the next step's; the first goes to the target's head. That pair is (p, r).

Norms and activations are torch's: a compiled drafter fuses them as it would vLLM's, and one that is not compiled has
fewer operations, and less Python between them, on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    get_draft_quant_config,
    maybe_prefix,
    process_eagle_weight,
)

from vllm_align_spec.drafters.config import IGNORED, DrafterConfig, DrafterError, check_tensors, of_engine


class GatedSampling(nn.Module):
    """``fspad.GatedSampling``, split over I."""

    def __init__(self, h: int, i: int, quant: Any, prefix: str) -> None:
        super().__init__()
        column: dict[str, Any] = {"bias": False, "quant_config": quant, "return_bias": False}
        self.gate_proj = ColumnParallelLinear(h, i, prefix=f"{prefix}.gate_proj", **column)
        self.up_proj = ColumnParallelLinear(h, i, prefix=f"{prefix}.up_proj", **column)
        self.down_proj = RowParallelLinear(i, h, prefix=f"{prefix}.down_proj", **column)

    def forward(self, e: Tensor, u: Tensor) -> Tensor:
        """[T, H] from the embedding and the normed u, both [T, H]."""
        found: Tensor = self.down_proj(functional.silu(self.gate_proj(e)) * self.up_proj(u))
        return found


class FusedSampling(nn.Module):
    """``fspad.FusedSampling``, split over I."""

    def __init__(self, h: int, i: int, eps: float, quant: Any, prefix: str) -> None:
        super().__init__()
        column: dict[str, Any] = {"bias": False, "quant_config": quant, "return_bias": False}
        self.input_layernorm = nn.RMSNorm(h, eps=eps)
        self.up_proj = ColumnParallelLinear(2 * h, i, prefix=f"{prefix}.up_proj", **column)
        self.down_proj = RowParallelLinear(i, h, prefix=f"{prefix}.down_proj", **column)

    def forward(self, e: Tensor, u: Tensor) -> Tensor:
        """[T, H] from the embedding and the normed u, both [T, H]."""
        both = self.input_layernorm(torch.stack([u, e], 1)).flatten(1)
        found: Tensor = self.down_proj(functional.silu(self.up_proj(both)))
        return found


class Sampling(nn.Module):
    """``fspad.Sampling``."""

    def __init__(self, config: DrafterConfig, quant: Any, prefix: str) -> None:
        super().__init__()
        h, i, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        self.fc = _fc(config, quant, f"{prefix}.fc")
        self.post_attention_layernorm = nn.RMSNorm(h, eps=eps)
        gated = config.feature_sampling == "gated"
        mlp = f"{prefix}.mlp"
        self.mlp = GatedSampling(h, i, quant, mlp) if gated else FusedSampling(h, i, eps, quant, mlp)

    def forward(self, both: Tensor) -> Tensor:
        """[T, H] from [T, 2H]."""
        e = both[:, : both.shape[-1] // 2]
        u = self.fc(both)
        found: Tensor = u + self.mlp(e, self.post_attention_layernorm(u))
        return found


def _fc(config: DrafterConfig, quant: Any, prefix: str) -> ReplicatedLinear:
    h = config.hidden_size
    return ReplicatedLinear(2 * h, h, bias=config.fc_bias, quant_config=quant, prefix=prefix, return_bias=False)


class Attention(LlamaAttention):
    """vLLM's, with norms on queries and keys where the target has them."""

    def __init__(self, config: DrafterConfig, cache_config: Any, quant: Any, prefix: str) -> None:
        super().__init__(
            config=config,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            quant_config=quant,
            bias=config.qkv_bias,
            cache_config=cache_config,
            prefix=prefix,
        )
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """[T, H] from [T, H]."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if self.qk_norm:
            q = self.q_norm(q.reshape(-1, self.num_heads, self.head_dim)).view(q.shape)
            k = self.k_norm(k.reshape(-1, self.num_kv_heads, self.head_dim)).view(k.shape)
        q, k = self.rotary_emb(positions, q, k)
        out: Tensor
        out, _ = self.o_proj(self.attn(q, k, v))
        return out


class Mlp(nn.Module):
    """``fspad.Mlp``, split over I."""

    def __init__(self, h: int, i: int, out: int, quant: Any, prefix: str) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False, "quant_config": quant, "return_bias": False}
        self.gate_up_proj = MergedColumnParallelLinear(h, [i, i], prefix=f"{prefix}.gate_up_proj", **options)
        self.down_proj = RowParallelLinear(i, out, prefix=f"{prefix}.down_proj", **options)

    def forward(self, n: Tensor) -> Tensor:
        """[T, out] from [T, H]."""
        gate, up = self.gate_up_proj(n).chunk(2, -1)
        found: Tensor = self.down_proj(functional.silu(gate) * up)
        return found


class Layer(nn.Module):
    """``fspad.Layer``."""

    def __init__(self, config: DrafterConfig, cache_config: Any, quant: Any, prefix: str) -> None:
        super().__init__()
        h = config.hidden_size
        self.partial_alignment = config.partial_alignment
        self.self_attn = Attention(config, cache_config, quant, f"{prefix}.self_attn")
        self.post_attention_layernorm = nn.RMSNorm(h, eps=config.rms_norm_eps)
        self.mlp = Mlp(h, config.intermediate_size, 2 * h if config.partial_alignment else h, quant, f"{prefix}.mlp")

    def forward(self, positions: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """p and r, [T, H] each."""
        a = s + self.self_attn(positions, s)
        out = self.mlp(self.post_attention_layernorm(a))
        if self.partial_alignment:
            p, r = out.chunk(2, -1)
            return a + p, a + r
        h = a + out
        return h, h


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "hidden_states": 0})
class DrafterModel(nn.Module):
    """Embedding, first linear layer with or without feature sampling, and the one layer."""

    # Of the layer only: feature sampling's gate and up take different inputs and stay apart.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            "layers.0.mlp.gate_proj": ("layers.0.mlp.gate_up_proj", 0),
            "layers.0.mlp.up_proj": ("layers.0.mlp.gate_up_proj", 1),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, config: DrafterConfig, prefix: str = "") -> None:
        super().__init__()
        quant = get_draft_quant_config(vllm_config)
        # Layers are named behind the target's, or their caches would be the target's.
        number = vllm_config.model_config.get_total_num_hidden_layers()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        fc = maybe_prefix(prefix, "fc")
        self.fc = _fc(config, quant, fc) if config.feature_sampling == "none" else Sampling(config, quant, fc)
        self.layers = nn.ModuleList(
            [Layer(config, vllm_config.cache_config, quant, maybe_prefix(prefix, f"layers.{number}"))]
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[T, H] from [T]."""
        found: Tensor = self.embed_tokens(input_ids)
        return found

    def forward(self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """p and r, [T, H] each.

        Args:
            input_ids: [T], row i has token i + 1.
            positions: [T], of row i.
            hidden_states: [T, H], f_i or what the step before returned as r.
        """
        e = self.embed_tokens(input_ids)
        s = self.fc(torch.cat([e, hidden_states], -1))
        p, r = self.layers[0](positions, s)
        return p, r

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads what vLLM's loader hands on."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
        return loaded


class EagleFspadForCausalLM(EagleLlamaForCausalLM):
    """What vLLM's registry knows. ``compute_logits`` and the sharing of embedding and head are vLLM's."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        speculative_config = vllm_config.speculative_config
        assert speculative_config is not None
        self.drafter = of_engine(speculative_config)
        self.name = speculative_config.draft_model_config.model
        self.config = speculative_config.draft_model_config.hf_config
        self.needs_embedding = get_pp_group().world_size > 1 and not vllm_config.use_v2_model_runner
        self.model = DrafterModel(vllm_config=vllm_config, config=self.drafter, prefix=maybe_prefix(prefix, "model"))
        # The head is the target's, and so is the scale of what it gives.
        scale = getattr(vllm_config.model_config.hf_config, "logit_scale", 1.0)
        self.logits_processor = LogitsProcessor(self.drafter.vocab_size, scale=scale)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads a checkpoint of ours, of FSPAD's code or of GRIFFIN's; the names are the same.

        Raises:
            DrafterError: tensors are missing, unknown or misshapen.
        """
        given = {name: tensor for name, tensor in weights if name not in IGNORED}
        check_tensors(self.drafter, {name: tuple(tensor.shape) for name, tensor in given.items()}, self.name)
        if self.needs_embedding and "embed_tokens.weight" not in given:
            raise DrafterError(
                f"drafter {self.name}: with pipeline parallelism the V1 runner does not share the target's embedding: "
                "embed_tokens.weight is missing"
            )
        named = {f"model.{name}": tensor for name, tensor in given.items()}
        for name in named:
            process_eagle_weight(self, name)
        AutoWeightsLoader(self).load_weights(named.items())
