"""One real server for all tests here: the lab's base model, its pilot as draft model, and a hand-over pilot."""

from __future__ import annotations

import json

import foreign_judge
import pytest
from serving import MODELS, SPECULATION, JudgeEndpoint, PilotEndpoint, start_server, stop_server


@pytest.fixture(scope="session")
def server(tmp_path_factory, pilot, foreign, judge):
    """The server; it must be alive when the tests are done."""
    options = {
        "align_spec": {
            "wsd": {"pilot": {"url": pilot.url, "model": "pilot", "timeout_s": 5, "chunk_tokens": 8}},
            "companions": {
                "judge": {"model": str(MODELS / "judge"), "role": "reward", "max_len": 512},
                "judge-other": {"model": str(MODELS / "judge-other"), "role": "reward"},
                "aligned": {"model": str(MODELS / "pilot"), "role": "lm"},
                "foreign": {"model": str(foreign[0]), "role": "reward", "max_candidates": 5},
            },
            "rewards": {
                "good": {"kind": "model", "model": str(MODELS / "judge"), "timeout_s": 60},
                "remote": {
                    "kind": "http",
                    "url": judge.url,
                    "timeout_s": 8,
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
def foreign(tmp_path_factory):
    """Folder, model and tokenizer of a reward model that cuts text otherwise than the base model."""
    folder = tmp_path_factory.mktemp("foreign")
    return folder, *foreign_judge.save(folder)


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
