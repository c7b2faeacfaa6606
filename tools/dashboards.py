"""Writes deploy/grafana/*.json, one dashboard a plane: python tools/dashboards.py [--check]."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "deploy" / "grafana"
Panel = tuple[str, str, dict[str, str]]
"""Title, unit (Grafana's name), legend -> expression."""


def rate(counter: str, by: str = "") -> str:
    """A counter's rate, summed."""
    return f"sum{f' by ({by})' if by else ''} (rate({counter}[$__rate_interval]))"


def quantile(share: float, histogram: str, by: str = "") -> str:
    """Of a histogram's observations."""
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', f'{by}, le' if by else 'le')})"


def quantiles(histogram: str) -> dict[str, str]:
    """The median and the tail."""
    return {f"p{share * 100:.0f}": quantile(share, histogram) for share in (0.5, 0.95)}


def mean(histogram: str, by: str = "") -> str:
    """Of a histogram's observations."""
    return f"{rate(f'{histogram}_sum', by)} / {rate(f'{histogram}_count', by)}"


REQUESTS: list[Panel] = [
    ("Requests", "reqps", {"{{method}} {{outcome}}": rate("align_spec:requests_total", "method, outcome")}),
    ("Refused, by option", "reqps", {"{{option}}": rate("align_spec:refused_total", "option")}),
    ("Method failures", "cps", {"{{method}}": rate("align_spec:method_failures_total", "method")}),
    ("Requests in the engine", "none", {
        "running": "sum(vllm:num_requests_running)", "waiting": "sum(vllm:num_requests_waiting)",
    }),
]  # fmt: skip
DASHBOARDS: dict[str, tuple[str, list[Panel]]] = {
    "drafting": ("Drafting plane", [
        ("Drafts accepted", "percentunit", {
            "share": f"{rate('vllm:spec_decode_num_accepted_tokens_total')}"
            f" / {rate('vllm:spec_decode_num_draft_tokens_total')}",
        }),
        ("Accepted by position", "percentunit", {
            "{{position}}": f"{rate('vllm:spec_decode_num_accepted_tokens_per_pos_total', 'position')}"
            f" / scalar({rate('vllm:spec_decode_num_drafts_total')})",
        }),
        ("Tokens per forward pass, WSD", "none", quantiles("align_spec:wsd_tokens_per_forward")),
        ("Opening, tokens", "none", quantiles("align_spec:wsd_opening_tokens")),
        ("Openings, by why they ended", "cps", {
            "{{mode}} {{reason}}": rate("align_spec:wsd_switch_total", "mode, reason"),
        }),
        ("Time to first token, WSD", "s", quantiles("align_spec:wsd_time_to_first_token_seconds")),
        ("Hand-over: waiting for the pilot", "s", quantiles("align_spec:wsd_pilot_seconds")),
        ("Hand-over: pilot errors", "cps", {"errors": rate("align_spec:wsd_pilot_errors_total")}),
    ]),
    "token": ("Token plane", [
        ("ASAp: attempts per choice", "none", {"{{mode}}": mean("align_spec:asap_attempts", "mode")}),
        ("ASAp: choices without an accepted attempt", "cps", {
            "{{mode}}": rate("align_spec:asap_exhausted_total", "mode"),
        }),
        ("ASAp: mass at the root, median", "none", {"bound": quantile(0.5, "align_spec:asap_mass_at_root")}),
        ("ASAp: host time per row", "s", quantiles("align_spec:asap_host_seconds")),
        ("ASAp: memory of the tries", "bytes", {"bytes": "align_spec:asap_bytes"}),
        ("ASAp: nodes, evicted tries", "none", {
            "nodes": "align_spec:asap_nodes", "evicted": "align_spec:asap_evictions",
        }),
        ("Rows bent by companions", "cps", {"{{method}}": rate("align_spec:guided_rows_total", "method")}),
        ("Rows without an answer", "cps", {"{{method}}": rate("align_spec:guided_unanswered_total", "method")}),
    ]),
    "sequence": ("Sequence plane", [
        ("Tokens made per token delivered", "none", {
            "{{method}}": f"{rate('align_spec:sampled_tokens_total', 'method')}"
            f" / {rate('align_spec:delivered_tokens_total', 'method')}",
        }),
        ("CARDS: candidates", "cps", {"{{fate}}": rate("align_spec:cards_segments_total", "fate")}),
        ("CARDS: tries per segment", "none", quantiles("align_spec:cards_tries")),
        ("CARDS: tokens per segment", "none", quantiles("align_spec:cards_segment_tokens")),
        ("Judges: answers", "cps", {"{{judge}}": rate("align_spec:judge_answers_total", "judge")}),
        ("Judges: time of a scoring, p95", "s", {"{{judge}}": quantile(0.95, "align_spec:judge_seconds", "judge")}),
        ("Judges: failures", "cps", {"{{judge}} {{reason}}": rate("align_spec:judge_failures_total", "judge, reason")}),
        ("Judges that nobody asks", "none", {"{{judge}}": "align_spec:judge_open"}),
        ("Answers judged per response", "none", {"{{method}}": mean("align_spec:judge_calls", "method")}),
        ("Reports kept", "none", {"reports": "sum(align_spec:reports_stored)"}),
    ]),
}  # fmt: skip
SOURCE = {"type": "prometheus", "uid": "${source}"}


def panel(place: int, told: Panel) -> dict[str, Any]:
    """Two in a row."""
    title, unit, expressions = told
    return {
        "id": place + 1,
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "gridPos": {"h": 8, "w": 12, "x": 12 * (place % 2), "y": 8 * (place // 2)},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(65 + i), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for i, (legend, expression) in enumerate(expressions.items())
        ],
    }


def dashboard(name: str) -> str:
    """JSON that Grafana imports."""
    title, panels = DASHBOARDS[name]
    source = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    told = {
        "uid": f"align-spec-{name}",
        "title": f"vllm_align_spec: {title}",
        "tags": ["vllm", "align_spec"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source]},
        "panels": [panel(place, told) for place, told in enumerate([*REQUESTS, *panels])],
    }
    return json.dumps(told, indent=1) + "\n"


def main() -> int:
    """Writes the files, or, with --check, says which are out of date."""
    files = {FOLDER / f"{name}.json": dashboard(name) for name in DASHBOARDS}
    stale = [file for file, text in files.items() if not file.exists() or file.read_text() != text]
    if sys.argv[1:] == ["--check"]:
        if stale:
            print(f"out of date: {', '.join(file.name for file in stale)}; run tools/dashboards.py")
        return bool(stale)
    for file in stale:
        file.write_text(files[file])
        print(f"wrote {file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
