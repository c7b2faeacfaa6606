"""Where requests that ask for a method enter: admission, dispatch to a strategy, the report.

`generate` stands in for ``AsyncLLM.generate``. It is a plain function so that a request that cannot be honoured is
refused before a stream begins, with status 400 instead of an error event behind a 200.
"""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
import itertools
import json
import logging
import math
import time
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from typing import Any

import vllm.envs as envs
from vllm.exceptions import GenerationError, GracefulHTTPError, VLLMValidationError
from vllm.inputs.engine import tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from vllm_align_spec import registry
from vllm_align_spec.engine import companions, control
from vllm_align_spec.engine.grammars import Grammars
from vllm_align_spec.engine.output import Assembler, choice_params, rows
from vllm_align_spec.engine.pilot import Pilot
from vllm_align_spec.metrics import metrics
from vllm_align_spec.options import EngineOptions, OptionError, RequestOptions, is_ours, parse_engine, parse_request
from vllm_align_spec.report import Entry, ReportCollector, ReportStore, WorkerReports
from vllm_align_spec.rewards import Answer, JudgeError, judges
from vllm_align_spec.strategies.base import (
    Chunk,
    EngineFacts,
    Notes,
    PilotError,
    Request,
    Scored,
    Strategy,
    StrategyError,
)

logger = logging.getLogger(__name__)

MESSAGES_KEY = "align_spec_messages"
"""Where a rendered chat prompt carries the conversation that it came from."""

TAIL_TOKENS = 8
"""Prompt tokens in sight when a text that follows the prompt is encoded: enough for any character's bytes."""

_JUDGE_STATUS = {
    "timeout": HTTPStatus.GATEWAY_TIMEOUT,
    "failed": HTTPStatus.BAD_GATEWAY,
    "nonsense": HTTPStatus.BAD_GATEWAY,
    "refused": HTTPStatus.UNPROCESSABLE_ENTITY,
    "busy": HTTPStatus.SERVICE_UNAVAILABLE,
}

Original = Callable[..., AsyncGenerator[RequestOutput, None]]


def generate(
    original: Original, engine: Any, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
) -> AsyncGenerator[RequestOutput, None]:
    """``AsyncLLM.generate`` for every request; those without a key of ours go straight to vLLM.

    Args:
        original: vLLM's own method, unbound.
        engine: the ``AsyncLLM``.
        prompt: as for vLLM.
        sampling_params: as for vLLM; its ``extra_args`` carry our keys.
        request_id: as for vLLM.
        kwargs: vLLM's further arguments.

    Returns:
        an asynchronous generator; closing it aborts whatever runs for the request.

    Raises:
        VLLMValidationError: the request asks for something that cannot be honoured.
    """
    extra = getattr(sampling_params, "extra_args", None)
    if not extra or not any(map(is_ours, extra)):
        return original(engine, prompt, sampling_params, request_id, **kwargs)
    frontend = of(engine)
    try:
        call = frontend.admit(original, prompt, sampling_params, request_id, kwargs)
    except OptionError as error:
        metrics().refused.labels(error.option).inc()
        raise VLLMValidationError(str(error)) from None
    return frontend.serve(call)


def attach_messages(conversations: Sequence[Any], engine_inputs: Sequence[dict[str, Any]]) -> None:
    """Fills patch ``chat_messages``: the pilot of WSD's hand-over mode has a chat template of its own."""
    for conversation, engine_input in zip(conversations, engine_inputs, strict=True):
        engine_input[MESSAGES_KEY] = conversation


def drain(engine: Any, timeout: float) -> float:
    """Fills patch ``shutdown``: waits for the responses that are under way; see `Frontend.drain`."""
    frontend = _frontends.get(engine)
    return timeout if frontend is None else frontend.drain(timeout)


_frontends: weakref.WeakKeyDictionary[Any, Frontend] = weakref.WeakKeyDictionary()


def of(engine: Any) -> Frontend:
    """The front end of an engine, made at first use.

    Raises:
        OptionError: the engine options are wrong.
    """
    frontend = _frontends.get(engine)
    if frontend is None:
        frontend = _frontends[engine] = Frontend(engine)
    return frontend


@dataclass(frozen=True)
class Call:
    """One admitted request."""

    original: Original
    strategy: Strategy
    request: Request
    params: SamplingParams
    """The client's, without our keys. What it holds is the client's own; vLLM notes the backend in the grammar."""
    request_id: str
    prompt_extras: Mapping[str, Any]
    """What inner prompts inherit: cache salt and arrival time."""
    kwargs: Mapping[str, Any]


class Frontend:
    """What one engine needs in its API server process.

    Args:
        engine: the ``AsyncLLM``; not kept alive.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.ref(engine)
        config = engine.vllm_config
        self.options: EngineOptions = parse_engine(config.additional_config)
        self.control_ids = self._control_ids()
        self.facts = _facts(config, self.options, bool(self.control_ids))
        self._places = {
            name: asyncio.Semaphore(one.max_slots) for name, one in self.facts.companions.items() if one.max_slots
        }
        self._ended = False  # a request, whose report was asked for
        self._grammars = Grammars()
        launch = uuid.uuid4().hex
        self.worker_ids = (f"{launch}-{n}" for n in itertools.count())
        """Names for inner requests that workers report of; nobody else's are the same."""
        self.collector = ReportCollector(self._ask_workers)
        self.reports = ReportStore(self.options.reports, self.collector.hurry)
        self._strategies = {strategy.method: strategy for strategy in registry.strategies()}
        self._finishing: set[asyncio.Task[None]] = set()
        self._under_way: set[object] = set()  # one for each response
        self.pilot = Pilot(self.options.wsd.pilot) if self.options.wsd.pilot else None
        self.judges = judges(self.options.rewards) if self.options.enabled else {}
        if self.options.enabled:
            metrics()  # series begin at zero now, and not with the first request's end

    async def ready(self) -> None:
        """Waits until the judges of this process can be asked, and begins to share what is shared.

        Raises:
            JudgeError: one never will.
        """
        await asyncio.gather(*(judge.ready() for judge in self.judges.values()))
        share, engine = self.options.asap.share, self.engine
        # One API server process speaks for all engines; `Sharing` needs to be the only one that asks them.
        if self.options.enabled and share is not None and engine.engine_core.client_index == 0:
            from vllm_align_spec.cluster.tries import Sharing
            from vllm_align_spec.engine.facade import identity

            sharing = Sharing(share, identity(engine.vllm_config), self._call_workers, self._may_have_learnt)
            self._finishing.add(asyncio.create_task(sharing.run()))

    def _control_ids(self) -> Mapping[int, str]:
        engine = self.engine
        stop_ids = self._stop_token_ids(SamplingParams())
        vocab_size = engine.model_config.get_vocab_size()
        ids = self.options.control_ids or control.choose(engine.renderer.tokenizer, vocab_size, stop_ids)
        if ids is None:
            return {}
        if not set(ids).isdisjoint(stop_ids) or len({i for i in ids if 0 <= i < vocab_size}) < len(ids):
            raise OptionError(
                f"additional_config.align_spec.control_ids={list(ids)} is not accepted; accepted: three ids "
                f"below {vocab_size} that occur in no text and end no response ({stop_ids} do)"
            )
        return dict(zip(ids, control.NAMES, strict=True))

    @asynccontextmanager
    async def places(self, names: Sequence[str]) -> AsyncGenerator[None, None]:
        """Waits until companions have room for one more request."""
        async with AsyncExitStack() as held:
            for name in sorted(names):
                if name in self._places:
                    await held.enter_async_context(self._places[name])
            yield

    @property
    def engine(self) -> Any:
        """The ``AsyncLLM``, which lives as long as anyone serves requests with it."""
        engine = self._engine()
        if engine is None:
            raise RuntimeError("the engine is gone")
        return engine

    def admit(
        self, original: Original, prompt: Any, params: SamplingParams, request_id: str, kwargs: Mapping[str, Any]
    ) -> Call:
        """Checks a request against its options, the engine and the methods.

        Raises:
            OptionError: it cannot be honoured.
            VLLMValidationError: vLLM itself would refuse it.
        """
        if not self.options.enabled:
            keys = ", ".join(filter(is_ours, params.extra_args or ()))
            raise OptionError(f"{keys}: the align_spec plugin is switched off on this server; drop these options")
        options = parse_request(params.extra_args)
        engine = self.engine
        rendered = self._render(prompt, kwargs)
        token_ids = list(rendered["prompt_token_ids"])
        room = engine.model_config.max_model_len - len(token_ids)
        if not token_ids or room < 1:
            raise VLLMValidationError(
                f"The prompt has {len(token_ids)} tokens; accepted: 1 to {engine.model_config.max_model_len - 1}"
            )
        params = copy(params)
        params.extra_args = {k: v for k, v in (params.extra_args or {}).items() if not is_ours(k)} or None
        bends = _bends(params, engine.model_config)
        strategy = self._strategy(options)
        if not strategy.structured and params.structured_outputs is not None:
            bends["structured_outputs=True"] = "drop it (response_format, tools set it)"
        adapter = kwargs.get("lora_request")
        if adapter is not None and not strategy.adapters:
            bends[f"lora_request={adapter.lora_name!r}"] = "name the base model"
        truncates = _truncates(params) if strategy.method in ("asap", "cards") else {}
        if strategy.method == "bon" or not (bends or truncates):
            self._verify(params)
        text = rendered.get("prompt") or kwargs.get("prompt_text")
        request = Request(
            options=options,
            prompt_token_ids=token_ids,
            prompt_text=text,
            messages=_conversation(rendered.get(MESSAGES_KEY)),
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            min_tokens=params.min_tokens,
            room=room,
            stop_token_ids=self._stop_token_ids(params),
            bends=bends,
            logprobs_of_ids=params.logprob_token_ids is not None,
            logprobs=params.logprobs is not None or params.logprob_token_ids is not None,
            temperature=params.temperature,
            n=params.n,
            grammar=_grammar(params),
            stop_strings=_strings(params.stop),
            ignore_eos=params.ignore_eos,
            truncates=truncates,
            scope=self._scope(rendered.get("cache_salt"), adapter),
        )
        strategy.admit(request, self.facts)
        inherited: dict[str, Any] = {key: rendered[key] for key in ("cache_salt", "arrival_time") if key in rendered}
        inner_kwargs = {key: value for key, value in kwargs.items() if key != "prompt_text"}
        return Call(original, strategy, request, params, request_id, inherited, inner_kwargs)

    def _verify(self, params: SamplingParams) -> None:
        """vLLM's own checks, those of a known grammar left out."""
        engine = self.engine
        text = _grammar(params)
        known = None if text is None else self._grammars.get(text)
        others = params
        if known is not None:
            others = copy(params)
            others.structured_outputs = None
        others.verify(
            engine.model_config,
            engine.vllm_config.speculative_config,
            engine.vllm_config.structured_outputs_config,
            engine.renderer.tokenizer,
        )
        if known is not None:
            params.structured_outputs = known
        elif text is not None and params.structured_outputs is not None:
            self._grammars.put(text, params.structured_outputs)

    def _scope(self, cache_salt: str | None, adapter: Any) -> str:
        salt = cache_salt or ""
        if adapter is None:
            return salt
        # Nothing says what an adapter's weights are. So what is learnt of one holds for this launch (a saved trie
        # never matches again), and of one that vLLM may load anew under its name for this request.
        seen = uuid.uuid4().hex if adapter.load_inplace else self.engine.vllm_config.instance_id
        return json.dumps([salt, adapter.lora_name, adapter.lora_int_id, adapter.lora_path, seen])

    def _strategy(self, options: Sequence[RequestOptions]) -> Strategy:
        found = [self._strategies[one.method] for one in options if one.method in self._strategies]
        if len(found) > 1:
            names = [strategy.method for strategy in found]
            raise OptionError(
                f"{' and '.join(names)} cannot be combined in one request; accepted: one of them", names[-1]
            )
        return found[0]

    def _render(self, prompt: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(prompt, dict) and prompt.get("type") in ("multimodal", "embeds", "enc_dec"):
            raise OptionError(
                f"a prompt of type {prompt['type']!r} cannot be combined with align_spec options; "
                "accepted: text or token ids",
                "prompt",
            )
        if isinstance(prompt, dict) and prompt.get("type") == "token":
            return prompt
        more_than_tokens = isinstance(prompt, dict) and not {"prompt_embeds", "multi_modal_data"}.isdisjoint(prompt)
        if more_than_tokens or not isinstance(prompt, (str, list, dict)):
            raise OptionError(
                f"a prompt of type {type(prompt).__name__} cannot be combined with align_spec options; "
                "accepted: text or token ids, all of it before generation starts",
                "prompt",
            )
        # A raw prompt, from Python and not from a server. vLLM renders it on a thread, but an answer is due here.
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        engine = self.engine
        tokenization = engine.renderer.default_cmpl_tok_params.with_kwargs(**(kwargs.get("tokenization_kwargs") or {}))
        (rendered,) = engine.renderer.render_cmpl([parse_model_prompt(engine.model_config, prompt)], tokenization)
        return dict(rendered)

    @cached_property
    def _end_token_ids(self) -> Sequence[int | None]:
        engine = self.engine
        from_model = engine.input_processor.generation_config_fields.get("eos_token_id")
        return engine.renderer.get_eos_token_id(), *(from_model if isinstance(from_model, list) else [from_model])

    def _stop_token_ids(self, params: SamplingParams) -> list[int]:
        found = (*self._end_token_ids, *(params.stop_token_ids or ()))
        return list(dict.fromkeys(i for i in found if i is not None))

    async def serve(self, call: Call) -> AsyncGenerator[RequestOutput, None]:
        """The client's outputs. Ends, is closed or is cancelled: then nothing runs on for the request.

        Raises:
            GracefulHTTPError: the pilot or a judge failed.
            Exception: as ``AsyncLLM.generate``.
        """
        engine = self.engine
        assembler = Assembler(
            call.request_id,
            list(call.request.prompt_token_ids),
            call.request.prompt_text,
            call.params,
            call.prompt_extras.get("arrival_time") or time.time(),
            engine.renderer.tokenizer,
            engine.output_processor.stream_interval,
        )
        choices = [_Choice(self, call, index) for index in range(call.params.n)]
        began = time.monotonic()
        outcome = "cancelled"
        response = object()
        self._under_way.add(response)
        tasks: list[asyncio.Task[None]] = []
        try:
            tasks += [asyncio.create_task(choice.run(assembler)) for choice in choices]
            async with aclosing(assembler.outputs()) as outputs:
                async for output in outputs:
                    delta = call.params.output_kind == RequestOutputKind.DELTA
                    for completion in output.outputs:
                        choices[completion.index].count(completion, delta)
                    if output.finished and any(options.align_spec_strict for options in call.request.options):
                        await self._insist(call.strategy.method, choices)
                    yield output
            outcome = "completed"
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            outcome = "failed"
            if isinstance(error, PilotError):
                status = HTTPStatus.GATEWAY_TIMEOUT if error.timed_out else HTTPStatus.BAD_GATEWAY
                raise GracefulHTTPError(str(error), status) from error
            if isinstance(error, JudgeError):
                raise GracefulHTTPError(str(error), _JUDGE_STATUS[error.reason]) from error
            if isinstance(error, StrategyError):
                raise GracefulHTTPError(str(error), HTTPStatus.UNPROCESSABLE_ENTITY) from error
            raise
        finally:
            # Nothing is awaited here: a server that cancels this generator would cancel that too, again and again.
            for task in tasks:
                task.cancel()
            self._under_way.discard(response)
            metrics().requests.labels(call.strategy.method, outcome).inc()
            entry = self.reports.open(call.request_id)
            finishing = asyncio.create_task(
                self._report(entry, call, choices, tasks, assembler, outcome, _ms_since(began))
            )
            self._finishing.add(finishing)
            finishing.add_done_callback(self._finishing.discard)

    def drain(self, timeout: float) -> float:
        """Waits for the responses that are under way now: an engine that drains rejects what they have yet to ask.

        Blocks, so on a thread that runs an event loop, which they need to go on, it does nothing.

        Args:
            timeout: most seconds to wait.

        Returns:
            seconds that are left, at least one: vLLM takes 0 for the order to abort.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            began, waited_for = time.monotonic(), self._under_way.copy()
            if waited_for:
                logger.info("Draining: %d responses are under way", len(waited_for))
            while waited_for & self._under_way and (left := began + timeout - time.monotonic()) > 0:
                time.sleep(min(0.05, left))
            return max(1.0, began + timeout - time.monotonic())
        return timeout

    async def _insist(self, method: str, choices: Sequence[_Choice]) -> None:
        """For strict requests, which pay for it: no end of the response before the workers say that all went well."""
        asked = [choice.ask() for choice in choices]
        self.collector.hurry()
        for answer in itertools.chain.from_iterable(asked):
            found = _of_method(method, await answer)
            if found is None or found.get("reason") == "failed":
                why = (found or {}).get("error") or "the workers gave no report"
                raise GenerationError(f"{method} failed, and align_spec_strict asks for an error then: {why}")

    async def _report(
        self,
        entry: Entry,
        call: Call,
        choices: Sequence[_Choice],
        tasks: Sequence[asyncio.Task[None]],
        assembler: Assembler,
        outcome: str,
        total_ms: float,
    ) -> None:
        """Runs when the last token has left, so asking the workers costs this request nothing."""
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
            asked = [choice.ask() for choice in choices]
            found = []
            for choice, answers in zip(choices, asked, strict=True):
                method = call.strategy.method
                workers = [_of_method(method, await answer) for answer in answers]
                report = {
                    "index": choice.index,
                    "method": method,
                    "outcome": outcome,
                    "finish_reason": choice.finish_reason,
                    "response_tokens": choice.tokens,
                    "first_token_ms": choice.first_token_ms,
                    "total_ms": total_ms,
                    "complete": None not in workers,
                    **call.strategy.report(
                        choice.notes, workers, choice.tokens, max(choice.tokens, assembler.emitted[choice.index])
                    ),
                }
                found.append(report)
            call.strategy.conclude(found)
            for report in found:
                metrics().observe_choice(report)
            entry.choices = found
        except Exception:
            logger.exception("No report for request %s", call.request_id)
        finally:
            entry.done.set()

    async def _call_workers(self, what: str, *args: Any) -> list[Any]:
        """What `facade.call` answers, one for each data-parallel engine that has an answer."""
        # vLLM's own collective_rpc hears the first of them only.
        core = self.engine.engine_core
        per_engine = await core.call_utility_all_async("collective_rpc", "align_spec_call", None, (what, *args), None)
        return [answer for answers in per_engine for answer in answers if answer is not None]

    def _may_have_learnt(self) -> bool:
        """Whether a request ended since this was last asked; always, if other processes have requests too."""
        ended, self._ended = self._ended, False
        return ended or self.engine.engine_core.client_count > 1

    async def _ask_workers(self, ids: list[str]) -> WorkerReports:
        self._ended = True
        merged: dict[str, Mapping[str, Any]] = {}
        for answer in await self._call_workers("reports", ids):
            merged |= answer
        return merged


class _Verified(SamplingParams):
    """Parameters of an inner request. Those that it is made of were verified at admission; a grammar would cost every
    attempt as much again."""

    @classmethod
    def like(cls, params: SamplingParams, **changed: Any) -> _Verified:
        """What ``params`` say, apart from what is changed. For one request: vLLM may keep it as it is."""
        public = (name for name in params.__struct_fields__ if not name.startswith("_"))
        return cls(**{name: getattr(params, name) for name in public} | {"skip_clone": True} | changed)

    def verify(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to find."""

    def _verify_args(self) -> None:
        """As above; vLLM calls it of every new object."""


class _Choice:
    """One of a request's ``n`` choices; also the engine as its strategy sees it."""

    def __init__(self, frontend: Frontend, call: Call, index: int) -> None:
        self._frontend, self._call, self.index = frontend, call, index
        self._params = choice_params(call.params, index)
        self._inner = 0
        self._began = time.monotonic()
        self.notes: Notes = {}
        self._worker_id: str | None = None  # of the latest inner request that a token processor sees
        self._answers: list[asyncio.Future[Mapping[str, Any] | None]] = []
        self.tokens = 0
        self.finish_reason: str | None = None
        self.first_token_ms: float | None = None

    async def run(self, assembler: Assembler) -> None:
        """Feeds the strategy's tokens to the assembler until the choice ends."""
        try:
            request = dataclasses.replace(self._call.request, seed=self._params.seed)
            async with aclosing(self._call.strategy.run(request, self, self.notes)) as chunks:
                async for chunk in chunks:
                    if chunk.token_ids and self.first_token_ms is None:
                        self.first_token_ms = _ms_since(self._began)
                    if not assembler.put(self.index, chunk) and chunk.finish_reason is None:
                        break  # a stop string: closing the generator aborts the inner request
        except Exception as error:
            assembler.fail(error)

    def count(self, completion: CompletionOutput, delta: bool) -> None:
        """Notes what is about to leave to the client."""
        sent = len(completion.token_ids)
        self.tokens = self.tokens + sent if delta else sent
        self.finish_reason = completion.finish_reason or self.finish_reason

    def ask(self) -> Sequence[asyncio.Future[Mapping[str, Any] | None]]:
        """The workers' reports of this choice's inner requests, the latest included: it must have ended."""
        if self._worker_id is not None:
            self._answers.append(self._frontend.collector.collect(self._worker_id))
            self._worker_id = None
        return list(self._answers)

    @property
    def facts(self) -> EngineFacts:
        """See `strategies.base.Engine.facts`."""
        return self._frontend.facts

    async def worker_reports(self) -> Sequence[Mapping[str, Any] | None]:
        """See `strategies.base.Engine.worker_reports`."""
        asked = self.ask()
        self._frontend.collector.hurry()
        return [_of_method(self._call.strategy.method, await answer) for answer in asked]

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        *,
        max_tokens: int,
        min_tokens: int,
        arguments: Mapping[str, Any] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        drawn: bool = False,
        reported: bool = True,
        whole: bool = False,
    ) -> AsyncGenerator[Chunk, None]:
        """See `strategies.base.Engine.generate`."""
        changed: dict[str, Any] = {
            "detokenize": False,
            "stop": [],
            "output_text_buffer_length": 0,
            "output_kind": RequestOutputKind.FINAL_ONLY if whole else RequestOutputKind.DELTA,
            "flat_logprobs": True,
            "max_tokens": max_tokens,
            "min_tokens": min_tokens,
        }
        if temperature is not None:
            changed |= {"temperature": temperature, "top_k": top_k or 0, "top_p": 1.0, "min_p": 0.0}
        if seed is not None or drawn:
            changed["seed"] = seed  # vLLM is slower with one
        if drawn and self._frontend.engine.vllm_config.device_config.device_type == "cpu":
            # The largest entry of a row is found in a tenth of the time that a CPU needs to sample from it. On a GPU
            # there is little to gain, and beside a greedy request vLLM does without FlashInfer's sampler.
            changed["temperature"] = 0.0
        control_ids: Mapping[int, str] = {}
        if arguments is not None:
            worker_id = next(self._frontend.worker_ids)
            if reported:
                self.ask()
                self._worker_id = worker_id
            extra = {**(self._params.extra_args or {}), **arguments, "align_spec_id": worker_id}
            if self._call.strategy.control:
                control_ids = self._frontend.control_ids
                extra[control.KEY] = list(control_ids)
                changed["stop_token_ids"] = [*(self._params.stop_token_ids or ()), *control_ids]
            changed["extra_args"] = extra
        params = _Verified.like(self._params, **changed)
        followed = (arguments or {}).get("align_spec_companions", ())
        async with self._frontend.places(followed), aclosing(self._launch(prompt_token_ids, params)) as outputs:
            async for output in outputs:
                completion = output.outputs[0]
                token_ids = list(completion.token_ids)
                logprobs = completion.logprobs
                found = None if logprobs is None else rows(logprobs, len(logprobs) - len(token_ids), len(logprobs))
                word = control_ids.get(completion.stop_reason)
                if word == "failed":
                    method = self._call.strategy.method
                    raise GenerationError(f"{method} failed inside the engine; the server's log says why")
                if word is not None:
                    found = None if found is None else found[:-1]
                    yield Chunk(token_ids[:-1], found, control=word, source=output)
                else:
                    yield Chunk(token_ids, found, completion.finish_reason, completion.stop_reason, source=output)

    async def candidates(self, prompt_token_ids: Sequence[int], count: int) -> Sequence[tuple[int, float]]:
        """See `strategies.base.Engine.candidates`."""
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            flat_logprobs=True,
            logprobs=count,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async with aclosing(self._launch(prompt_token_ids, params)) as outputs:
            async for output in outputs:
                ((ids, values, _),) = rows(output.outputs[0].logprobs, 0, 1)
                # The sampled token stands in front of the likeliest ones, and again among them.
                return list(zip(ids[1:], values[1:], strict=True))
        raise RuntimeError("the engine told no candidates")

    async def judge(self, name: str, responses: Sequence[Sequence[int]]) -> list[float]:
        """See `strategies.base.Engine.judge`."""
        request = self._call.request
        prompt_text = self._prompt_text()
        answers = []
        for response in responses:
            cut = self.stop_at(response)
            text = self._text(response)
            if cut is not None:
                response = response[:cut]
                text = text[: min(at for stop in request.stop_strings if (at := text.find(stop)) >= 0)]
            ended = bool(response) and response[-1] in request.stop_token_ids and not request.ignore_eos
            finished = cut is not None or ended
            answers.append(Answer(request.prompt_token_ids, prompt_text, request.messages, response, text, finished))
        judges = self._frontend.judges
        return await judges[name or next(iter(judges))].score(answers)

    def stop_at(self, response: Sequence[int]) -> int | None:
        """See `strategies.base.Engine.stop_at`."""
        request = self._call.request
        if not request.stop_strings:
            return None

        def stops(count: int) -> bool:
            text = self._text(response[:count])
            return any(stop in text for stop in request.stop_strings)

        first, last = request.min_tokens, len(response)
        if last <= first or not stops(last):
            return None
        return bisect.bisect_left(range(last), True, lo=first, key=lambda count: stops(count + 1)) + 1

    def _text(self, response: Sequence[int]) -> str:
        """Text of a response, without special tokens; empty if the engine has no tokenizer."""
        tokenizer = self._frontend.engine.renderer.tokenizer
        if tokenizer is None or not response:
            return ""
        tail = list(self._call.request.prompt_token_ids[-TAIL_TOKENS:])
        before: str = tokenizer.decode(tail, skip_special_tokens=True)
        text: str = tokenizer.decode([*tail, *response], skip_special_tokens=True)
        if text.startswith(before):
            return text[len(before) :]
        alone: str = tokenizer.decode(list(response), skip_special_tokens=True)
        return alone

    def _prompt_text(self) -> str:
        request, tokenizer = self._call.request, self._frontend.engine.renderer.tokenizer
        if request.prompt_text is not None or tokenizer is None:
            return request.prompt_text or ""
        text: str = tokenizer.decode(list(request.prompt_token_ids), skip_special_tokens=True)
        return text

    async def score(self, prompt_token_ids: Sequence[int], start: int) -> Scored:
        """See `strategies.base.Engine.score`."""
        wanted = self._params.logprobs
        # Scoring a draft again and again is short only because of the cache. What the cache holds has no logprobs:
        # those of `start` need the token before it computed.
        found, cached = await self._prompt_logprobs(prompt_token_ids, wanted or 0, skip_cache=False)
        if cached >= start:
            found, _ = await self._prompt_logprobs(prompt_token_ids, wanted or 0, skip_cache=True)
        # Counted from the end: with a part of the prompt cached, not every runner returns rows for that part.
        scored = rows(found, len(found) - (len(prompt_token_ids) - start), len(found))
        probabilities = [math.exp(min(0.0, values[0])) for _, values, _ in scored]
        return Scored(probabilities, None if wanted is None else scored)

    async def _prompt_logprobs(
        self, prompt_token_ids: Sequence[int], count: int, skip_cache: bool
    ) -> tuple[FlatLogprobs, int]:
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            flat_logprobs=True,
            prompt_logprobs=count,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_reading_prefix_cache=skip_cache,
        )
        async with aclosing(self._launch(prompt_token_ids, params)) as outputs:
            async for output in outputs:
                if output.prompt_logprobs is not None:
                    return output.prompt_logprobs, output.num_cached_tokens or 0
        raise RuntimeError("the engine scored nothing")

    def _launch(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[RequestOutput, None]:
        prompt: dict[str, Any] = {**tokens_input(list(prompt_token_ids)), **self._call.prompt_extras}
        # One outer id for all inner requests, so that AsyncLLM.abort(request_id) still ends them all.
        request_id = self._call.request_id
        if envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION:
            request_id = f"{request_id}-{self.index}-{self._inner}"
        self._inner += 1
        return self._call.original(self._frontend.engine, prompt, params, request_id, **self._call.kwargs)

    def encode(self, prompt_token_ids: Sequence[int], text: str) -> tuple[list[int], list[int]]:
        """See `strategies.base.Engine.encode`."""
        tokenizer = self._frontend.engine.renderer.get_tokenizer()
        tail = list(prompt_token_ids[-TAIL_TOKENS:])
        before = _decode(tokenizer, tail)
        # With the prompt's end in sight where tokens meet at the seam; else, and if that fails, on its own.
        found = _encode_after(tokenizer, before, text)
        if found is None or _decode(tokenizer, tail + found[0]) != before + text:
            alone = _encode_after(tokenizer, "", text)
            if alone is not None and (found is None or _decode(tokenizer, tail + alone[0]) == before + text):
                found = alone
        return found or ([], [])

    def draft(self, request: Request) -> AsyncGenerator[str, None]:
        """See `strategies.base.Engine.draft`."""
        pilot = self._frontend.pilot
        if pilot is None:
            raise PilotError("this engine has no pilot")  # admission refuses such requests
        return pilot.draft(request.messages, self._prompt_text() if request.messages is None else None)


def _of_method(method: str, worker: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """One processor's report, with what went wrong around it."""
    if worker is None:
        return None
    error = worker.get("error")
    failed = {"reason": "failed", "kept": 0, "error": error} if error else None
    found = worker.get(method)
    if found is None:
        return failed
    return {**found, "error": error} if error else dict(found)


def _ms_since(began: float) -> float:
    return round((time.monotonic() - began) * 1e3, 3)


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    text: str = tokenizer.decode(token_ids, skip_special_tokens=False)
    return text


def _encode_after(tokenizer: Any, before: str, text: str) -> tuple[list[int], list[int]] | None:
    """Tokens of ``text`` behind ``before``, or None if a token lies across the seam."""
    if not tokenizer.is_fast:
        if before:
            return None
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        return token_ids, [len(_decode(tokenizer, token_ids[: i + 1])) for i in range(len(token_ids))]
    encoded = tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True)
    seam = len(before)
    offsets = encoded["offset_mapping"]
    first = next((i for i, (_, end) in enumerate(offsets) if end > seam), len(offsets))
    if first < len(offsets) and offsets[first][0] < seam:
        return None
    return encoded["input_ids"][first:], [end - seam for _, end in offsets[first:]]


def _conversation(messages: Sequence[Mapping[str, Any]] | None) -> Sequence[Mapping[str, Any]] | None:
    """The conversation with each content as one string, which is what most chat templates take, made as vLLM makes it:
    of none, of a text, or of the parts of one."""
    if messages is None:
        return None
    return [{**message, "content": _text(message.get("content"))} for message in messages]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = [one if isinstance(one, dict) else {"text": one} for one in content or ()]
    texts = (next((one[key] for key in ("text", "refusal", "thinking", "name") if key in one), None) for one in parts)
    return "\n".join(text for text in texts if isinstance(text, str))


def _facts(config: Any, options: EngineOptions, control_ids: bool) -> EngineFacts:
    speculative, structured = config.speculative_config, config.structured_outputs_config
    return EngineFacts(
        draft_method=None if speculative is None else speculative.method,
        draft_sampling=getattr(speculative, "draft_sample_method", "greedy"),
        rejection_method=getattr(speculative, "rejection_sample_method", "standard"),
        fixed_draft_length=speculative is None
        or not (speculative.enable_adaptive_verification or speculative.uses_dynamic_speculative_decoding()),
        shards_sampling=bool(config.parallel_config.enable_batch_sharded_sampling),
        scores_are_logprobs=config.model_config.logprobs_mode in ("raw_logprobs", "processed_logprobs"),
        pilot=options.wsd.pilot is not None,
        control_ids=control_ids,
        reasoning=bool(structured.reasoning_parser) and not structured.enable_in_reasoning,
        companions=companions.facts(config, options),
        render=lambda name, *asked: companions.render(config.model_config, options.companions[name], *asked),
        rewards=tuple(options.rewards),
        max_logprobs=config.model_config.max_logprobs,
    )


def _strings(stop: str | Sequence[str] | None) -> Sequence[str]:
    return [stop] if isinstance(stop, str) else list(stop or ())


def _truncates(params: SamplingParams) -> dict[str, str]:
    """What cuts the distribution that is sampled from."""
    by_default = "send {}={:g} (the model's generation_config may set another default)"
    found = {"top_p": (params.top_p, 1.0), "top_k": (max(params.top_k, 0), 0), "min_p": (params.min_p, 0.0)}
    return {
        f"{name}={value:g}": by_default.format(name, neutral)
        for name, (value, neutral) in found.items()
        if value != neutral
    }


def _grammar(params: SamplingParams) -> str | None:
    """The structured output in one text; what the backend makes of it depends on its order."""
    wanted = params.structured_outputs
    if wanted is None:
        return None
    fields = {name: getattr(wanted, name) for name in sorted(f.name for f in dataclasses.fields(wanted))}
    return json.dumps(fields, default=str)


def _bends(params: SamplingParams, model_config: Any) -> dict[str, str]:
    """What in a request changes the model's distribution, or what else no inner request can carry."""
    drop = "drop it"
    by_default = "send {}={} (the model's generation_config may set another default)"
    extra = params.extra_args or {}
    found: dict[str, tuple[Any, Any, str]] = {
        "prompt_logprobs": (params.prompt_logprobs, None, f"{drop} (echo with logprobs sets it)"),
        "prompt_logprob_token_ids": (params.prompt_logprob_token_ids is not None, False, drop),
        "logit_bias": (bool(params.logit_bias), False, drop),
        "bad_words": (params.bad_words or [], [], drop),
        "allowed_token_ids": (params.allowed_token_ids is not None, False, drop),
        "thinking_token_budget": (params.thinking_token_budget, None, drop),
        "trace_decode_token_ids": (params.trace_decode_token_ids is not None, False, drop),
        "kv_transfer_params": ("kv_transfer_params" in extra or "ec_transfer_params" in extra, False, drop),
        "return_sampling_mask": (bool(getattr(model_config, "return_sampling_mask", False)), False, "start without it"),
    }
    for name, neutral in (("presence_penalty", 0.0), ("frequency_penalty", 0.0), ("repetition_penalty", 1.0)):
        found[name] = (getattr(params, name), neutral, by_default.format(name, neutral))
    return {f"{name}={value!r}": instead for name, (value, neutral, instead) in found.items() if value != neutral}
