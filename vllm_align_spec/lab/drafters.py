"""Trains the drafters of the lab's base model: five variants and a widened EAGLE, with the same data and steps, and
GRIFFIN once more in two stages."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from vllm_align_spec import lab
from vllm_align_spec.drafters.config import VARIANTS, for_target, read
from vllm_align_spec.drafters.fspad import Drafter
from vllm_align_spec.lab import world
from vllm_align_spec.train.answers import regenerate
from vllm_align_spec.train.config import TrainConfig
from vllm_align_spec.train.loop import Result, save_drafter, train

GREEDY, WRITTEN = 1000, 4000
"""Requests that base answers itself, greedily, and conversations as they were written for base to learn from: those are
what base says at temperature 1, as far as it learned."""
SHARED: dict[str, Any] = {
    "epochs": 50,
    "batch_size": 8,
    "length_pool": 32,
    "learning_rate": 2e-3,
    "warmup_steps": 20,
    "max_length": 256,
    "precision": "float32",
    "target_dtype": "float32",
    "device": "cpu",
    "evaluate_prompts": 32,
    "evaluate_tokens": 64,
    "log_every": 20,
}
"""What all variants share. The published rate would need the published number of steps."""
STEPS = 1200
WIDE = "eagle-wide"
"""EAGLE with as many parameters as FSPAD: tells what the equations bring from what the parameters bring."""
SECOND = "griffin-2"
"""GRIFFIN after a second stage, as long as the first, on its own drafts, which the others do not have."""
SECOND_STAGE: dict[str, Any] = {"passes": 2, "learning_rate": 1e-3}
NAMES = (*VARIANTS, WIDE, SECOND)


def wide_intermediate_size() -> int:
    """I of `WIDE`: what FSPAD has more goes into the three matrices of EAGLE's feed-forward layer."""
    target = json.loads((lab.model_path("base") / "config.json").read_text(encoding="utf-8"))
    eagle, fspad = (for_target(target, variant) for variant in ("eagle", "fspad"))
    return eagle.intermediate_size + (fspad.parameters() - eagle.parameters()) // (3 * eagle.hidden_size)


def data_files(folder: Path, seed: int) -> tuple[Path, Path]:
    """Where the answers to `GREEDY` requests and the `WRITTEN` conversations are kept."""
    return folder / f"greedy-{GREEDY}-{seed}.jsonl", folder / f"written-{WRITTEN}-{seed}.jsonl"


def write_data(folder: Path, seed: int) -> None:
    """Chats of the training side of the lab's language: as written, and with base's own greedy answers."""
    asked = folder / f"asked-{GREEDY}-{seed}.jsonl"
    greedy, written = data_files(folder, seed)
    documents = (d for d in world.stream(seed + 5000, "train") if d.messages)
    for file, count in ((asked, GREEDY), (written, WRITTEN)):
        lines = (json.dumps({"messages": list(d.messages)}) for d in itertools.islice(documents, count))
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; else the engine asks for nearly all memory there is
    regenerate(
        str(lab.model_path("base")),
        [asked],
        greedy,
        temperature=0.0,
        max_tokens=160,
        seed=seed,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=32,
        enforce_eager=True,
        disable_log_stats=True,
    )


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
        only: of `NAMES`; all by default. `SECOND` goes on from the ``griffin`` that is in ``out``.
        seed: of weights, order, noise and data.
        steps: optimiser steps of each.
        data: folder with answers and features that an earlier run wrote, or for this one to write; a temporary one by
            default. Runs at the same time may share it once it has the answers.
        console: where progress is shown.
    """
    console = console or Console(width=120)
    out.mkdir(parents=True, exist_ok=True)
    report_file = out / "report.json"
    report: dict[str, Any] = json.loads(report_file.read_text(encoding="utf-8")) if report_file.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = data or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        files = data_files(folder, seed)
        if not all(file.exists() for file in files):
            write_data(folder, seed)
        for name in sorted(only, key=NAMES.index) if only else NAMES:
            config = TrainConfig(
                target=str(lab.model_path("base")),
                data=files,
                out=Path(scratch) / name,
                seed=seed,
                feature_cache=folder / f"features-{seed}",  # computed once for all of them
                **SHARED | _particular(name, out, steps),
            )
            result = train(config, console=console)
            drafter = Drafter(read(config.out))
            drafter.load_state_dict(load_file(config.out / "model.safetensors"))
            save_drafter(drafter, out / name, torch.float16)
            report[name] = _figures(result, out / name)
            told = {"seed": seed, "steps": steps, "shared": SHARED, "greedy": GREEDY, "written": WRITTEN}
            told["second_stage"] = SECOND_STAGE
            report_file.write_text(json.dumps({**report, "setting": told}, indent=1) + "\n", encoding="utf-8")


def _particular(name: str, out: Path, steps: int) -> dict[str, Any]:
    """What `SHARED` leaves open."""
    found: dict[str, Any] = {"variant": name}
    if name == WIDE:
        found = {"variant": "eagle", "intermediate_size": wide_intermediate_size()}
    elif name == SECOND:
        found = {"variant": "griffin", "start_from": out / "griffin", **SECOND_STAGE}
    return {
        **found,
        "max_steps": steps,
        "schedule_steps": steps,
        "evaluate_every": max(1, steps // 2),
        "checkpoint_every": steps,
    }


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
