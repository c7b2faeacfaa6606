"""Trains the lab's drafters: five variants for the base model, with the same data, steps and schedule."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from vllm_align_spec import lab
from vllm_align_spec.drafters.config import VARIANTS, read
from vllm_align_spec.drafters.fspad import Drafter
from vllm_align_spec.lab import world
from vllm_align_spec.train.answers import regenerate
from vllm_align_spec.train.config import TrainConfig
from vllm_align_spec.train.loop import Result, save_drafter, train

CONVERSATIONS = 3000
"""Requests that base answers twice, once greedily and once sampled at temperature 1."""
SHARED: dict[str, Any] = {
    "epochs": 50,
    "batch_size": 16,
    "length_pool": 16,
    "learning_rate": 2e-3,
    "warmup_steps": 40,
    "max_length": 256,
    "precision": "float32",
    "target_dtype": "float32",
    "device": "cpu",
    "evaluate_prompts": 48,
    "evaluate_tokens": 96,
    "log_every": 20,
}
"""What all variants share. The published rate would need the published number of steps."""
STEPS = 600


def write_conversations(file: Path, seed: int, count: int = CONVERSATIONS) -> None:
    """Chats of the training side of the lab's language, without answers that anybody should keep."""
    with file.open("w", encoding="utf-8") as stream:
        documents = (d for d in world.stream(seed, "train") if d.messages)
        for document in itertools.islice(documents, count):
            stream.write(json.dumps({"messages": list(document.messages)}) + "\n")


def write_data(folder: Path, seed: int, count: int = CONVERSATIONS) -> tuple[Path, ...]:
    """Base's own answers to them, greedy and sampled."""
    asked = folder / "asked.jsonl"
    write_conversations(asked, seed, count)
    files = []
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        file = folder / f"{name}.jsonl"
        regenerate(
            str(lab.model_path("base")),
            [asked],
            file,
            temperature=temperature,
            max_tokens=160,
            seed=seed,
            dtype="float32",
            max_model_len=512,
            max_num_seqs=32,
            enforce_eager=True,
            disable_log_stats=True,
        )
        files.append(file)
    return tuple(files)


def build(
    out: Path,
    *,
    only: Sequence[str] | None = None,
    seed: int = 0,
    steps: int = STEPS,
    data: Path | None = None,
    console: Console | None = None,
) -> None:
    """Trains into ``out/<variant>/``, float16, with ``report.json`` beside them.

    Args:
        out: the folder to fill.
        only: variants; all by default.
        seed: of weights, order, noise and data.
        steps: optimiser steps of each.
        data: folder with answers that an earlier run wrote, or for this one to write; a temporary one by default.
        console: where progress is shown.
    """
    console = console or Console(width=120)
    out.mkdir(parents=True, exist_ok=True)
    report_file = out / "report.json"
    report: dict[str, Any] = json.loads(report_file.read_text(encoding="utf-8")) if report_file.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = data or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        files = tuple(folder / f"{name}.jsonl" for name in ("greedy", "sampled"))
        if not all(file.exists() for file in files):
            files = write_data(folder, seed)
        for variant in only or VARIANTS:
            config = TrainConfig(
                target=str(lab.model_path("base")),
                data=files,
                out=Path(scratch) / variant,
                variant=variant,
                seed=seed,
                max_steps=steps,
                schedule_steps=steps,
                evaluate_every=max(1, steps // 4),
                checkpoint_every=steps,
                **SHARED,
            )
            result = train(config, console=console)
            drafter = Drafter(read(config.out))
            drafter.load_state_dict(load_file(config.out / "model.safetensors"))
            save_drafter(drafter, out / variant, torch.float16)
            report[variant] = _figures(result, out / variant)
            told = {"seed": seed, "steps": steps, "shared": SHARED, "conversations": CONVERSATIONS}
            report_file.write_text(json.dumps({**report, "setting": told}, indent=1) + "\n", encoding="utf-8")


def _figures(result: Result, folder: Path) -> dict[str, Any]:
    return {
        "parameters": result.parameters,
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "steps": result.state.step,
        "tokens": result.state.tokens,
        "seconds": round(result.seconds, 1),
        "best_step": result.state.best_step,
        "offline_tokens_per_forward": round(result.state.best, 3),
        "offline_accepted": [round(share, 3) for share in result.acceptance.accepted],
    }
