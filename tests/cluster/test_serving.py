"""Two replicas behind Ray Serve: the OpenAI API, our options, reports and metrics, as from one server."""

from __future__ import annotations

import os
import socket
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serving import start_server, stop_server

from vllm_align_spec import lab

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "How do I repair a bicycle with 20 euros?"}]
WSD = {"wsd": "shared", "wsd_gamma": 1.0, "wsd_max_draft": 8}
INTERVAL_S = 0.2
"""Between two exchanges of tries."""
COUNT, TIMES = 24, 10
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
            "align_spec": {
                "rewards": {"short": {"kind": "program", "program": "length", "parameters": {"target": 8}}},
                "asap": {"share": {"interval_s": INTERVAL_S}},
            }
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

    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # a busy machine
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


@pytest.fixture(scope="module")
def masses_at_one(tmp_path_factory):
    """ASAp's mass at the root of one server, several times: after all of `COUNT` samples, and after half of them."""
    server = start_server(tmp_path_factory.mktemp("one") / "log")
    try:
        masses = [
            [learnt(server.client, server.root, f"{count} {i}", count) for i in range(TIMES)]
            for count in (COUNT, COUNT // 2)
        ]
    finally:
        stop_server(server)
    return masses


def test_samples_split_over_two_replicas_teach_as_much_as_at_one(masses_at_one, cluster, client):
    one, half = masses_at_one
    split = [learnt(client, cluster[0], f"split {i}", COUNT) for i in range(TIMES)]
    noise = ((statistics.variance(split) + statistics.variance(one)) / TIMES) ** 0.5
    assert abs(statistics.mean(split) - statistics.mean(one)) < 4 * noise, (split, one)
    assert statistics.mean(half) - statistics.mean(one) > 4 * noise, (half, one)


def learnt(client, root, salt, count):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: ask_grammar(client, salt, seed), range(count)))
    exchanged()
    response = ask_grammar(client, salt, count)
    return httpx.get(f"{root}/v1/align_spec/reports/{response.id}").json()["choices"][0]["log_mass_at_root"]


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


def test_replicas_learn_from_each_others_samples(cluster, client):
    def samples(count, salt, at_once=8):
        def one(i):
            response = ask_grammar(client, salt, seed=i)
            return httpx.get(f"{cluster[0]}/v1/align_spec/reports/{response.id}").json()["choices"][0]

        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(one, range(count)))

    known = [report["log_mass_at_root"] for report in samples(48, "first")]
    exchanged()
    nodes = shard_nodes()
    assert nodes > 20
    # Whoever answers, it has what both have seen, and its bound is no higher than the lower of both.
    after = samples(8, "first")
    assert all(report["store"]["nodes"] >= nodes for report in after)
    masses = [report["log_mass_at_root"] for report in after]
    assert max(masses) <= min(known) + 1e-4, (masses, known)  # sums of float32
    alone = samples(1, "second")[0]["log_mass_at_root"]
    assert max(masses) < alone - 0.5, (masses, alone)

    # The shard dies under load: nobody notices, and a new one comes to know what the old one knew.
    exchanged()
    nodes = shard_nodes()
    with ThreadPoolExecutor(1) as pool:
        under_load = pool.submit(samples, 32, "first")
        for one in shards():
            import ray

            ray.kill(one, no_restart=False)
        assert all(report["outcome"] == "completed" for report in under_load.result())
    until = time.monotonic() + 60
    while shard_nodes() < nodes:
        assert time.monotonic() < until, (shard_nodes(), nodes)
        time.sleep(0.5)


def ask_grammar(client, salt, seed):
    return client.chat.completions.create(
        model="base",
        messages=MESSAGES,
        temperature=1.0,
        max_tokens=24,
        seed=seed,
        extra_body={
            "vllm_xargs": {"asap": "adaptive"},
            "cache_salt": salt,
            "structured_outputs": {"regex": "[01]{5}"},
        },
    )


def shards():
    import ray
    from ray.util import list_named_actors

    found = [one for one in list_named_actors(all_namespaces=True) if one["name"].startswith("tries ")]
    assert len(found) == 1, found
    return [ray.get_actor(one["name"], one["namespace"]) for one in found]


def shard_nodes():
    import ray

    try:
        return sum(ray.get(one.size.remote(), timeout=30)[0] for one in shards())
    except ray.exceptions.RayError:  # between two lives
        return 0


def exchanged():
    """Long enough for two rounds: what comes is taken in with the next one."""
    time.sleep(1 + 6 * INTERVAL_S)


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
