"""The ``train`` sub-command. Its options are the fields of `TrainConfig`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_align_spec.train.config import TrainConfig

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


class _Options(argparse.ArgumentParser):
    """Asks `TrainConfig` for its fields when it is used, not when the command line is built."""

    filled = False

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """As argparse's."""
        if not self.filled:
            self.filled = True
            _add_options(self)
        return super().parse_known_args(args, namespace)


def _add_options(parser: argparse.ArgumentParser) -> None:
    from vllm_align_spec.train.config import TrainConfig

    for name, field in TrainConfig.model_fields.items():
        told = (field.description or "").replace("%", "%%")
        if not field.is_required():
            told += f" (default: {field.default})"
        flag = f"--{name.replace('_', '-')}"
        if field.annotation is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=told)
        else:
            parser.add_argument(
                flag,
                nargs="+" if name == "data" else None,
                action="extend" if name == "data" else "store",
                required=field.is_required(),
                default=argparse.SUPPRESS,
                metavar=name.upper(),
                help=told,
            )
    parser.add_argument("--ray-workers", type=int, default=0, metavar="N", help="train in N workers of Ray Train")
    parser.add_argument("--ray-gpus", type=float, default=0, metavar="N", help="GPUs of each of them (default: 0)")
    parser.add_argument("--ray-address", metavar="ADDRESS", help="a Ray cluster (default: one that is started here)")


def add_parser(subparsers: Subparsers) -> None:
    """Add ``train fspad`` and ``train answers``; each sets ``run`` to a handler that takes the arguments."""
    parser = subparsers.add_parser("train", help="drafters for your own models")
    what = parser.add_subparsers(required=True, metavar="WHAT", parser_class=_Options)
    what.add_parser("fspad", help="a drafter of FSPAD's family, for vLLM's eagle method").set_defaults(run=_fspad)

    answers = what.add_parser("answers", help="let the target answer the conversations of a data set, through vLLM")
    answers.filled = True
    answers.add_argument("--target", required=True, help="model that answers: a folder or a name")
    told = "JSONL files, as `train fspad` takes them"
    answers.add_argument("--data", nargs="+", action="extend", type=Path, required=True, help=told)
    answers.add_argument("--out", type=Path, required=True, help="JSONL file to write: OpenAI messages")
    answers.add_argument("--temperature", type=float, default=0.0, help="of the answers (default: 0, greedy)")
    answers.add_argument("--max-tokens", type=int, default=512, help="of an answer (default: 512)")
    answers.add_argument("--seed", type=int, default=0, help="of sampled answers")
    answers.set_defaults(run=_answers)


def _fspad(parsed: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from vllm_align_spec.train.config import TrainConfig

    given = {key: value for key, value in vars(parsed).items() if key in TrainConfig.model_fields}
    try:
        config = TrainConfig.model_validate(given)
    except ValidationError as error:
        for item in error.errors():
            option = "--" + str(item["loc"][0]).replace("_", "-")
            print(f"vllm-align-spec: {option} {item['input']!r} is not accepted: {item['msg']}", file=sys.stderr)
        return 2
    if parsed.ray_workers:
        return _on_ray(config, parsed)
    from safetensors import SafetensorError

    from vllm_align_spec.train.loop import DivergedError, train

    try:
        result = train(config)
    except (DivergedError, ValueError, OSError, SafetensorError) as error:
        print(f"vllm-align-spec: {error}", file=sys.stderr)
        return 1
    if result.acceptance.forwards:
        shares = ", ".join(f"{share:.2f}" for share in result.acceptance.accepted)
        print(
            f"{result.state.step} steps in {result.seconds:.0f} s; best: {result.state.best:.2f} tokens per forward at "
            f"step {result.state.best_step}; last: {result.acceptance.tokens_per_forward:.2f}, accepted by position "
            f"{shares}; {config.out}"
        )
    return 0


def _on_ray(config: TrainConfig, parsed: argparse.Namespace) -> int:
    from vllm_align_spec.cluster.train import TrainingError, train

    try:
        found = train(config, workers=parsed.ray_workers, gpus=parsed.ray_gpus, address=parsed.ray_address)
    except (TrainingError, OSError) as error:
        print(f"vllm-align-spec: {error}", file=sys.stderr)
        return 1
    print(
        f"{found['steps']} steps in {parsed.ray_workers} workers; best: {found['best']:.2f} tokens per forward at step "
        f"{found['best_step']}; {config.out}"
    )
    return 0


def _answers(parsed: argparse.Namespace) -> int:
    from vllm_align_spec.train.answers import regenerate

    try:
        count, complaints = regenerate(
            parsed.target,
            parsed.data,
            parsed.out,
            temperature=parsed.temperature,
            max_tokens=parsed.max_tokens,
            seed=parsed.seed,
        )
    except (OSError, ValueError) as error:
        print(f"vllm-align-spec: {error}", file=sys.stderr)
        return 1
    print(f"{count} conversations, {complaints.count} lines left out: {parsed.out}")
    for line in complaints.first:
        print(f"  left out: {line}", file=sys.stderr)
    return 0
