"""Offline inference: vLLM's ``LLM``, but with an engine that requests reach through our front end.

vLLM's own ``LLM`` steps its engine itself and knows no strategies, so it refuses our options and names this class.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

from vllm import AsyncEngineArgs, RequestOutput, SamplingParams
from vllm.entrypoints.common.offline import OfflineInferenceMixin
from vllm.renderers.chat_utils import load_chat_template
from vllm.usage.usage_lib import UsageContext
from vllm.utils.counter import Counter
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_align_spec.engine import frontend

T = TypeVar("T")


class LLM(OfflineInferenceMixin):
    """Generates texts; ``generate`` and ``chat`` take and return what those of ``vllm.LLM`` do.

    Our options are keys of ``SamplingParams.extra_args``. The engine runs in processes of its own: a script needs
    ``if __name__ == "__main__":``. Close it, or use it as a context manager; it also ends with the process.

    Args:
        model: name or path of the model.
        chat_template: a template, or the path of one, instead of the model's.
        engine_args: everything else that ``AsyncEngineArgs`` takes.
    """

    def __init__(self, model: str, *, chat_template: str | None = None, **engine_args: Any) -> None:
        engine_args.setdefault("disable_log_stats", True)
        arguments = AsyncEngineArgs(model=model, **engine_args)
        self.llm_engine = _Stepper(arguments)
        self.model_config = self.llm_engine.engine.model_config
        self.renderer = self.llm_engine.engine.renderer
        self.request_counter = Counter()
        self.chat_template = load_chat_template(chat_template)

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Any = True,
        lora_request: Any = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts; see ``vllm.LLM.generate``.

        Raises:
            VLLMValidationError: a request asks for something that cannot be honoured; nothing was generated.
        """
        found: list[RequestOutput] = self._run_completion(
            prompts=prompts,
            params=self._params(sampling_params),
            output_type=RequestOutput,
            use_tqdm=use_tqdm,
            lora_request=lora_request,
            priority=priority,
            tokenization_kwargs=tokenization_kwargs,
        )
        return found

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Any = True,
        lora_request: Any = None,
        **chat_options: Any,
    ) -> list[RequestOutput]:
        """Answers conversations; see ``vllm.LLM.chat`` for ``chat_options``.

        Raises:
            VLLMValidationError: a request asks for something that cannot be honoured; nothing was generated.
        """
        found: list[RequestOutput] = self._run_chat(
            messages=messages,
            params=self._params(sampling_params),
            output_type=RequestOutput,
            use_tqdm=use_tqdm,
            lora_request=lora_request,
            **chat_options,
        )
        return found

    def report(self, output: RequestOutput) -> dict[str, Any] | None:
        """What happened to a response (see `vllm_align_spec.report`); None if it used no method or is too old."""
        reports = frontend.of(self.llm_engine.engine).reports
        return self.llm_engine.call(reports.find(output.request_id))

    def get_tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return self.renderer.get_tokenizer()

    def close(self) -> None:
        """Ends the engine."""
        self.llm_engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _params(self, params: SamplingParams | Sequence[SamplingParams] | None) -> Any:
        if params is not None:
            return params
        return SamplingParams.from_optional(**self.model_config.get_diff_sampling_param())

    def _preprocess_chat(self, conversations: Any, *args: Any, **kwargs: Any) -> Any:
        rendered = super()._preprocess_chat(conversations, *args, **kwargs)
        frontend.attach_messages(conversations, rendered)
        return rendered


class _Stepper:
    """An ``AsyncLLM`` on a thread of its own, behind the few methods of ``LLMEngine`` that offline inference calls."""

    def __init__(self, arguments: AsyncEngineArgs) -> None:
        self._loop = asyncio.new_event_loop()
        self._outputs: queue.SimpleQueue[RequestOutput | Exception] = queue.SimpleQueue()
        self._running: dict[str, asyncio.Task[None]] = {}
        threading.Thread(target=self._loop.run_forever, name="align-spec-engine", daemon=True).start()

        async def start() -> Any:
            return AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)

        self.engine = self.call(start())
        self.close = weakref.finalize(self, _close, self.engine, self._loop)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the engine's thread."""
        future: concurrent.futures.Future[T] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result()

    def add_request(self, request_id: str, prompt: Any, params: SamplingParams, **kwargs: Any) -> str:
        """Starts a request; refuses at once what cannot be honoured."""

        async def start() -> None:
            outputs = self.engine.generate(prompt, params, request_id, **kwargs)
            self._running[request_id] = asyncio.create_task(self._collect(outputs))

        self.call(start())
        return request_id

    async def _collect(self, outputs: AsyncGenerator[RequestOutput, None]) -> None:
        try:
            async for output in outputs:
                self._outputs.put(output)
        except Exception as error:
            self._outputs.put(error)

    def abort_request(self, request_ids: Sequence[str], internal: bool = False) -> None:
        """Ends requests and whatever runs for them."""

        async def cancel() -> None:
            tasks = [task for i in request_ids if (task := self._running.pop(i, None))]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.call(cancel())

    def get_num_unfinished_requests(self) -> int:
        """Requests whose final output `step` has not returned yet."""
        return len(self._running)

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has more to return."""
        return bool(self._running)

    def step(self) -> list[RequestOutput]:
        """Waits for the next output.

        Raises:
            Exception: one request's; all others are ended too.
        """
        output = self._outputs.get()
        if isinstance(output, Exception):
            self.abort_request(list(self._running))
            while not self._outputs.empty():
                self._outputs.get()
            raise output
        if output.finished:
            self._running.pop(output.request_id, None)
        return [output]


def _close(engine: Any, loop: asyncio.AbstractEventLoop) -> None:
    async def end() -> None:
        engine.shutdown()

    asyncio.run_coroutine_threadsafe(end(), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
