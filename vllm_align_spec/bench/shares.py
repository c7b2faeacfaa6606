"""Where the time of a step goes: some calls of a worker are timed in the worker.

On a CPU nothing is asynchronous, so a call's time is its work. A call that runs inside another is taken off that one.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from vllm_align_spec.bench.measure import start_engine

CALLS = {
    "target": "vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward",
    "sampling": "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample",
    "drafting": "vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids",
    "companion": "vllm_align_spec.companion.model:Companion._step",
    "worker": "vllm.v1.worker.gpu_worker:Worker.execute_model",
    "worker, sampling": "vllm.v1.worker.gpu_worker:Worker.sample_tokens",
}
"""Share -> the call it is the time of. The last two enclose the others; what they do besides is share ``worker``."""

SHARES = ("target", "sampling", "drafting", "companion", "worker", "elsewhere")
"""``target`` is the target's layers; its head counts as ``worker``. ``elsewhere`` is the time outside of the worker:
scheduling, messages, text."""


class StepClock:
    """What a worker gets through ``worker_extension_cls``."""

    def align_spec_clock_start(self) -> None:
        """From here on time is counted; what was counted before is forgotten."""
        if not _seconds:
            for name, where in CALLS.items():
                module, _, symbol = where.partition(":")
                owner, _, method = symbol.partition(".")
                target = getattr(importlib.import_module(module), owner)
                setattr(target, method, _timed(name, getattr(target, method)))
        _seconds.update(dict.fromkeys(CALLS, 0.0))

    def align_spec_clock_read(self) -> dict[str, float]:
        """Seconds by call, each without what ran inside it."""
        return dict(_seconds)


_seconds: dict[str, float] = {}
_inside = [0.0]  # of each open call: seconds of the timed calls within it


def _timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def timed(*args: Any, **kwargs: Any) -> Any:
        _inside.append(0.0)
        began = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            spent = time.perf_counter() - began
            _seconds[name] += spent - _inside.pop()
            _inside[-1] += spent

    return timed


def measure(
    model: str,
    told: str,
    settings: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    tokens: int,
    batches: Sequence[int],
    options: Sequence[dict[str, Any] | None] = (None,),
) -> list[dict[int, dict[str, float]]]:
    """Shares of the time that equally long greedy answers take.

    Args:
        model: the target.
        told: what the engine is started with, for the display.
        settings: of the engine.
        prompts: token ids; a batch takes the first ones.
        tokens: of every answer.
        batches: numbers of requests that run together.
        options: the requests' options of ours; each gets a measurement.

    Returns:
        for each of ``options``: batch -> share (`SHARES`) of the time; the sum is 1.
    """
    from vllm import SamplingParams

    found: list[dict[int, dict[str, float]]] = []
    with start_engine(model, told, worker_extension_cls=f"{__name__}.{StepClock.__name__}", **settings) as engine:

        def ask(what: str) -> Any:
            return engine.llm_engine.call(engine.llm_engine.engine.collective_rpc(f"align_spec_clock_{what}"))

        for extra_args in options:
            params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, extra_args=extra_args)
            found.append({})
            for batch in batches:
                chosen = [{"prompt_token_ids": list(ids)} for ids in prompts[:batch]]
                engine.generate(chosen, params, use_tqdm=False)  # warms up
                ask("start")
                began = time.perf_counter()
                engine.generate(chosen, params, use_tqdm=False)
                total = time.perf_counter() - began
                (seconds,) = ask("read")
                seconds["worker"] += seconds.pop("worker, sampling")
                seconds["elsewhere"] = total - sum(seconds.values())
                found[-1][batch] = {name: seconds[name] / total for name in SHARES}
    return found
