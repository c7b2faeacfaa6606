"""Programs as judges: what can be said of a text without a model.

A package adds its own in the entry point group ``vllm_align_spec.rewards``: a callable that takes the operator's
``parameters`` and returns a function of an `Answer`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from typing import Any, Literal

import regex as regular_expressions

from vllm_align_spec.options import OptionError, ProgramRewardOptions
from vllm_align_spec.rewards.base import Answer, JudgeError

GROUP = "vllm_align_spec.rewards"

REGEX_TIMEOUT_S = 0.5
"""Longest match: some patterns take for ever on some texts."""

Program = Callable[[Answer], float]


def keywords(*, words: Sequence[str], ignore_case: bool = True) -> Program:
    """The share of the words that occur in the response, 0 to 1.

    Raises:
        ValueError: there are no words.
    """
    if isinstance(words, str) or not words or not all(isinstance(word, str) and word for word in words):
        raise ValueError(f"words={words!r} has to be a list of words")
    wanted = [word.casefold() if ignore_case else word for word in words]

    def score(answer: Answer) -> float:
        text = answer.response_text.casefold() if ignore_case else answer.response_text
        return sum(word in text for word in wanted) / len(wanted)

    return score


def length(*, target: int, unit: Literal["characters", "words", "tokens"] = "words") -> Program:
    """How near the response's length is to the target: 0 is there, -1 as far away as nothing is.

    Raises:
        ValueError: the target is not positive, or the unit is none.
    """
    measures: dict[str, Callable[[Answer], int]] = {
        "characters": lambda answer: len(answer.response_text),
        "words": lambda answer: len(answer.response_text.split()),
        "tokens": lambda answer: len(answer.response_token_ids),
    }
    if not isinstance(target, int) or target < 1:
        raise ValueError(f"target={target!r} has to be an integer >= 1")
    if unit not in measures:
        raise ValueError(f"unit={unit!r} has to be one of {', '.join(measures)}")
    measure = measures[unit]
    return lambda answer: -abs(measure(answer) - target) / target


def regex(*, pattern: str, whole: bool = False) -> Program:
    """1 where the pattern is found in the response (or, with ``whole``, is all of it), else 0.

    Raises:
        ValueError: it is no regular expression.
    """
    try:
        compiled = regular_expressions.compile(pattern)
    except (regular_expressions.error, TypeError) as error:
        raise ValueError(f"pattern={pattern!r} is no regular expression: {error}") from None
    find = compiled.fullmatch if whole else compiled.search

    def score(answer: Answer) -> float:
        # Without the interpreter's lock, so that a slow pattern holds up nobody.
        return float(find(answer.response_text, timeout=REGEX_TIMEOUT_S, concurrent=True) is not None)

    return score


def json_valid() -> Program:
    """1 where the response is a JSON document, else 0."""

    def score(answer: Answer) -> float:
        try:
            json.loads(answer.response_text)
        except (ValueError, RecursionError):
            return 0.0
        return 1.0

    return score


BUILT_IN: Mapping[str, Callable[..., Program]] = {
    "keywords": keywords,
    "length": length,
    "regex": regex,
    "json_valid": json_valid,
}


class ProgramScorer:
    """Runs one program, on a thread of its own.

    Raises:
        OptionError: there is no such program, or it does not take these parameters.
    """

    def __init__(self, name: str, options: ProgramRewardOptions) -> None:
        place = f"additional_config.align_spec.rewards.{name}"
        factory = BUILT_IN.get(options.program)
        if factory is None:
            registered = {plugin.name: plugin for plugin in entry_points(group=GROUP)}
            if options.program not in registered:
                known = ", ".join([*BUILT_IN, *sorted(registered)])
                raise OptionError(f"{place}.program={options.program!r} is not accepted; accepted: {known}")
            factory = registered[options.program].load()
        try:
            self._program = factory(**options.parameters)
        except (TypeError, ValueError) as error:
            takes = inspect.signature(factory)
            raise OptionError(
                f"{place}.parameters={options.parameters!r} is not accepted: {error}; accepted: {takes}"
            ) from None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"align-spec-{name}")

    async def ready(self) -> None:
        """It is."""

    async def score(self, answers: Sequence[Answer]) -> Sequence[float]:
        """See `rewards.base.Scorer`."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._score, answers)

    def _score(self, answers: Sequence[Answer]) -> list[Any]:
        try:
            return [self._program(answer) for answer in answers]
        except TimeoutError:
            raise JudgeError(f"could not match a text within {REGEX_TIMEOUT_S:g} s", "refused") from None
