"""Where the time of a step goes: an engine inside this process, some of whose calls are timed.

Run as a script by the benches. Reads one JSON object from standard input and answers with one, the seconds of each
named call and of all steps together. On a CPU nothing is asynchronous, so a call's time is its work. A call that runs
inside another is taken off that one.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

CALLS = {
    "target": "vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward",
    "sampling": "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample",
    "drafting": "vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids",
    "companion": "vllm_align_spec.companion.model:Companion._step",
}
"""Share -> the call it is the time of. ``rest`` is the time of steps outside all of them."""


def measure(
    engine: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    tokens: int,
    batches: Sequence[int],
    extra_args: Mapping[str, Any] | None = None,
) -> dict[int, dict[str, float]]:
    """Shares of the time of steps by batch, by a fresh process.

    Args:
        engine: arguments of vLLM's ``LLM``.
        prompts: token ids; a batch takes the first ones.
        tokens: of every answer.
        batches: numbers of requests that run together.
        extra_args: the requests' options of ours.

    Returns:
        batch -> share (`CALLS`, and ``rest``) of the steps' time; the sum is 1.

    Raises:
        RuntimeError: the process failed; the message is what it said last.
    """
    asked = {"engine": engine, "prompts": prompts, "tokens": tokens, "batches": batches, "extra_args": extra_args}
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    told = subprocess.run(
        [sys.executable, "-P", "-m", __name__],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if told.returncode:
        raise RuntimeError(f"timing an engine's steps failed: {told.stderr[-2000:]}")
    found: dict[str, dict[str, float]] = json.loads(told.stdout.splitlines()[-1])
    return {int(batch): shares for batch, shares in found.items()}


class _Clock:
    """Seconds by call, each without what ran inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = [0.0]  # of each open call: seconds of the timed calls within it

    def time(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed."""

        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent = time.perf_counter() - began
                self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inside.pop()
                self._inside[-1] += spent

        return timed


def main() -> None:
    """Answers the object on standard input."""
    # What vLLM prints must not get between.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked = json.load(sys.stdin)
    from vllm import LLM, SamplingParams

    engine = LLM(**asked["engine"])
    clock = _Clock()
    for name, where in CALLS.items():
        module, _, symbol = where.partition(":")
        owner, _, method = symbol.partition(".")
        target = getattr(importlib.import_module(module), owner)
        setattr(target, method, clock.time(name, getattr(target, method)))
    engine.llm_engine.step = clock.time("rest", engine.llm_engine.step)
    params = SamplingParams(
        temperature=0.0, max_tokens=asked["tokens"], ignore_eos=True, extra_args=asked["extra_args"]
    )
    found = {}
    for batch in asked["batches"]:
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"][:batch]]
        for _ in range(2):  # the first time warms up
            clock.seconds.clear()
            engine.generate(prompts, params, use_tqdm=False)
        total = sum(clock.seconds.values())
        found[batch] = {name: clock.seconds.get(name, 0.0) / total for name in (*CALLS, "rest")}
    print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
