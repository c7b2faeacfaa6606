"""A real Prometheus with our rules scrapes a server under load: every expression of rules and dashboards has data."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import openai
import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
METHODS = [
    {"wsd": "shared", "wsd_gamma": 0.3},
    {"wsd": "handover"},
    {"args": True, "args_reward": "judge"},
    {"dera": True},
    {"pad": True},
    {"genarm": True},
    {"cards": "on", "cards_reward": "short", "cards_threshold": -1.0, "cards_entropy": 0.5},
    {"bon": 2, "bon_reward": "short"},
    {"deal": "on", "deal_reward": "short", "deal_top_k": 2, "deal_lookahead": 2},
    {"asap": "adaptive"},
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Prometheus and promtool: installed, or unpacked from Debian's package."""
    found = shutil.which("prometheus"), shutil.which("promtool")
    if all(found):
        return found
    folder = tmp_path_factory.mktemp("debian")
    try:
        subprocess.run(["apt-get", "download", "prometheus"], cwd=folder, check=True, capture_output=True, timeout=120)
        package = next(folder.glob("prometheus_*.deb"))
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=folder, check=True, capture_output=True)
    except (OSError, StopIteration, subprocess.SubprocessError) as error:
        pytest.skip(f"Prometheus is neither installed nor to be had from Debian: {error}")
    return str(folder / "usr/bin/prometheus"), str(folder / "usr/bin/promtool")


class Prometheus:
    """A running one, which scrapes every second."""

    def __init__(self, program, folder, target):
        rules = (DEPLOY / "prometheus/rules.yml").read_text()
        (folder / "rules.yml").write_text(rules.replace("for: 1m", "for: 1s"))
        config = (DEPLOY / "prometheus/prometheus.yml").read_text()
        config = config.replace("15s", "1s").replace("localhost:8000", target)
        (folder / "prometheus.yml").write_text(config)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.root = f"http://{address}/api/v1"
        arguments = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen([program, *arguments], cwd=folder, stdout=log, stderr=log)

    def ask(self, route, **parameters):
        url = f"{self.root}/{route}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)["data"]

    def wait(self, what, timeout_s=60):
        until = time.monotonic() + timeout_s
        while True:
            try:
                if what():
                    return
            except OSError:
                pass
            assert time.monotonic() < until
            time.sleep(0.2)

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def prometheus(programs, tmp_path_factory, server):
    """It saw a request of every method."""
    running = Prometheus(programs[0], tmp_path_factory.mktemp("prometheus"), server.root.removeprefix("http://"))
    try:
        for _ in range(2):  # a rate needs a scrape before and one after
            load(server)
            running.wait(lambda: [1 for up in running.ask("query", query="up")["result"] if up["value"][1] == "1"])
            time.sleep(2)
        yield running
    finally:
        running.stop()


def load(server):
    for xargs in METHODS:
        extra = {"structured_outputs": {"regex": "[01]{3}"}} if "asap" in xargs else {}
        samples = {"cards", "bon", "asap"} & xargs.keys()
        server.chat(xargs=xargs, max_tokens=8, temperature=1.0 if samples else 0.0, extra_body=extra)
    with pytest.raises(openai.BadRequestError):
        server.chat(xargs={"wsd": "shared", "wsd_gamma": 2})


def dashboards():
    for file in sorted((DEPLOY / "grafana").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{file.stem}: {panel['title']}", target["expr"].replace("$__rate_interval", "1m")


def test_the_dashboards_are_what_their_tool_would_write():
    tool = Path(__file__).parents[2] / "tools/dashboards.py"
    assert subprocess.run([sys.executable, str(tool), "--check"], capture_output=True).returncode == 0


def test_promtool_accepts_config_and_rules(programs):
    subprocess.run([programs[1], "check", "config", "prometheus.yml"], cwd=DEPLOY / "prometheus", check=True)


def test_every_expression_of_the_dashboards_has_data(prometheus):
    empty = [where for where, expr in dashboards() if not numbers(prometheus, expr)]
    assert not empty


@pytest.mark.slow
def test_the_dashboards_can_be_drawn_without_grafana(prometheus, server, tmp_path):
    for _ in range(6):
        load(server)
    tool = Path(__file__).parents[2] / "tools/draw_dashboards.py"
    options = ["--prometheus", prometheus.root.removesuffix("/api/v1"), "--minutes", "1", "--rate-interval", "10s"]
    subprocess.run([sys.executable, str(tool), *options, "--out", str(tmp_path)], check=True)
    drawn = {file.stem for file in tmp_path.glob("*.png")}
    assert drawn == {f"dashboard_{file.stem}" for file in (DEPLOY / "grafana").glob("*.json")}


def numbers(prometheus, expression):
    """What an expression gives besides 0 / 0."""
    found = [float(one["value"][1]) for one in prometheus.ask("query", query=expression)["result"]]
    return [number for number in found if not math.isnan(number)]


def test_every_rule_is_evaluated_and_has_something_to_evaluate(prometheus):
    (group,) = prometheus.ask("rules")["groups"]
    assert [rule["health"] for rule in group["rules"]] == ["ok"] * len(group["rules"]), group
    assert not [rule["name"] for rule in group["rules"] if rule.get("alerts")]
    for rule in group["rules"]:
        observed = re.sub(r"\s(>|==) [\d.]+$", "", rule["query"])
        assert numbers(prometheus, observed), rule["name"]


def test_an_alert_fires_when_a_judge_is_left_alone(prometheus, server, judge):
    try:
        judge.fault = "http 500"
        for _ in range(6):
            with pytest.raises(openai.APIStatusError):
                server.chat(xargs={**METHODS[6], "cards_reward": "remote"}, max_tokens=4, temperature=1.0)
        alert = 'ALERTS{alertname="AlignSpecJudgeOpen", alertstate="firing", judge="remote"}'
        prometheus.wait(lambda: prometheus.ask("query", query=alert)["result"])
    finally:
        judge.fault = None
        time.sleep(1.1)  # breaker_s
        server.chat(xargs={**METHODS[6], "cards_reward": "remote"}, max_tokens=4, temperature=1.0)
