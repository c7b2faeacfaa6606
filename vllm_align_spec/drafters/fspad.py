"""FSPAD's drafter and its relatives, as equations (arXiv 2408.15562, section 3; GRIFFIN: arXiv 2502.11018).

f_i is the target's last hidden state after its final norm, e_{i+1} its embedding of the token that came after::

    u = W_fc [e; f] + b
    s = u                                                        plain (EAGLE)
    s = u + W_d (SiLU(W_g e) * W_u RMSNorm(u))                   gated: the token that was really sampled is the gate
    s = u + W_d SiLU(W_u [RMSNorm'(RMSNorm(u)); RMSNorm'(e)])    fused (GRIFFIN), one norm' for both
    a = s + SelfAttn(s)
    n = RMSNorm(a)
    [p; r] = [a; a] + W'_d (SiLU(W'_g n) * W'_u n)               partial alignment: W'_d is 2H x I
    p = r = a + W'_d (SiLU(W'_g n) * W'_u n)                     without it: W'_d is H x I

p goes to the target's frozen head and gives the draft, r is the feature of the next step. Here is the twin for training
and for tests, in torch; `served` has the same in vLLM's layers. Parameter names are a checkpoint's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from vllm_align_spec.drafters.config import DrafterConfig


class GatedSampling(nn.Module):
    """The gate and what it gates come from different inputs."""

    def __init__(self, h: int, i: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(h, i, bias=False)
        self.up_proj = nn.Linear(h, i, bias=False)
        self.down_proj = nn.Linear(i, h, bias=False)

    def forward(self, e: Tensor, u: Tensor) -> Tensor:
        """[..., H] from the embedding and the normed u, both [..., H]."""
        found: Tensor = self.down_proj(functional.silu(self.gate_proj(e)) * self.up_proj(u))
        return found


class FusedSampling(nn.Module):
    """GRIFFIN's: both inputs normed by one norm and put side by side."""

    def __init__(self, h: int, i: int, eps: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(h, eps=eps)
        self.up_proj = nn.Linear(2 * h, i, bias=False)
        self.down_proj = nn.Linear(i, h, bias=False)

    def forward(self, e: Tensor, u: Tensor) -> Tensor:
        """[..., H] from the embedding and the normed u, both [..., H]."""
        both = torch.cat([self.input_layernorm(u), self.input_layernorm(e)], -1)
        found: Tensor = self.down_proj(functional.silu(self.up_proj(both)))
        return found


class Sampling(nn.Module):
    """From [e; f] to s, with feature sampling."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        h, i, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        self.fc = nn.Linear(2 * h, h, bias=config.fc_bias)
        self.post_attention_layernorm = nn.RMSNorm(h, eps=eps)
        self.mlp = GatedSampling(h, i) if config.feature_sampling == "gated" else FusedSampling(h, i, eps)

    def forward(self, both: Tensor) -> Tensor:
        """[..., H] from [..., 2H]."""
        e = both[..., : both.shape[-1] // 2]
        u = self.fc(both)
        found: Tensor = u + self.mlp(e, self.post_attention_layernorm(u))
        return found


@dataclass
class Past:
    """Keys and values, [B, kv heads, T, D], of the passes of a chain so far."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class Attention(nn.Module):
    """Causal attention of one Llama layer, also over the passes of a chain (see `Drafter.forward`)."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        h, self.head_dim = config.hidden_size, config.head_dim
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(h, q, bias=config.qkv_bias)
        self.k_proj = nn.Linear(h, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(h, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q, h, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, s: Tensor, cos: Tensor, sin: Tensor, past: Past) -> Tensor:
        """[B, T, H] from [B, T, H]; appends this pass's keys and values to ``past``."""
        batch, length, _ = s.shape
        q, k, v = (
            project(s).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        past.keys.append(k)
        past.values.append(v)
        if len(past.keys) == 1:
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            out = self._chained(q, past)
        found: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return found

    def _chained(self, q: Tensor, past: Past) -> Tensor:
        # In pass j, row i is the j-th draft step of the chain that began at row o = i - (j - 1). It sees the first pass
        # up to o, and of the later passes the rows of its own chain: pass j - m at row i - m.
        length, passes = q.shape[-2], len(past.keys)
        keys, values = ([x.repeat_interleave(self.groups, 1) for x in xs] for xs in (past.keys, past.values))
        rows = torch.arange(length, device=q.device)
        before = rows[None, :] <= rows[:, None] - (passes - 1)  # [T, T]
        scores = [(q @ keys[0].transpose(-1, -2)).masked_fill(~before, float("-inf"))]
        for back in range(passes - 1):
            same = (q * _shifted(keys[passes - 1 - back], back)).sum(-1, keepdim=True)
            scores.append(same.masked_fill((rows < back)[:, None], float("-inf")))
        weights = (torch.cat(scores, -1) * self.head_dim**-0.5).softmax(-1)
        out: Tensor = weights[..., :length] @ values[0]
        for back in range(passes - 1):
            at = length + back
            out = out + weights[..., at : at + 1] * _shifted(values[passes - 1 - back], back)
        return out


def _shifted(x: Tensor, back: int) -> Tensor:
    """Row i becomes row i - back, along the second last dimension; zeros come in."""
    return functional.pad(x, (0, 0, back, 0))[..., : x.shape[-2], :]


class Mlp(nn.Module):
    """Llama's, with a second half of outputs where prediction and feedback are two vectors."""

    def __init__(self, h: int, i: int, out: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(h, i, bias=False)
        self.up_proj = nn.Linear(h, i, bias=False)
        self.down_proj = nn.Linear(i, out, bias=False)

    def forward(self, n: Tensor) -> Tensor:
        """[..., out] from [..., H]."""
        found: Tensor = self.down_proj(functional.silu(self.gate_proj(n)) * self.up_proj(n))
        return found


class Layer(nn.Module):
    """From s to (p, r)."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        h = config.hidden_size
        self.partial_alignment = config.partial_alignment
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(h, eps=config.rms_norm_eps)
        self.mlp = Mlp(h, config.intermediate_size, 2 * h if config.partial_alignment else h)

    def forward(self, s: Tensor, cos: Tensor, sin: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        """p and r, [B, T, H] each."""
        a = s + self.self_attn(s, cos, sin, past)
        out = self.mlp(self.post_attention_layernorm(a))
        if self.partial_alignment:
            p, r = out.chunk(2, -1)
            return a + p, a + r
        return a + out, a + out


class Drafter(nn.Module):
    """Any variant of the family. Embedding and head are the target's and no part of it."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        h = config.hidden_size
        self.fc: nn.Module = (
            nn.Linear(2 * h, h, bias=config.fc_bias) if config.feature_sampling == "none" else Sampling(config)
        )
        self.layers = nn.ModuleList([Layer(config)])
        sizes = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings", "rope_parameters")
        rope = LlamaConfig(**{name: getattr(config, name) for name in sizes})
        self._rotary = [LlamaRotaryEmbedding(rope)]  # in a list: it has nothing to save, to train or to move

    def forward(self, embedded: Tensor, features: Tensor, past: Past | None = None) -> tuple[Tensor, Tensor]:
        """One pass over whole sequences, the j-th of a chain if ``past`` holds those before.

        Args:
            embedded: e_{i+1}, [B, T, H]: row i has the embedding of token i + 1.
            features: [B, T, H]; f_i in the first pass, in the j-th the r_{i-1} of the pass before. Row i of the j-th
                pass is the j-th draft step after the target's step i - j + 1, and sees what that step would see.
            past: filled by the passes before; this pass is appended.

        Returns:
            p and r, [B, T, H] each.
        """
        s = self.fc(torch.cat([embedded, features], -1))
        positions = torch.arange(s.shape[1], device=s.device)[None]
        rotary = self._rotary[0].to(s.device)
        cos, sin = rotary(s, positions)
        found: tuple[Tensor, Tensor] = self.layers[0](s, cos, sin, Past() if past is None else past)
        return found

    def chain(self, embedded: Tensor, features: Tensor, passes: int) -> list[tuple[Tensor, Tensor]]:
        """(p, r) of ``passes`` draft steps from every row at once, each pass fed with the detached r of the one before.

        Row i of pass j continues the chain of row i - j + 1, given the tokens that really followed: that is also what
        greedy drafting computes as long as its drafts are those tokens.
        """
        past, found = Past(), []
        for _ in range(passes):
            p, r = self(embedded, features, past)
            found.append((p, r))
            features = _shifted(r.detach(), 1)
        return found
