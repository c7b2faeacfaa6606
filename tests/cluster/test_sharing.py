"""Servers that are not Ray Serve's share ASAp's tries through a Ray client, two engines of one of them included."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
from serving import start_server, stop_server

pytestmark = pytest.mark.slow

INTERVAL_S = 0.5
ROUNDS_S = 20 * INTERVAL_S
"""Enough for what one server learnt to reach all others."""
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}


class Head:
    """A Ray cluster of one node, which others reach by its client port."""

    def __init__(self):
        self.ports = [free_port(), free_port()]
        self.start()

    def start(self):
        port, client_port = self.ports
        ray("start", "--head", f"--port={port}", f"--ray-client-server-port={client_port}", "--num-cpus=2")

    def stop(self):
        ray("stop", "--force")

    @property
    def address(self):
        return f"ray://127.0.0.1:{self.ports[1]}"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ray(*arguments):
    command = [str(Path(sys.executable).with_name("ray")), *arguments]
    if arguments[0] == "start":
        command += ["--include-dashboard=false", "--disable-usage-stats"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **TOKEN}, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def head():
    one = Head()
    yield one
    one.stop()


@pytest.fixture(scope="module")
def servers(head, tmp_path_factory):
    """One with two data-parallel engines, and one with one."""
    share = {"address": head.address, "interval_s": INTERVAL_S}
    options = ["--additional-config", json.dumps({"align_spec": {"asap": {"share": share}}})]
    folder = tmp_path_factory.mktemp("sharing")
    running = []
    try:
        for name, more in (("two", ["--data-parallel-size", "2"]), ("one", [])):
            running.append(
                start_server(folder / name, *options, *more, env={**TOKEN, "VLLM_CPU_OMP_THREADS_BIND": "nobind"})
            )
        yield running
    finally:
        for server in running:
            stop_server(server)


def ask(server, salt, number):
    """How many nodes the engines learnt from requests in a language of one word, and whether all were answered."""

    def one(seed):
        response = server.chat(
            xargs={"asap": "adaptive"},
            temperature=1.0,
            seed=seed,
            extra_body={"cache_salt": salt, "structured_outputs": {"choice": ["a"]}},
        )
        return server.report(response.id)["choices"][0]

    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(one, range(number)))
    assert all(report["outcome"] == "completed" for report in reports)
    return sum(report["nodes_added"] for report in reports)


def wait_for(check, timeout_s=90):
    until = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < until
        time.sleep(INTERVAL_S)


def test_what_one_engine_saw_all_others_know(servers):
    two, one = servers
    assert ask(one, "a", 1) > 0
    assert ask(one, "a", 4) == 0  # one sample says all of this language
    wait_for(lambda: two.metric("align_spec:asap_shared_bytes_total", direction="received") > 0)
    assert ask(two, "b", 1) > 0  # whichever of its engines answered
    time.sleep(ROUNDS_S)
    assert ask(two, "a", 8) == 0
    assert ask(one, "b", 1) == 0
    assert ask(two, "b", 8) == 0


def test_servers_go_on_without_the_cluster_and_come_back_to_a_new_one(servers, head):
    two, one = servers
    head.stop()
    assert ask(two, "c", 8) > 0
    assert ask(one, "d", 1) > 0
    wait_for(lambda: one.metric("align_spec:asap_share_failures_total") > 0)
    time.sleep(ROUNDS_S)
    assert ask(one, "c", 1) > 0
    head.start()

    salts = map(str, count())

    def shares():
        salt = next(salts)
        ask(one, salt, 1)
        time.sleep(ROUNDS_S)
        return ask(two, salt, 8) == 0

    wait_for(shares, timeout_s=180)
    assert ask(two, "d", 8) == 0  # what was learnt alone came too
    failures = one.metric("align_spec:asap_share_failures_total")
    time.sleep(4 * INTERVAL_S)
    assert one.metric("align_spec:asap_share_failures_total") == failures
