"""A tiny world with models small enough to ship: every decoding method can be shown and measured without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

MODELS: tuple[str, ...] = ("base", "pilot", "pilot-other", "judge", "judge-other")
"""The shipped models; what each is for is told in this folder's README."""

MODELS_FOLDER = Path(__file__).parent / "models"
DRAFTERS_FOLDER = MODELS_FOLDER / "drafters"


def model_path(name: str) -> Path:
    """The folder of a shipped model.

    Raises:
        ValueError: there is no such model.
        FileNotFoundError: the model has not been built.
    """
    if name not in MODELS:
        raise ValueError(f"lab model {name!r} is unknown; it would have to be one of {', '.join(MODELS)}")
    path = MODELS_FOLDER / name
    if not (path / "model.safetensors").exists():
        raise FileNotFoundError(f"lab model {name!r} is not there; build it with: vllm-align-spec lab build")
    return path


def drafter_path(variant: str) -> Path:
    """The folder of a shipped drafter of ``base``, by its variant (see `vllm_align_spec.drafters.config`).

    Raises:
        FileNotFoundError: there is no such drafter.
    """
    path = DRAFTERS_FOLDER / variant
    if not (path / "model.safetensors").exists():
        raise FileNotFoundError(f"lab drafter {variant!r} is not there; train it with: vllm-align-spec lab drafters")
    return path


def heldout_prompts(
    kind: Literal["chat", "json", "arithmetic", "binary", "prose"] = "chat",
) -> list[list[dict[str, str]]]:
    """The shipped prompts of a kind: lists of messages, each ending in a user's. No lab model was trained on them."""
    lines = (MODELS_FOLDER / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    records = (json.loads(line) for line in lines)
    return [record["messages"] for record in records if record["kind"] == kind]
