"""One real server for all tests here: the lab's base model, its pilot as draft model, and a hand-over pilot."""

from __future__ import annotations

import json

import pytest
from serving import MODELS, SPECULATION, JudgeEndpoint, PilotEndpoint, start_server, stop_server


@pytest.fixture(scope="session")
def server(tmp_path_factory, pilot, judge):
    """The server; it must be alive when the tests are done."""
    options = {
        "align_spec": {
            "wsd": {"pilot": {"url": pilot.url, "model": "pilot", "timeout_s": 5, "chunk_tokens": 8}},
            "rewards": {
                "good": {"kind": "model", "model": str(MODELS / "judge"), "timeout_s": 60},
                "remote": {
                    "kind": "http",
                    "url": judge.url,
                    "timeout_s": 3,
                    "retries": 1,
                    "breaker_s": 1,
                    "max_concurrency": 256,
                },
                "short": {"kind": "program", "program": "length", "parameters": {"target": 3}},
            },
        }
    }
    arguments = ["--speculative-config", SPECULATION, "--additional-config", json.dumps(options)]
    server = start_server(tmp_path_factory.mktemp("server") / "log", *arguments)
    yield server
    alive = server.process.poll() is None and server.get("/health")[0] == 200
    stop_server(server)
    assert alive, server.log.read_text()[-3000:]


@pytest.fixture(scope="session")
def pilot():
    endpoint = PilotEndpoint()
    yield endpoint
    endpoint.close()


@pytest.fixture(scope="session")
def judge():
    endpoint = JudgeEndpoint()
    yield endpoint
    endpoint.close()
