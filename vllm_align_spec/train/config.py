"""Every knob of training a drafter, with the published values as defaults (arXiv 2408.15562; GRIFFIN: 2502.11018)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from vllm_align_spec.drafters.config import VARIANTS


class TrainConfig(BaseModel):
    """Saved beside the weights as ``training.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str = Field(description="The model to draft for: a folder or a name that transformers loads.")
    data: tuple[Path, ...] = Field(min_length=1, description="JSONL files: OpenAI messages or ShareGPT conversations.")
    out: Path = Field(description="Folder for the drafter, its checkpoints and its logs.")
    variant: str = Field("fspad", description=f"Which drafter: {', '.join(VARIANTS)}.")
    intermediate_size: int | None = Field(None, ge=1, description="I of the drafter; the target's by default.")
    start_from: Path | None = Field(None, description="A drafter to go on from: the stage before (GRIFFIN's stages).")

    epochs: int = Field(21, ge=1, description="Passes over the data.")
    max_steps: int | None = Field(None, ge=1, description="Optimiser steps after which to stop, whatever is left.")
    batch_size: int = Field(4, ge=1, description="Conversations per device and forward pass.")
    accumulation: int = Field(1, ge=1, description="Forward passes per optimiser step.")
    max_length: int = Field(2048, ge=8, description="Tokens of a conversation that are used; the rest is cut off.")
    length_pool: int = Field(
        1, ge=1, description="Batches are made of conversations of like length among this many batches (less padding)."
    )
    held_out: float = Field(0.05, gt=0, lt=1, description="Share of the conversations that is not trained on.")

    learning_rate: float = Field(
        5e-5, gt=0, description="Peak of the schedule (EAGLE: 3e-5, GRIFFIN's later stages too)."
    )
    warmup_steps: int = Field(2000, ge=0, description="Steps in which the rate rises.")
    schedule_steps: int = Field(800_000, ge=1, description="Steps after which the rate has fallen to zero, linearly.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Of AdamW.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Of AdamW.")
    weight_decay: float = Field(0.01, ge=0, description="Of AdamW.")
    clip: float = Field(0.5, gt=0, description="Bound on every element of the gradient.")

    regress_weight: float = Field(1.0, ge=0, description="Of the smooth L1 loss between r and the next feature.")
    predict_weight: float = Field(0.1, ge=0, description="Of the cross-entropy between p's and the target's tokens.")
    noise: float = Field(
        0.2,
        ge=0,
        description="Width of the uniform noise on input features, scaled by 512 / length of the conversation.",
    )
    passes: int = Field(
        1, ge=1, le=8, description="Draft steps that are trained; GRIFFIN's later stages have 2 or more."
    )
    top_k_weight: float | None = Field(
        None, ge=0, description="Of the cross-entropy on the target's ten best; 0.5 with passes >= 2, else 0."
    )
    mask_top: int = Field(
        3, ge=0, description="With passes >= 2: a position leaves the later passes once its token is not among so many "
        "best of the draft; 0 keeps all."
    )  # fmt: skip

    feature_cache: Path | None = Field(
        None, description="Folder for the target's features, which are then computed once; runs on the same target and "
        "data may share it. Without one they are computed in every epoch."
    )  # fmt: skip
    feature_cache_gb: float = Field(100.0, gt=0, description="What the folder may take; the rest is computed again.")
    precision: Literal["float32", "bfloat16"] = Field("bfloat16", description="Of autocast; losses are in float32.")
    target_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the target's weights."
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu or cuda.")
    seed: int = Field(0, ge=0, description="Of weights, order and noise.")

    evaluate_every: int = Field(2000, ge=1, description="Steps between evaluations; the best drafter is kept.")
    evaluate_prompts: int = Field(64, ge=1, description="Held-out conversations that the target continues greedily.")
    evaluate_tokens: int = Field(128, ge=2, description="Tokens of each continuation.")
    evaluate_drafts: int = Field(5, ge=1, le=16, description="Draft tokens of the chains that are counted.")
    checkpoint_every: int = Field(1000, ge=1, description="Steps between checkpoints.")
    log_every: int = Field(20, ge=1, description="Steps between lines of the log.")
    diverged: float = Field(4.0, gt=1, description="A smoothed loss so many times its best one ends the run.")
    resume: bool = Field(False, description="Go on from the last checkpoint in `out`.")

    @field_validator("variant")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in VARIANTS:
            raise ValueError(f"it would have to be one of {', '.join(VARIANTS)}")
        return value

    @property
    def top_k_share(self) -> float:
        """The weight of the top-10 loss."""
        if self.top_k_weight is not None:
            return self.top_k_weight
        return 0.5 if self.passes > 1 else 0.0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: up over the warm-up, then down to zero, both linearly."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        left = (self.schedule_steps - step) / max(1, self.schedule_steps - self.warmup_steps)
        return self.learning_rate * max(0.0, left)
