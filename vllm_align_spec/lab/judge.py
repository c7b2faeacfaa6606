"""A reward model that scores conversations with a plain transformers forward pass."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_align_spec.lab import model_path


class Judge:
    """A shipped judge, by name. Higher is better; only differences between answers to one prompt mean anything."""

    def __init__(self, name: str = "judge-other") -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        path = model_path(name)
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()

    def score(self, conversations: Sequence[list[dict[str, str]]]) -> list[float]:
        """Rewards of conversations, each ending in the assistant's message; one forward pass per 32 of them."""
        import torch

        texts = [self._tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
        rewards: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(texts), 32):
                inputs = self._tokenizer(
                    texts[start : start + 32],
                    add_special_tokens=False,
                    padding=True,
                    padding_side="right",
                    return_tensors="pt",
                )
                logits = self._model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
                rewards += logits[:, 0].tolist()
        return rewards
