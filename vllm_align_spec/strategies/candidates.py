"""What methods that let a judge choose among candidates have in common."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from vllm_align_spec.options import OptionError
from vllm_align_spec.strategies.base import EngineFacts, Request

T = TypeVar("T")

_SEEDS = 2**62


async def in_order(launch: Callable[[int], Coroutine[Any, Any, T]], count: int, width: int) -> AsyncGenerator[T, None]:
    """Results of ``launch(0)``, ``launch(1)``, ... in that order, ``width`` of them under way at a time.

    Whoever takes the first result that suits has chosen as if there had been one after the other: a later one is never
    taken because it was faster. Closing the generator cancels what is under way.

    Raises:
        Exception: what the next result in order raised.
    """
    running: deque[asyncio.Task[T]] = deque()
    launched = 0
    try:
        while launched < count or running:
            while launched < count and len(running) < width:
                running.append(asyncio.create_task(launch(launched)))
                launched += 1
            result = await running[0]
            running.popleft()
            yield result
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


class Seeds:
    """Seeds and uniforms, each a function of its name and of one number: the choice's seed, or an unpredictable one."""

    def __init__(self, seed: int | None) -> None:
        self._seed = secrets.randbelow(_SEEDS) if seed is None else seed

    def integer(self, *name: object) -> int:
        """In [0, 2^62), distinct for distinct names."""
        digest = hashlib.blake2b("/".join(map(str, (self._seed, *name))).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % _SEEDS

    def uniform(self, *name: object) -> float:
        """In [0, 1)."""
        return (self.integer(*name, "uniform") >> 9) / 2**53


def judges(method: str, asked: Sequence[str], engine: EngineFacts) -> list[str]:
    """The judges that a request names, or the engine's only one.

    Raises:
        OptionError: there is no such judge, or it is not clear which is meant.
    """
    option = f"{method}_reward"
    if not engine.rewards:
        raise OptionError(
            f"{method} needs a judge: start the engine with --additional-config "
            '\'{"align_spec": {"rewards": {"NAME": {"kind": "model", "model": "..."}}}}\', or drop it',
            method,
        )
    accepted = ", ".join(map(repr, engine.rewards))
    asked = [name for name in asked if name]
    if not asked and len(engine.rewards) > 1:
        raise OptionError(f"{option} is missing, and this engine has several judges; accepted: {accepted}", option)
    for name in asked:
        if name not in engine.rewards:
            raise OptionError(f"{option}={name!r} is no judge of this engine; accepted: {accepted}", option)
    if len(set(asked)) < len(asked):
        raise OptionError(f"{option}={list(asked)!r} names a judge twice; accepted: each of {accepted} once", option)
    return list(asked or engine.rewards)


def weights(method: str, given: Sequence[float], names: Sequence[str]) -> list[float]:
    """One weight a judge.

    Raises:
        OptionError: there are more or fewer than judges.
    """
    if given and len(given) != len(names):
        raise OptionError(
            f"{method}_weights={list(given)!r} is not accepted; accepted: {len(names)} numbers, one for each of "
            f"{', '.join(names)}",
            f"{method}_weights",
        )
    return list(given or [1.0] * len(names))


def refuse_bends(method: str, request: Request, engine: EngineFacts) -> None:
    """Refuses what several inner requests in a row cannot honour.

    Raises:
        OptionError: names what stands in the way and what would be accepted.
    """
    for what, instead in {**request.truncates, **request.bends}.items():
        raise OptionError(f"{what} cannot be combined with {method}; {instead}", what.partition("=")[0])
