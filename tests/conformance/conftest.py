"""Fixtures of the conformance suite."""

import json

import pytest
from engines import Engine


@pytest.fixture(scope="session")
def engines():
    """Starts an engine on first use of a configuration; the latest three stay, memory is scarce."""
    running = {}

    def get(runner, env=None, **config):
        key = json.dumps([runner, env, config], sort_keys=True)
        if key not in running:
            for old in list(running)[:-2]:
                running.pop(old).close()
            running[key] = Engine(runner, env, **config)
        running[key] = running.pop(key)  # the latest used stands last
        return running[key]

    yield get
    for engine in running.values():
        engine.close()
