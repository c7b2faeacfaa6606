"""`vllm-align-spec cluster serve`: a server and its judges from one file, and what happens when a judge dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import openai
import psutil
import pytest
import yaml

from vllm_align_spec import lab

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "How do I repair a bicycle with 20 euros?"}]
CARDS = {"cards": "on", "cards_reward": "judge", "cards_threshold": 1.0, "cards_entropy": 1.0}


def configuration(port):
    engine = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 16, "block_size": 32, "enforce_eager": True}
    judge = {"kind": "http", "url": f"http://127.0.0.1:{port}/judge", "retries": 8, "timeout_s": 60}
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    llm = {
        "model_loading_config": {"model_id": "base", "model_source": str(lab.model_path("base"))},
        "accelerator_config": {"kind": "cpu"},
        "placement_group_config": {"bundles": [{"CPU": 1}]},
        "deployment_config": {"num_replicas": 1, "ray_actor_options": {"num_cpus": 1}},
        "engine_kwargs": {**engine, "additional_config": {"align_spec": {"rewards": {"judge": judge}}}},
        "runtime_env": {"env_vars": environment},
    }
    model = {"kind": "model", "model": str(lab.model_path("judge")), "timeout_s": 60}
    deployment = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1}}
    return {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "judge",
                "route_prefix": "/judge",
                "import_path": "vllm_align_spec.cluster.judge:build",
                "args": {"judge": model, "deployment": deployment},
            },
            {
                "name": "llm",
                "route_prefix": "/",
                "import_path": "vllm_align_spec.cluster.serving:build",
                "args": {"llm_config": llm},
            },
        ],
    }


def command(file, *more):
    return [sys.executable, "-m", "vllm_align_spec.cli", "cluster", "serve", str(file), *more]


def judges():
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with suppress(psutil.Error):
            if "ServeReplica:judge:judge" in " ".join(process.info["cmdline"] or ()):
                found.append(process)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "serve.yaml").write_text(yaml.safe_dump(configuration(port)))
    root = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command(folder / "serve.yaml", "--num-cpus", "8"), stdout=log, stderr=log, start_new_session=True
        )
    until = time.monotonic() + 600
    while True:
        assert process.poll() is None, (folder / "log").read_text()[-4000:]
        assert time.monotonic() < until, (folder / "log").read_text()[-4000:]
        with suppress(httpx.HTTPError):
            if httpx.get(f"{root}/health").status_code == 200 and len(judges()) == 2:
                break
        time.sleep(1)
    yield root
    process.send_signal(signal.SIGINT)
    try:
        process.wait(180)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert not judges(), "what was started has ended"


def test_a_judge_that_dies_under_load_costs_no_response(root):
    client = openai.OpenAI(base_url=f"{root}/v1", api_key="none", max_retries=0, timeout=300)

    def ask(seed):
        return client.chat.completions.create(
            model="base",
            messages=MESSAGES,
            temperature=1.0,
            max_tokens=24,
            seed=seed,
            extra_body={"vllm_xargs": CARDS},
        )

    ask(0)
    with ThreadPoolExecutor(8) as pool:
        responses = [pool.submit(ask, seed) for seed in range(16)]
        time.sleep(2)
        judges()[0].kill()
        done = [response.result() for response in responses]
    assert all(response.usage.completion_tokens for response in done)
    for response in done:
        (choice,) = httpx.get(f"{root}/v1/align_spec/reports/{response.id}").json()["choices"]
        assert (choice["method"], choice["outcome"]) == ("cards", "completed")
        assert "error" not in choice
        assert choice["judge_calls"] > 0


def test_check_names_what_is_wrong(tmp_path):
    file = tmp_path / "serve.yaml"
    config = configuration(8000)
    file.write_text(yaml.safe_dump(config))
    done = subprocess.run(command(file, "--check"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "judge, llm: accepted" in done.stdout
    config["applications"][0]["args"]["judge"]["modle"] = "x"
    file.write_text(yaml.safe_dump(config))
    done = subprocess.run(command(file, "--check"), capture_output=True, text=True)
    assert done.returncode == 1
    assert "judge.modle" in done.stderr
