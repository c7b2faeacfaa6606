"""Replicas' tries through real actors of Ray, round by round: who is asked when, and what everybody knows then."""

from __future__ import annotations

import asyncio
import time

import pytest

from vllm_align_spec.cluster.tries import NAMESPACE, Sharing
from vllm_align_spec.options import AsapShareOptions
from vllm_align_spec.processors.trie import BYTES_PER_NODE, Tries

pytestmark = pytest.mark.slow

IDENTITY = {"model": "base"}
KEYS = (b"\x00", b"\x01")  # one of each shard


@pytest.fixture
def ray():
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


class Replica:
    """A replica's workers, and its side of the exchange."""

    def __init__(self):
        self.tries, self.calls, self.busy = Tries(1000 * BYTES_PER_NODE, shared=True), 0, False
        self.sharing = Sharing(AsapShareOptions(shards=len(KEYS)), IDENTITY, self._call, lambda: self.busy)

    async def _call(self, what, since, news):
        assert what == "tries"
        self.calls += 1
        for piece in news:
            self.tries.merge(piece, IDENTITY, foreign=True)
        found = [self.tries.news(start, IDENTITY, len(since))[shard] for shard, start in enumerate(since)]
        return [(found, self.tries.next_epoch())]

    def learn(self, key, tokens):
        trie, rows = self.tries.open(key), len(tokens) + 1
        node = [int(self.tries.root([trie])[0]), *[-1] * len(tokens)]
        half = [-0.7] * rows
        self.tries.record([trie] * rows, node, range(-1, rows - 1), [-1] * rows, [-1, *tokens], half, half)

    def known(self):
        return [self.tries.nodes(self.tries.open(key)) for key in KEYS]

    def exchange(self, busy=False):
        """Calls of the workers in one round, and failures."""
        before, self.busy = self.calls, busy
        failed = asyncio.run(self.sharing.exchange())
        return self.calls - before, len(failed)


def exchange_until(check, *replicas):
    """Rounds of replicas that have nothing to do, until something is so."""
    until = time.monotonic() + 60
    while not check():
        assert time.monotonic() < until
        for one in replicas:
            one.exchange()
        time.sleep(0.1)


def test_workers_are_asked_where_they_may_know_more_or_others_do(ray):
    a, b = Replica(), Replica()
    a.learn(KEYS[0], [1, 2])
    b.learn(KEYS[1], [3])
    assert a.exchange() == (1, 0)  # a replica that begins tells what it has from a file, and hears
    assert b.exchange() == (1, 0)
    assert b.exchange() == (1, 0)  # what came is taken in
    assert b.known() == [3, 2]
    assert a.known() == [3, 0]
    assert [a.exchange()[0] for _ in range(4)] == [0, 1, 0, 0]  # asks the shards, takes in, and then leaves all alone
    assert a.known() == [3, 2]
    assert [b.exchange()[0] for _ in range(3)] == [0, 0, 0]
    a.learn(KEYS[0], [1, 4])
    assert a.exchange(busy=True) == (1, 0)
    assert [b.exchange()[0] for _ in range(3)] == [0, 1, 0]
    assert a.known() == b.known() == [4, 2]


def test_idle_replicas_fill_a_shard_that_began_anew(ray):
    a, b = Replica(), Replica()
    a.learn(KEYS[0], [1, 2])
    b.learn(KEYS[1], [3])
    for _ in range(3):
        a.exchange(), b.exchange()
    assert a.known() == b.known() == [3, 2]
    names = a.sharing._names
    for name in names:
        ray.kill(ray.get_actor(name, NAMESPACE), no_restart=False)

    def sizes():
        try:
            return [ray.get(ray.get_actor(name, NAMESPACE).size.remote(), timeout=5)[0] for name in names]
        except (ray.exceptions.RayError, ValueError):  # not there yet
            return []

    exchange_until(lambda: sizes() == [3, 2], a, b)
    exchange_until(lambda: (a.exchange(), b.exchange()) == ((0, 0), (0, 0)))


def test_what_a_shard_did_not_take_is_told_again(ray):
    a, b = Replica(), Replica()
    for _ in range(2):
        a.exchange(), b.exchange()
    for name in a.sharing._names:
        ray.kill(ray.get_actor(name, NAMESPACE), no_restart=True)
    time.sleep(1)  # both are gone
    assert b.exchange() == (0, len(KEYS))
    assert b.exchange()[0] == 0  # what failed is no reason to ask workers that had nothing to tell
    a.learn(KEYS[1], [5, 6])
    assert a.exchange(busy=True) == (1, len(KEYS))
    assert a.exchange()[0] == 1  # it is not busy any more, and asks its workers all the same
    exchange_until(lambda: b.known() == [0, 3], a, b)
    exchange_until(lambda: (a.exchange(), b.exchange()) == ((0, 0), (0, 0)))
