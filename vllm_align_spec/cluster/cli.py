"""The sub-commands ``cluster serve`` and ``batch``. Ray is imported when one of them runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

CHECKED = "vllm_align_spec.cluster."


def add_parsers(subparsers: Any) -> None:
    """Adds both; each sets ``run`` to a handler that takes the arguments."""
    cluster = subparsers.add_parser("cluster", help="replicas, judges and their scaling by Ray Serve")
    what = cluster.add_subparsers(required=True, metavar="WHAT")
    serve = what.add_parser("serve", help="deploy a Ray Serve configuration, and stay until Ctrl-C")
    serve.add_argument("config", type=Path, help="YAML as of `serve run`; see docs/cluster.md")
    serve.add_argument("--address", help="a Ray cluster; without, one on this machine is started")
    serve.add_argument("--num-cpus", type=int, help="CPUs of the one that is started (default: the machine's)")
    serve.add_argument("--check", action="store_true", help="only say whether the configuration is right")
    serve.set_defaults(run=_serve)

    batch = subparsers.add_parser(
        "batch",
        help="a file of requests in OpenAI's batch format, spread over servers by Ray Data",
        usage="%(prog)s --input FILE --output FILE [options] (--url URL | -- MODEL [arguments of vllm serve])",
    )
    batch.add_argument("--input", type=Path, required=True, help="JSON lines: custom_id, method, url, body")
    batch.add_argument("--output", type=Path, required=True, help="JSON lines: custom_id, response, error, report")
    batch.add_argument("--url", help="a server that exists, such as http://127.0.0.1:8000")
    batch.add_argument("--servers", type=int, default=1, help="servers to start (default: %(default)s)")
    batch.add_argument("--gpus", type=float, default=0, help="of each (default: %(default)s)")
    batch.add_argument("--cpus", type=float, default=1, help="of each (default: %(default)s)")
    batch.add_argument("--in-flight", type=int, default=64, help="requests at once, of each (default: %(default)s)")
    batch.add_argument("--tries", type=int, default=4, help="of a request (default: %(default)s)")
    batch.add_argument("--address", help="a Ray cluster; without, one on this machine is started")
    batch.add_argument("--verbose", action="store_true", help="show what the servers print")
    batch.add_argument("serve", nargs="*", metavar="-- MODEL ...", help="arguments of `vllm serve`")
    batch.set_defaults(run=_batch)


def _batch(parsed: argparse.Namespace) -> int:
    from vllm_align_spec.cluster.batch import run

    return run(parsed)


def _serve(parsed: argparse.Namespace) -> int:
    import yaml
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    from vllm_align_spec.options import OptionError

    try:
        config = ServeDeploySchema.model_validate(yaml.safe_load(parsed.config.read_text(encoding="utf-8")))
        for application in config.applications:
            _check(application.import_path, application.args)
    except (OSError, yaml.YAMLError, ValidationError, OptionError) as error:
        print(f"vllm-align-spec: {parsed.config}: {error}", file=sys.stderr)
        return 1
    if parsed.check:
        print(f"{parsed.config}: {', '.join(application.name for application in config.applications)}: accepted")
        return 0

    import ray
    from ray.serve import scripts

    ray.init(address=parsed.address, num_cpus=parsed.num_cpus, namespace="serve")
    scripts.cli.main(["run", str(parsed.config)], standalone_mode=False)
    return 0


def _check(import_path: str, args: dict[str, Any]) -> None:
    """Says what is wrong with the arguments of one of our applications before anything starts."""
    if import_path == f"{CHECKED}serving:build":
        from vllm_align_spec.cluster.serving import ServingArgs, checked

        checked(ServingArgs.model_validate(args))
    elif import_path == f"{CHECKED}judge:build":
        from vllm_align_spec.cluster.judge import JudgeArgs

        JudgeArgs.model_validate(args)
