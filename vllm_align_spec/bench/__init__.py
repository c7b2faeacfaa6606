"""The benchmarks behind ``vllm-align-spec bench``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

BENCHES = {
    "overhead": "what the plugin costs where no request uses it",
    "wsd": "time and reward of weak-to-strong decoding",
    "cards": "time, reward and judge calls of cascade reward sampling against the published ARGS loop",
    "fspad": "acceptance and speed of FSPAD's drafter and its relatives",
    "asap": "cost, exactness and use of grammar-aligned sampling",
    "args": "speed and effect of reward-guided search",
    "load": "ordinary requests beside heavy traffic of methods",
}


def add_parser(subparsers: Subparsers) -> None:
    """Add ``bench NAME``; each sets ``run`` to a handler that takes the arguments."""
    parser = subparsers.add_parser("bench", help="measure: a table, a figure, and numbers as JSON")
    names = parser.add_subparsers(required=True, metavar="NAME", dest="bench")
    for name, told in BENCHES.items():
        bench = names.add_parser(name, help=told)
        bench.add_argument("--quick", action="store_true", help="a few minutes: fewer repeats and sizes")
        bench.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go (default: in --out)")
        bench.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for the figure and the numbers")
        if name == "fspad":
            bench.add_argument(
                "--other-seeds", type=Path, nargs="+", default=(), metavar="DIR",
                help="drafters of other seeds, as `lab drafters --seed N --out DIR` writes them",
            )  # fmt: skip
        bench.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    import importlib

    module = importlib.import_module(f"{__name__}.{parsed.bench}")
    own = {"other_seeds": parsed.other_seeds} if parsed.bench == "fspad" else {}
    return int(module.run(quick=parsed.quick, json_file=parsed.json, out=parsed.out, **own) or 0)
