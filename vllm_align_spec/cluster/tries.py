"""Tries of ASAp that replicas of one model have in common: an actor of Ray for each shard of the keys.

The tries of many replicas make one: the union of their nodes, from which all else follows (`Tries.merge`), in whatever
order and however often they are merged. So nobody waits for anybody: now and then a replica sends a shard what it
learnt since it last did, and takes home what the others sent meanwhile. A shard that dies is made anew, empty, and
filled by its replicas; until then they go on alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import ray

from vllm_align_spec.metrics import metrics
from vllm_align_spec.options import AsapShareOptions
from vllm_align_spec.processors.trie import Tries, warm_up

logger = logging.getLogger("vllm.align_spec")

NAMESPACE = "align_spec"
TIMEOUT_S = 30.0
"""Of one exchange; a shard that needs longer counts as gone."""


class Shard:
    """The tries of one part of the keys, for all replicas.

    Args:
        identity: what logits depend on; news of other models are refused.
        max_bytes: of its tries.
    """

    def __init__(self, identity: Mapping[str, str], max_bytes: int) -> None:
        warm_up()
        self._identity = dict(identity)
        self._tries = Tries(max_bytes, shared=True)
        self._life = secrets.token_hex(8)

    def exchange(self, news: bytes, life: str, since: int) -> tuple[bytes, str, int]:
        """What others learnt since a replica last asked; then takes in what it learnt itself.

        Args:
            news: of `Tries.news`; may be empty.
            life: what the last exchange returned; a shard that began anew has another one.
            since: likewise.

        Returns:
            News for the replica, and ``life`` and ``since`` for the next exchange.

        Raises:
            TrieFileError: the replica's news are not of this model, or damaged.
        """
        (found,) = self._tries.news(since if life == self._life else 0, self._identity)
        if news:
            self._tries.merge(news, self._identity, foreign=False)
        return found, self._life, self._tries.next_epoch()

    def size(self) -> tuple[int, int]:
        """Nodes, and bytes of them."""
        return self._tries.nodes_used, self._tries.bytes_used


@dataclass
class _Place:
    """Where a replica stands with one shard."""

    actor: Any = None
    life: str = ""
    theirs: int = 0  # the shard's epoch
    ours: int = 0  # the workers'
    received: list[bytes] = field(default_factory=list)  # news of a call that failed further on


class Sharing:
    """One replica's side.

    Args:
        options: engine options.
        identity: what logits depend on: replicas that agree in it share.
        call: calls the workers with ``tries`` and the arguments of `AsapProcessor.exchange`; one answer for each
            data-parallel engine. Nobody else makes this call, so the epochs of all of them agree.
        busy: whether requests may have taught the workers something since this was last asked.
    """

    def __init__(
        self,
        options: AsapShareOptions,
        identity: Mapping[str, str],
        call: Callable[..., Awaitable[list[Any]]],
        busy: Callable[[], bool],
    ) -> None:
        self._options, self._identity, self._call, self._busy = options, dict(identity), call, busy
        digest = hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()[:16]
        self._names = [f"tries {digest} {shard}/{options.shards}" for shard in range(options.shards)]
        self._places = [_Place() for _ in range(options.shards)]
        self._news: list[bytes] = []  # for the workers, at the next call
        self._behind = True  # a shard may lack what the workers know
        self._alone = False
        self._connecting = threading.Lock()

    async def run(self) -> None:
        """Exchanges until it is cancelled."""
        while True:
            try:
                failed = await self.exchange()
            except Exception as error:  # the workers; whatever it is, requests hear of it from vLLM
                failed = [error]
            if failed and not self._alone:
                logger.warning("ASAp goes on without the tries of other replicas: %r", failed[0])
            elif self._alone and not failed:
                logger.info("ASAp shares its tries again")
            self._alone = bool(failed)
            metrics().asap_share_failures.inc(len(failed))
            await asyncio.sleep(self._options.interval_s)

    async def exchange(self) -> list[Exception]:
        """One round with all shards; the failures of those that did not answer.

        Raises:
            Exception: the workers failed.
        """
        # What came last time is given to the workers in the call that asks them, since each call delays a step.
        # An idle engine is left alone: the call wakes its workers, which then spin for a while.
        news, self._news = self._news, []  # also where the workers refuse them: not again and again
        engines, now = [], None
        if self._busy() or news or self._behind:
            self._behind = True
            engines = await self._call("tries", [place.ours for place in self._places], news)
            if not engines:
                return []
            now = int(engines[0][1])
        found = await asyncio.gather(
            *(
                asyncio.to_thread(self._with, shard, [engine[0][shard] for engine in engines], now)
                for shard in range(self._options.shards)
            ),
            return_exceptions=True,
        )
        failed = []
        for one in found:
            if isinstance(one, Exception):
                failed.append(one)
            else:
                self._news += cast("list[bytes]", one)
        if self._options.address and any(not isinstance(one, ray.exceptions.RayActorError) for one in failed):
            # A Ray client that lost its cluster fails for ever, and still calls itself connected.
            async with asyncio.timeout(TIMEOUT_S):
                await asyncio.to_thread(self._disconnect)
        self._behind = (bool(failed) and now is not None) or not all(place.ours for place in self._places)
        metrics().asap_shared_bytes.labels("received").inc(sum(map(len, self._news)))
        if len(engines) > 1:
            self._news += [piece for engine in engines for piece in engine[0] if piece]
        return failed

    def _with(self, shard: int, news: list[bytes], now: int | None) -> list[bytes]:
        """One exchange with one shard for each engine of this replica, or a single one if none has news.

        ``now`` is the workers' epoch, or None if they were not asked.
        """
        place = self._places[shard]
        try:
            if place.actor is None:
                place.actor = self._actor(shard)
            everything, same = place.ours == 0, True
            for piece in [one for one in news if one] or [b""]:
                reply = place.actor.exchange.remote(piece, place.life, place.theirs)
                found, life, place.theirs = ray.get(reply, timeout=TIMEOUT_S)
                place.received += [found] if found else []
                metrics().asap_shared_bytes.labels("sent").inc(len(piece))
                same &= life == place.life
                place.life = life
            # A shard that began anew has heard only what is new here; next time it hears the rest.
            if not (everything or same):
                place.ours = 0
            elif now is not None:
                place.ours = now
        except Exception:
            place.actor = None
            raise
        received, place.received = place.received, []
        return received

    def _disconnect(self) -> None:
        for place in self._places:
            place.actor = None
        ray.shutdown()

    def _actor(self, shard: int) -> Any:
        with self._connecting:
            if not ray.is_initialized():
                ray.init(self._options.address or "auto", log_to_driver=False)
        options = {"name": self._names[shard], "namespace": NAMESPACE, "get_if_exists": True}
        actor = ray.remote(num_cpus=0, max_restarts=-1)(Shard)
        return actor.options(**options).remote(self._identity, self._options.max_bytes)
