"""Two replicas behind Ray Serve: the OpenAI API, our options, reports and metrics, as from one server."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from vllm_align_spec import lab

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "How do I repair a bicycle with 20 euros?"}]
WSD = {"wsd": "shared", "wsd_gamma": 1.0, "wsd_max_draft": 8}
CONFIG = {
    "model_loading_config": {"model_id": "base", "model_source": str(lab.model_path("base"))},
    "accelerator_config": {"kind": "cpu"},
    "placement_group_config": {"bundles": [{"CPU": 1}]},
    "deployment_config": {"num_replicas": 2, "ray_actor_options": {"num_cpus": 1}},
    "engine_kwargs": {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 8,
        "block_size": 32,
        "enforce_eager": True,
        "speculative_config": {
            "method": "draft_model",
            "model": str(lab.model_path("pilot")),
            "num_speculative_tokens": 5,
        },
        "additional_config": {
            "align_spec": {"rewards": {"short": {"kind": "program", "program": "length", "parameters": {"target": 8}}}}
        },
    },
    "runtime_env": {
        "env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    },
}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def cluster():
    """Address of the API, and of Ray's metrics."""
    import ray
    from ray import serve

    from vllm_align_spec.cluster.serving import build

    port, metrics_port = free_port(), free_port()
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, _metrics_export_port=metrics_port)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build({"llm_config": CONFIG}), name="llm", route_prefix="/")
    yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def client(cluster):
    return openai.OpenAI(base_url=f"{cluster[0]}/v1", api_key="none", max_retries=0)


def ask(client, xargs=None, **kwargs):
    extra = {"extra_body": {"vllm_xargs": xargs}} if xargs else {}
    return client.chat.completions.create(
        model="base", messages=MESSAGES, temperature=0.0, max_tokens=24, **extra, **kwargs
    )


def test_every_replica_knows_of_every_report(cluster, client):
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda _: ask(client, WSD), range(8)))
    assert len({response.choices[0].message.content for response in responses}) == 1
    for response in responses:
        for _ in range(4):  # whichever replica answers
            (choice,) = httpx.get(f"{cluster[0]}/v1/align_spec/reports/{response.id}").json()["choices"]
            assert choice["draft_tokens_kept"] == 8
    assert httpx.get(f"{cluster[0]}/v1/align_spec/reports/nobody").status_code == 404


def test_streams_and_errors_are_those_of_a_single_server(client):
    whole = ask(client, WSD).choices[0].message.content
    chunks = ask(client, WSD, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    with pytest.raises(openai.BadRequestError, match="wsd_gamma=2"):
        ask(client, {**WSD, "wsd_gamma": 2}, stream=True)


def test_a_strategy_with_many_inner_requests(cluster, client):
    response = client.chat.completions.create(
        model="base",
        messages=MESSAGES,
        temperature=1.0,
        max_tokens=16,
        extra_body={"vllm_xargs": {"bon": 3}},
    )
    report = httpx.get(f"{cluster[0]}/v1/align_spec/reports/{response.id}").json()
    assert report["choices"][0]["judge_calls"] == 3


def test_metrics_of_all_replicas_are_rays(cluster, client):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ask(client, WSD), range(16)))
    until = time.monotonic() + 60
    while True:
        text = httpx.get(cluster[1]).text
        found = [line for line in text.splitlines() if "align_spec_requests" in line and 'method="wsd"' in line]
        replicas = {line.partition('ReplicaId="')[2].partition('"')[0] for line in found}
        if len(replicas) == 2:
            return
        assert time.monotonic() < until, text[:3000]
        time.sleep(2)


def test_mistakes_are_named_before_anything_starts():
    from pydantic import ValidationError

    from vllm_align_spec.cluster.serving import build
    from vllm_align_spec.options import OptionError

    with pytest.raises(ValidationError, match="llm"):
        build({"llm": CONFIG})
    wrong = {**CONFIG, "engine_kwargs": {"additional_config": {"align_spec": {"wds": {}}}}}
    with pytest.raises(OptionError, match="wds"):
        build({"llm_config": wrong})


def test_what_the_operator_set_for_the_replicas_stays():
    from vllm_align_spec.cluster.serving import build

    config = {**CONFIG, "runtime_env": {"env_vars": {"VLLM_PLUGINS": "other", "X": "1"}}}
    application = build({"llm_config": config})
    kwargs = application._bound_deployment.init_kwargs
    variables = kwargs["llm_config"].runtime_env["env_vars"]
    assert (variables["VLLM_PLUGINS"], variables["X"]) == ("other,align_spec", "1")
    assert "VLLM_PLUGINS" not in os.environ
