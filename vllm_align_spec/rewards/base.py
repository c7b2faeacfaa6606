"""The protocol of judges, and the guard that stands before each: deadline, checks, circuit breaker, metrics."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from vllm_align_spec.metrics import metrics
from vllm_align_spec.options import RewardOptions

logger = logging.getLogger(__name__)

Reason = Literal["timeout", "failed", "nonsense", "refused", "busy"]
"""Why there is no reward: too slow; down or wrong; no number for each answer; an answer it cannot read (too long); or
it is not asked now, because too many wait or the breaker is open."""


class JudgeError(Exception):
    """A judge gave no reward.

    Args:
        message: what happened, for the client.
        reason: its kind; only the first three count against the judge.
        again: whether another try might succeed.
    """

    def __init__(self, message: str, reason: Reason = "failed", *, again: bool = False) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.again = again


@dataclass(frozen=True)
class Answer:
    """A prompt and a response to it, whole or unfinished."""

    prompt_token_ids: Sequence[int]
    prompt_text: str
    messages: Sequence[Mapping[str, Any]] | None
    """The conversation that the prompt was rendered from; None if there was none."""
    response_token_ids: Sequence[int]
    response_text: str
    finished: bool
    """Whether the response has ended by itself; otherwise more may follow."""


class Scorer(Protocol):
    """What gives rewards, of whichever kind."""

    async def score(self, answers: Sequence[Answer]) -> Sequence[float]:
        """One reward an answer, higher is better. Its deadline is the caller's: it is cancelled then.

        Raises:
            JudgeError: there are none.
        """
        ...

    async def ready(self) -> None:
        """Waits until it can be asked.

        Raises:
            JudgeError: it never will.
        """
        ...


class Guard:
    """A judge as strategies see it: it answers within its deadline, with as many finite numbers as there are answers,
    or says why not.

    After ``breaker_failures`` failures in a row nobody asks it for ``breaker_s`` seconds; then one scoring may try.
    """

    def __init__(self, name: str, options: RewardOptions, scorer: Scorer) -> None:
        self.name = name
        self._options = options
        self._scorer = scorer
        self._failures = 0
        self._open_until: float | None = None
        self._probing = False

    async def ready(self) -> None:
        """See `Scorer.ready`."""
        metrics().know_judge(self.name)
        await self._scorer.ready()

    async def score(self, answers: Sequence[Answer]) -> list[float]:
        """Rewards of answers, in order.

        Raises:
            JudgeError: there are none.
        """
        if not answers:
            return []
        began = time.monotonic()
        try:
            probe = self._admit()
        except JudgeError as error:
            metrics().judge_failures.labels(self.name, error.reason).inc()
            raise
        try:
            rewards = await self._ask(answers)
        except JudgeError as error:
            metrics().judge_failures.labels(self.name, error.reason).inc()
            if error.reason in ("timeout", "failed", "nonsense"):
                self._failed(error)
            raise JudgeError(f"judge {self.name!r} {error}", error.reason) from error
        finally:
            if probe:
                self._probing = False
        self._failures, self._open_until = 0, None
        metrics().judge_open.labels(self.name).set(0)
        metrics().judge_seconds.labels(self.name).observe(time.monotonic() - began)
        metrics().judge_answers.labels(self.name).inc(len(answers))
        return rewards

    async def _ask(self, answers: Sequence[Answer]) -> list[float]:
        timeout_s = self._options.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                found = await self._scorer.score(answers)
        except TimeoutError:
            raise JudgeError(f"took longer than timeout_s={timeout_s:g}", "timeout") from None
        except (JudgeError, asyncio.CancelledError):
            raise
        except Exception as error:
            logger.exception("Judge %s failed", self.name)
            raise JudgeError(f"failed: {type(error).__name__}: {error}") from error
        try:
            rewards = [float(reward) for reward in found]
        except (TypeError, ValueError):
            raise JudgeError(f"gave what are no numbers: {str(found)[:100]}", "nonsense") from None
        if len(rewards) != len(answers):
            raise JudgeError(f"gave {len(rewards)} rewards for {len(answers)} answers", "nonsense")
        if wrong := [reward for reward in rewards if not math.isfinite(reward)]:
            raise JudgeError(f"gave the reward {wrong[0]}", "nonsense")
        return rewards

    def _admit(self) -> bool:
        """Whether this scoring is the one that tries a judge that failed."""
        if self._open_until is None:
            return False
        left = self._open_until - time.monotonic()
        if left > 0 or self._probing:
            when = f"again in {left:.1f} s" if left > 0 else "with one request at a time"
            raise JudgeError(f"judge {self.name!r} failed {self._failures} times in a row; it is tried {when}", "busy")
        self._probing = True
        return True

    def _failed(self, error: JudgeError) -> None:
        self._failures += 1
        if self._failures >= self._options.breaker_failures:
            if self._open_until is None:
                logger.error("Judge %s failed %d times in a row, last: %s", self.name, self._failures, error)
            self._open_until = time.monotonic() + self._options.breaker_s
            metrics().judge_open.labels(self.name).set(1)
