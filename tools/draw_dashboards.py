"""Draws the Grafana dashboards from a Prometheus, without a Grafana: the same panels, the same queries.

Usage: python tools/draw_dashboards.py --prometheus http://localhost:9090 --minutes 15 --out FOLDER
"""

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

DASHBOARDS = Path(__file__).parent.parent / "deploy" / "grafana"
COLUMNS = 4


def series(root: str, expression: str, seconds: float, step: float) -> list[dict[str, Any]]:
    """What a query gave over the last seconds."""
    now = time.time()
    asked = urllib.parse.urlencode({"query": expression, "start": now - seconds, "end": now, "step": step})
    with urllib.request.urlopen(f"{root}/api/v1/query_range?{asked}", timeout=30) as response:
        found: list[dict[str, Any]] = json.load(response)["data"]["result"]
    return found


def draw(dashboard: dict[str, Any], root: str, seconds: float, interval: str) -> Any:
    """A figure with a plot a panel."""
    panels = dashboard["panels"]
    rows = math.ceil(len(panels) / COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(4.2 * COLUMNS, 2.7 * rows), squeeze=False)
    figure.suptitle(dashboard["title"])
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        labelled = False
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", interval)
            for one in series(root, expression, seconds, max(1.0, seconds / 200)):
                points = [(float(at), float(value)) for at, value in one["values"]]
                legend = re.sub(r"\{\{(\w+)\}\}", lambda m, of=one["metric"]: of.get(m[1], ""), target["legendFormat"])
                shown = legend if any(value > 0 for _, value in points) else ""  # what never was needs no legend
                axis.plot([at - time.time() for at, _ in points], [value for _, value in points], label=shown or None)
                labelled |= bool(shown)
        axis.set_title(panel["title"], fontsize=9)
        axis.set_ylabel(panel.get("fieldConfig", {}).get("defaults", {}).get("unit", ""), fontsize=7)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        if labelled:
            axis.legend(fontsize=6)
    for axis in axes[-1]:
        axis.set_xlabel("seconds", fontsize=7)
    figure.tight_layout()
    return figure


def main() -> None:
    """One PNG a dashboard."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", default="http://localhost:9090")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--rate-interval", default="1m", help="what rates are taken over (default: 1m)")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for file in sorted(DASHBOARDS.glob("*.json")):
        dashboard = json.loads(file.read_text(encoding="utf-8"))
        figure = draw(dashboard, given.prometheus, 60 * given.minutes, given.rate_interval)
        figure.savefig(given.out / f"dashboard_{file.stem}.png", dpi=75)
        pyplot.close(figure)


if __name__ == "__main__":
    main()
