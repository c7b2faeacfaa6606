"""Tokens of a strategy turned into the `RequestOutput` stream that vLLM's servers expect.

vLLM's own output processor does the work, one instance a request: it is fed the client's prompt and parameters and our
tokens as if the engine had sent them. So detokenisation, stop strings, ``min_tokens``, logprobs, ``n`` and the three
output kinds are vLLM's to the letter, whatever the inner requests looked like.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from copy import copy
from typing import Any

import numpy as np
from vllm.logprobs import FlatLogprobs
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import FINISH_REASON_STRINGS, EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.outputs import LogprobsLists

from vllm_align_spec.strategies.base import Chunk

Row = tuple[list[int], list[float], int]
"""Log-probabilities at one position: ids (the token itself first), their values, the token's rank."""


def rows(logprobs: FlatLogprobs, start: int, stop: int) -> list[Row]:
    """Positions ``start`` to ``stop`` of the engine's logprobs, each on its own."""
    found = []
    for position in range(start, stop):
        part = slice(logprobs.start_indices[position], logprobs.end_indices[position])
        found.append((logprobs.token_ids[part], logprobs.logprobs[part], logprobs.ranks[part.start] or 0))
    return found


def choice_params(params: SamplingParams, index: int) -> SamplingParams:
    """Parameters of one of ``n`` choices, with the seed that vLLM gives it."""
    params = copy(params)
    params.n = 1
    if params.seed is not None:
        params.seed += index
    return params


class Assembler:
    """One client request's output.

    Args:
        request_id: the engine's name for the request, as the caller of ``generate`` gave it.
        prompt_token_ids: the client's whole prompt.
        prompt: its text, if known.
        params: a copy of the client's parameters.
        tokenizer: vLLM's; None if the engine has none.
        stream_interval: the engine's.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        prompt: str | None,
        params: SamplingParams,
        arrival_time: float,
        tokenizer: Any,
        stream_interval: int,
    ) -> None:
        self._collector = RequestOutputCollector(params.output_kind, request_id)
        self._processor = OutputProcessor(tokenizer, log_stats=False, stream_interval=stream_interval)
        self._prompt_len = len(prompt_token_ids)
        self._latest: RequestOutput | None = None
        self._ids: list[str] = []
        self.emitted = [0] * params.n
        """Tokens that each choice's strategy yielded."""
        self._one = params.n == 1
        whole = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=arrival_time,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            external_req_id=request_id,
        )
        if self._one:
            self._add(whole, prompt, None, 0)
            return
        parent = ParentRequest(whole)
        for index in range(params.n):
            child = copy(whole)
            child.request_id, child.sampling_params = parent.get_child_info(index)
            self._add(child, prompt, parent, index)

    def _add(self, request: EngineCoreRequest, prompt: str | None, parent: ParentRequest | None, index: int) -> None:
        self._ids.append(request.request_id)
        self._processor.add_request(request, prompt, parent, index, self._collector)

    def put(self, index: int, chunk: Chunk) -> bool:
        """Takes tokens of one choice.

        Returns:
            whether the choice goes on; False also where a stop string has ended it.
        """
        finish = None if chunk.finish_reason is None else FinishReason(FINISH_REASON_STRINGS.index(chunk.finish_reason))
        self.emitted[index] += len(chunk.token_ids)
        source = chunk.source
        self._latest = source or self._latest
        output = EngineCoreOutput(
            request_id=self._ids[index],
            new_token_ids=list(chunk.token_ids),
            new_logprobs=_logprobs_lists(chunk.logprobs),
            finish_reason=finish,
            stop_reason=chunk.stop_reason,
            spec_decode_metrics=source.outputs[0].spec_decode_metrics if source and finish is not None else None,
        )
        self._processor.process_outputs([output])
        return bool(self._processor.has_request(self._ids[index]))

    def fail(self, error: Exception) -> None:
        """Ends the whole request with an error."""
        self._collector.put(error)

    async def outputs(self) -> AsyncGenerator[RequestOutput, None]:
        """The client's outputs until the last one, which is ``finished``.

        Raises:
            Exception: what `fail` was given.
        """
        finished = False
        while not finished:
            output = self._collector.get_nowait() or await self._collector.get()
            finished = output.finished
            if self._latest is not None:
                # Inner prompts may be longer than the client's: they can hold a part of the response.
                output.num_cached_tokens = min(self._latest.num_cached_tokens or 0, self._prompt_len)
                output.num_cache_creation_tokens = self._latest.num_cache_creation_tokens
                output.metrics = self._latest.metrics
            yield output


def _logprobs_lists(entries: Sequence[Row] | None) -> LogprobsLists | None:
    if not entries:
        return None
    return LogprobsLists(
        np.array([row[0] for row in entries], dtype=np.int64),
        np.array([row[1] for row in entries], dtype=np.float32),
        np.array([row[2] for row in entries], dtype=np.int64),
    )
