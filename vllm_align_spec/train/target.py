"""The frozen target: its features, its embedding and its head, through transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer


class Target:
    """A causal language model that is only looked at."""

    def __init__(self, name: str, dtype: str, device: torch.device) -> None:
        chosen: Any = dtype if dtype == "auto" else getattr(torch, dtype)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
        self.model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=chosen).eval().to(device)
        self.model.requires_grad_(False)
        self.config: dict[str, Any] = self.model.config.get_text_config().to_dict()
        self.embedding: nn.Module = self.model.get_input_embeddings()
        self.head: nn.Module = self.model.get_output_embeddings()
        self.dtype: torch.dtype = next(self.head.parameters()).dtype
        self.device = device

    @torch.no_grad()
    def features(self, ids: Tensor) -> Tensor:
        """The last hidden states after the final norm, [B, T, H], of ids [B, T] that are padded on the right."""
        found: Tensor = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return found.float()

    @torch.no_grad()
    def following(self, ids: Tensor) -> Tensor:
        """What goes in beside the features: row i has the embedding of token i + 1, the last row zeros; [B, T, H]."""
        return functional.pad(self.embedding(ids[:, 1:]).float(), (0, 0, 0, 1))

    def logits(self, x: Tensor) -> Tensor:
        """The head's, [N, V] from [N, H]; gradients pass through to x."""
        found: Tensor = self.head(x.to(self.dtype))
        return found

    @torch.no_grad()
    def greedy(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Each prompt with the target's own greedy answer behind it, at most ``tokens`` long, its end included."""
        # All that end an answer in vLLM: many models' chat format ends with another token than their tokenizer names.
        told = self.model.generation_config.eos_token_id
        ends = {*(told if isinstance(told, list) else [told]), self.tokenizer.eos_token_id} - {None}
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(ends, default=0)
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self.device)
        seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=seen,
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
            # A model's own generation settings may say otherwise.
            repetition_penalty=1.0,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        answers = []
        for row in output[:, longest:].tolist():
            stop = next((i for i, token in enumerate(row) if token in ends), len(row))
            answers.append(row[: stop + 1])
        return [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
