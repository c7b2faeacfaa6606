"""A pooling server of vLLM's as a judge, by its routes ``/classify`` and ``/pooling``.

Both take ``input`` (texts, or token ids) for many answers at once, or ``messages`` for one. ``use_activation: false``
asks for the score itself; by default the server would put it through a sigmoid or softmax.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from vllm_align_spec.options import HttpRewardOptions
from vllm_align_spec.rewards.base import Answer, JudgeError

_REFUSED = frozenset({400, 413, 422})
"""What the server says of an answer that it cannot read."""

_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


class HttpScorer:
    """Asks one server."""

    def __init__(self, options: HttpRewardOptions) -> None:
        self._options = options
        self._url = f"{options.url.rstrip('/')}/{options.route}"
        self._client: httpx.AsyncClient | None = None
        self._in_flight = asyncio.Semaphore(options.max_concurrency)

    async def ready(self) -> None:
        """Nothing is asked before there is an answer to judge: the server may come up after this one."""

    async def score(self, answers: Sequence[Answer]) -> Sequence[float]:
        """See `rewards.base.Scorer`."""
        bodies = self._bodies(answers)
        if len(bodies) == 1:
            return await self._ask(*bodies[0])
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._ask(*body)) for body in bodies]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [reward for task in tasks for reward in task.result()]

    def _bodies(self, answers: Sequence[Answer]) -> list[tuple[dict[str, Any], int]]:
        """Requests, each with the number of rewards that it is to bring."""
        kind = self._options.input
        if kind == "token_ids":
            return [({"input": [[*a.prompt_token_ids, *a.response_token_ids] for a in answers]}, len(answers))]
        if kind == "messages" and answers[0].messages is not None:
            return [(_conversation(answer), 1) for answer in answers]
        return [({"input": [answer.prompt_text + answer.response_text for answer in answers]}, len(answers))]

    async def _ask(self, body: dict[str, Any], count: int) -> list[float]:
        options = self._options
        if self._client is None:
            limits = httpx.Limits(max_connections=options.max_concurrency)
            # The guard's deadline comes first; it holds for all tries together.
            self._client = httpx.AsyncClient(timeout=2 * options.timeout_s, limits=limits)
        for tries_left in range(options.retries, -1, -1):
            try:
                async with self._in_flight:
                    return await self._try(body, count)
            except JudgeError as error:
                if not (error.again and tries_left):
                    raise
            wait_s = options.backoff_s * 2 ** (options.retries - tries_left)
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.5))
        raise AssertionError("the last try raises or returns")

    async def _try(self, body: dict[str, Any], count: int) -> list[float]:
        options = self._options
        assert self._client is not None
        key = os.environ.get(options.api_key_env, "") if options.api_key_env else ""
        model = {} if options.model is None else {"model": options.model}
        try:
            response = await self._client.post(
                self._url,
                json={**body, **model, "use_activation": False},
                headers={"Authorization": f"Bearer {key}"} if key else None,
            )
        except httpx.HTTPError as error:
            raise JudgeError(f"cannot be reached: {type(error).__name__}: {error}", again=True) from error
        status = response.status_code
        if status in _REFUSED:
            raise JudgeError(f"refused an answer with HTTP {status}: {response.text[:300]}", "refused")
        if status != 200:
            raise JudgeError(f"answered HTTP {status}: {response.text[:300]}", again=status in _AGAIN)
        try:
            data = sorted(response.json()["data"], key=lambda item: item["index"])
            field = "probs" if options.route == "classify" else "data"
            rewards = [item[field][options.label] for item in data]
            if not all(isinstance(reward, int | float) for reward in rewards):
                raise TypeError("no numbers")
        except (ValueError, KeyError, TypeError, IndexError):
            found = response.text[:200]
            raise JudgeError(f"sent what is no score with label={options.label}: {found!r}", "nonsense") from None
        if len(rewards) != count:
            raise JudgeError(f"gave {len(rewards)} rewards for {count} answers", "nonsense")
        return rewards


def _conversation(answer: Answer) -> dict[str, Any]:
    """The conversation with the response in it, open-ended unless the response has ended."""
    messages = wire(answer.messages or ())
    if not answer.response_text and not answer.finished:
        begun = bool(messages) and messages[-1].get("role") == "assistant"
        return {"messages": messages, "add_generation_prompt": not begun, "continue_final_message": begun}
    return {"messages": joined(messages, answer.response_text), "continue_final_message": not answer.finished}


def wire(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A conversation as OpenAI's API takes it: arguments of tool calls as text, which vLLM has parsed for templates."""
    return [
        {**message, "tool_calls": [_call(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
    return {**call, "function": {**function, "arguments": text}}


def joined(messages: Sequence[Mapping[str, Any]], response: str) -> list[Mapping[str, Any]]:
    """The conversation with the response as the assistant's message, or at the end of the one that it continues."""
    if messages and messages[-1].get("role") == "assistant":
        begun = messages[-1].get("content")
        if isinstance(begun, str):
            return [*messages[:-1], {**messages[-1], "content": begun + response}]
    return [*messages, {"role": "assistant", "content": response}]
