"""Replicas that come and go with the load, and one that is two ranks in a placement group."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from test_serving import CONFIG, WSD, ask, ask_grammar, free_port

from vllm_align_spec import lab

pytestmark = pytest.mark.slow

SCALED = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2}
FSPAD = {"method": "eagle", "model": str(lab.drafter_path("fspad")), "num_speculative_tokens": 3}
DELAYS = {"upscale_delay_s": 1, "downscale_delay_s": 90, "metrics_interval_s": 1, "look_back_period_s": 2}


@pytest.fixture(scope="module")
def root():
    """Address of two applications: one that scales, and a wide one."""
    import ray
    from ray import serve

    from vllm_align_spec.cluster.serving import build

    port = free_port()
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    actor = {"num_cpus": 1}
    scaled = {"deployment_config": {"autoscaling_config": {**SCALED, **DELAYS}, "ray_actor_options": actor}}
    wide = {
        "placement_group_config": {"bundles": [{"CPU": 1}, {"CPU": 1}]},
        "deployment_config": {"num_replicas": 1, "ray_actor_options": actor},
        # The pilot's heads cannot be divided by two.
        "engine_kwargs": {**CONFIG["engine_kwargs"], "tensor_parallel_size": 2, "speculative_config": FSPAD},
    }
    serve.run(build({"llm_config": {**CONFIG, **wide}}), name="wide", route_prefix="/wide")
    serve.run(build({"llm_config": {**CONFIG, **scaled}}), name="scaled", route_prefix="/scaled")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def client_of(root, name):
    return openai.OpenAI(base_url=f"{root}/{name}/v1", api_key="none", max_retries=0)


def test_a_replica_of_two_ranks_serves_what_one_rank_serves(root):
    wide, scaled = client_of(root, "wide"), client_of(root, "scaled")
    assert ask(wide).choices[0].message.content == ask(scaled).choices[0].message.content
    response = ask_grammar(wide, "salt", seed=1)
    report = httpx.get(f"{root}/wide/v1/align_spec/reports/{response.id}").json()["choices"][0]
    assert (report["outcome"], report["store"]["nodes"] > 0) == ("completed", True)
    with pytest.raises(openai.BadRequestError, match="wsd_gamma=2"):
        ask(wide, {**WSD, "wsd_gamma": 2})


def replicas():
    """How many are ready, and how many there are."""
    from ray import serve

    (deployment,) = serve.status().applications["scaled"].deployments.values()
    return deployment.replica_states.get("RUNNING", 0), sum(deployment.replica_states.values())


def wait_for(check, timeout_s):
    until = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < until, replicas()
        time.sleep(1)


def test_replicas_come_with_the_load_and_go_with_it(root):
    client, pause_s, few, done = client_of(root, "scaled"), 0.0, threading.Event(), threading.Event()
    assert replicas() == (1, 1)

    def ask_on(index):
        texts = []
        while not (done.is_set() or (few.is_set() and index)):
            texts.append(ask(client, WSD).choices[0].message.content)
            time.sleep(pause_s)
        return texts

    with ThreadPoolExecutor(8) as pool:
        asking = pool.map(ask_on, range(8))
        try:
            wait_for(lambda: replicas()[1] == 2, 60)
            pause_s = 5.0  # two cores are few for an engine that starts beside one that is busy
            wait_for(lambda: replicas() == (2, 2), 300)
            pause_s = 0.0
            time.sleep(10)
            few.set()
            wait_for(lambda: replicas() == (1, 1), 200)
        finally:
            done.set()
    assert len({text for texts in asking for text in texts}) == 1  # no request was lost, and all were told the same
    assert ask(client).choices[0].message.content
