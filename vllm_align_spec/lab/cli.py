"""The ``lab`` sub-command: build the models, evaluate them, tell what is there."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_align_spec import lab

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add ``lab build``, ``lab eval`` and ``lab info``; each sets ``run`` to a handler that takes the arguments."""
    parser = subparsers.add_parser("lab", help="the tiny models that ship with the package")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    build = actions.add_parser("build", help="train all models from a seed (about 40 minutes on two idle cores)")
    build.add_argument("--out", type=Path, default=lab.MODELS_FOLDER, help="folder to fill (default: the package's)")
    build.add_argument("--only", nargs="+", choices=lab.MODELS, help="build these models only")
    build.add_argument("--scale", type=float, default=1.0, help="how many of the usual steps (0.05: a quick try)")
    build.add_argument("--seed", type=int, default=0)
    build.set_defaults(run=_build)

    drafters = actions.add_parser(
        "drafters", help="train base's drafters from a seed: one a variant, a widened EAGLE, and GRIFFIN's second stage"
    )
    drafters.add_argument(
        "--out", type=Path, default=lab.DRAFTERS_FOLDER, help="folder to fill (default: the package's)"
    )
    drafters.add_argument(
        "--only", nargs="+", metavar="NAME", help="train these only: a variant, eagle-wide, griffin-2"
    )
    drafters.add_argument(
        "--steps",
        type=int,
        default=1200,
        help="optimiser steps of each (default: 1200)",
    )
    drafters.add_argument("--seed", type=int, default=0)
    drafters.add_argument("--data", type=Path, help="folder that keeps base's answers from one run to the next")
    drafters.set_defaults(run=_drafters)

    evaluate = actions.add_parser("eval", help="reward of base, pilot and weak-to-strong decoding on held-out prompts")
    evaluate.add_argument("--models", type=Path, default=lab.MODELS_FOLDER, help="folder with the models")
    evaluate.add_argument("--out", type=Path, default=Path("out/lab"), help="folder for the table, figure and JSON")
    evaluate.add_argument("--prompts", type=int, default=96, help="how many held-out prompts (default: 96)")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.set_defaults(run=_evaluate)

    info = actions.add_parser("info", help="the models that are there, and their figures")
    info.set_defaults(run=_info)


def _build(arguments: argparse.Namespace) -> None:
    from vllm_align_spec.lab.build import build

    build(arguments.out, only=arguments.only, scale=arguments.scale, seed=arguments.seed)


def _drafters(arguments: argparse.Namespace) -> None:
    from vllm_align_spec.lab.drafters import build

    build(arguments.out, only=arguments.only, seed=arguments.seed, steps=arguments.steps, data=arguments.data)


def _evaluate(arguments: argparse.Namespace) -> None:
    from vllm_align_spec.lab.evaluate import evaluate

    evaluate(arguments.models, arguments.out, prompts=arguments.prompts, seed=arguments.seed)


def _info(arguments: argparse.Namespace) -> None:
    report = json.loads((lab.MODELS_FOLDER / "report.json").read_text(encoding="utf-8"))
    for name in lab.MODELS:
        figures = report["models"].get(name)
        if figures is None:
            print(f"{name:12} not built")
            continue
        quality = figures.get("perplexity") or figures["pairwise_accuracy"]
        told = ", ".join(f"{what}: {value:.3g}" for what, value in quality.items())
        print(f"{name:12} {figures['parameters'] / 1e6:.2f} M parameters, {figures['bytes'] / 1e6:.1f} MB; {told}")
        print(f"{'':12} {lab.model_path(name)}")
