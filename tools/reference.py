"""Writes docs/options.md and docs/metrics.md from the code: python tools/reference.py [--check]."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel

from vllm_align_spec.metrics import metrics
from vllm_align_spec.options import METHODS, SHARED_KEYS, EngineOptions, accepted_by

DOCS = Path(__file__).parent.parent / "docs"
GENERATED = "<!-- Written by tools/reference.py. -->\n"


def cell(text: Any) -> str:
    """Text that may stand in a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def default(schema: Mapping[str, Any], *, required: bool) -> str:
    """What a key is if it is left out."""
    if required:
        return "required"
    value = schema.get("default")
    return "none" if value in (None, [], "", {}) else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def properties(schema: Mapping[str, Any], root: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Key, accepted, default and description of every leaf of a model's schema."""
    for name, own in schema.get("properties", {}).items():
        inner = own.get("allOf", [own])[0]
        chosen = [one for one in inner.get("anyOf", [inner]) if one.get("type") != "null"]
        named = [*chosen[0].get("patternProperties", {}).values(), chosen[0].get("additionalProperties")]
        below = named[0] if isinstance(named[0], Mapping) else chosen[0]
        path = f"{prefix}{name}" + ("" if below is chosen[0] else ".NAME")
        variants = below.get("oneOf", [below])
        models = [root["$defs"][one["$ref"].rpartition("/")[2]] for one in variants if "$ref" in one]
        if not models:
            needed = name in schema.get("required", ())
            yield f"{prefix}{name}", accepted_by(own), default(own, required=needed), own.get("description", "")
        for model in models:
            kind = model["properties"].get("kind", {}).get("const")
            told = f" (kind {kind})" if kind else ""
            for key, *rest in properties(model, root, f"{path}."):
                yield key + told, *rest  # type: ignore[misc]


def table(rows: Iterator[tuple[str, str, str, str]]) -> str:
    """Of keys."""
    lines = ["| key | accepted | default | what |", "|---|---|---|---|"]
    for key, accepted, value, what in rows:
        name, _, told = key.partition(" ")
        lines.append(f"| `{name}`{' ' + told if told else ''} | {cell(accepted)} | {cell(value)} | {cell(what)} |")
    return "\n".join(lines) + "\n"


def options_page() -> str:
    """All options, of requests and of engines."""
    parts = [
        GENERATED,
        "# Options\n",
        "What a request may say in `vllm_xargs`, method by method, and what an operator may say under "
        "`--additional-config '{\"align_spec\": {…}}'`. An unknown key with one of these prefixes, a wrong type or a "
        "value out of range is answered with 400 (a request) or ends the start-up (an engine); the message names the "
        "key, the value and what would be accepted. `GET /v1/align_spec/info` has the same as JSON schemas.\n",
        "## Of requests\n",
        f"`{next(iter(SHARED_KEYS))}` goes with every method.\n",
    ]
    for options in METHODS:
        schema = options.model_json_schema()
        if options is not METHODS[0]:
            schema["properties"] = {k: v for k, v in schema["properties"].items() if k not in SHARED_KEYS}
        parts += [f"### {options.method}\n", f"{first_line(options)}\n", table(properties(schema, schema, ""))]
    schema = EngineOptions.model_json_schema()
    parts += ["## Of the engine\n", table(properties(schema, schema, ""))]
    return "\n".join(parts)


def first_line(model: type[BaseModel]) -> str:
    """Of its docstring."""
    return (model.__doc__ or "").strip().split("\n")[0]


def metrics_page() -> str:
    """All metrics."""
    lines = [
        GENERATED,
        "# Metrics\n",
        "In `/metrics`, fed when a request ends; no metric of vLLM is touched. Under Ray a `:` becomes `_`.\n",
        "| metric | type | labels | what |",
        "|---|---|---|---|",
    ]
    for collector in vars(metrics()).values():
        assert isinstance(collector, MetricWrapperBase)
        (metric,) = collector.describe()
        name = metric.name + ("_total" if metric.type == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in collector._labelnames)
        lines.append(f"| `{name}` | {metric.type} | {labels} | {cell(metric.documentation)} |")
    return "\n".join(lines) + "\n"


PAGES = {"options.md": options_page, "metrics.md": metrics_page}


def main() -> int:
    """Writes the pages, or, with --check, says which are out of date."""
    stale = [name for name, page in PAGES.items() if not (DOCS / name).exists() or (DOCS / name).read_text() != page()]
    if sys.argv[1:] == ["--check"]:
        if stale:
            print(f"out of date: {', '.join(stale)}; run tools/reference.py")
        return bool(stale)
    for name in stale:
        (DOCS / name).write_text(PAGES[name]())
        print(f"wrote docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
