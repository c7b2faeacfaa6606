"""A judge on Ray Serve says what the model in this process says, and goes on when a replica is killed."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest

from vllm_align_spec import lab
from vllm_align_spec.options import HttpRewardOptions, ModelRewardOptions
from vllm_align_spec.rewards.base import Answer, JudgeError
from vllm_align_spec.rewards.http import HttpScorer
from vllm_align_spec.rewards.model import ModelScorer

pytestmark = pytest.mark.slow

JUDGE = {"kind": "model", "model": str(lab.model_path("judge")), "timeout_s": 60}
MESSAGES = [{"role": "user", "content": "How do I repair a bicycle with 20 euros?"}]


@pytest.fixture(scope="module")
def url():
    """Address of a judge with two replicas."""
    import ray
    from ray import serve

    from vllm_align_spec.cluster.judge import build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1}}
    serve.run(build({"judge": JUDGE, "deployment": options}), route_prefix="/judge", name="judge")
    yield f"http://127.0.0.1:{port}/judge"
    serve.shutdown()
    ray.shutdown()


def answers(count):
    texts = ["Look at the chain first", "No.", "", "Buy a new one, that is cheaper than you think and"]
    return [
        Answer([], "", MESSAGES, [], f"{texts[i % 4]} {i}" if texts[i % 4] else "", i % 3 == 0 and bool(texts[i % 4]))
        for i in range(count)
    ]


def scorer(url, **options):
    return HttpScorer(HttpRewardOptions(kind="http", url=url, **options))


@pytest.mark.parametrize("kind", ["messages", "text", "token_ids"])
def test_it_says_what_the_model_says(url, kind):
    if kind == "messages":
        asked = answers(8)
    elif kind == "text":
        asked = [Answer([], f"A desk of oak {i}", None, [], " costs", True) for i in range(8)]
    else:
        asked = [Answer([1, 50 + i, 60], "", None, [70, 80], "", True) for i in range(8)]

    async def both():
        local = ModelScorer("local", ModelRewardOptions(**JUDGE, input=kind))
        return await scorer(url, input=kind).score(asked), await local.score(asked)

    if kind != "messages":
        # What a judge reads is its own option; conversations are sent as such.
        url = url.replace("/judge", f"/{kind}")
        run_judge(kind)
    remote, local = asyncio.run(both())
    assert remote == pytest.approx(local, abs=1e-4)
    assert len({round(reward, 4) for reward in remote}) > 4


def run_judge(kind):
    from ray import serve

    from vllm_align_spec.cluster.judge import build

    options = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1}}
    serve.run(build({"judge": {**JUDGE, "input": kind}, "deployment": options}), route_prefix=f"/{kind}", name=kind)


def test_what_it_cannot_read_is_refused(url):
    too_long = [Answer([], "", MESSAGES, [], "word " * 5000, True)]
    with pytest.raises(JudgeError, match="reads at most") as caught:
        asyncio.run(scorer(url).score(too_long))
    assert caught.value.reason == "refused"
    for body in ({}, {"messages": []}, {"messages": MESSAGES}, {"input": "text", "messages": MESSAGES}):
        assert httpx.post(f"{url}/classify", json=body).status_code == 422


def test_killing_a_replica_under_load_loses_nothing(url):
    import ray
    from ray.util import list_named_actors

    def replicas():
        names = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
        return [name for name in names if name.startswith("SERVE_REPLICA::judge#judge#")]

    before = replicas()
    assert len(before) == 2
    asked = answers(4)

    async def load():
        remote = scorer(url, retries=8, backoff_s=0.2, timeout_s=60)
        expected = await remote.score(asked)

        killed = asyncio.Event()

        async def client():
            found = []
            while not killed.is_set():
                found.append(await remote.score(asked))
            return [*found, *[await remote.score(asked) for _ in range(5)]]

        clients = [asyncio.create_task(client()) for _ in range(8)]
        await asyncio.sleep(0.5)
        ray.kill(ray.get_actor(before[0], namespace="serve"), no_restart=True)
        killed.set()
        return expected, await asyncio.gather(*clients)

    expected, found = asyncio.run(load())
    assert all(rewards == pytest.approx(expected, abs=1e-4) for client in found for rewards in client)
    assert before[0] not in replicas()


def test_arguments_that_it_does_not_know_are_named():
    from pydantic import ValidationError

    from vllm_align_spec.cluster.judge import build

    with pytest.raises(ValidationError, match=r"judge\.devise"):
        build({"judge": {**JUDGE, "devise": "cpu"}})


def test_replicas_come_with_the_load_and_go_with_it(url):
    from ray import serve

    from vllm_align_spec.cluster.judge import build

    scaling = {
        "min_replicas": 1,
        "max_replicas": 3,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 1,
        "downscale_delay_s": 2,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2,
    }
    options = {"autoscaling_config": scaling, "ray_actor_options": {"num_cpus": 0.1}}
    serve.run(build({"judge": JUDGE, "deployment": options}), route_prefix="/scaled", name="scaled")

    def running():
        return serve.status().applications["scaled"].deployments["judge"].replica_states.get("RUNNING", 0)

    async def until(suits):
        for _ in range(240):
            if suits(running()):
                return
            await asyncio.sleep(0.5)
        pytest.fail(f"{running()} replicas")

    async def load():
        remote = scorer(url.replace("/judge", "/scaled"), retries=8, timeout_s=120, max_concurrency=64)
        asked = answers(4)
        enough = asyncio.Event()

        async def client():
            while not enough.is_set():
                assert len(await remote.score(asked)) == 4

        clients = [asyncio.create_task(client()) for _ in range(16)]
        await until(lambda replicas: replicas >= 2)
        enough.set()
        await asyncio.gather(*clients)
        await until(lambda replicas: replicas == 1)

    assert running() == 1
    asyncio.run(load())
