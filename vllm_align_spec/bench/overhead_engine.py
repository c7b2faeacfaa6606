"""An engine in a process of its own, with or without our plugin; run as a script by `overhead`, importing none of ours.

It reads one JSON object a line and answers with one: ``{"batch": n, "tokens": m, "ids": [...]}`` generates, and
``{"memory": true}`` tells the memory of each process.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any, TextIO


async def serve(engine: Any, answers: TextIO) -> None:
    """Answers until standard input ends."""
    loop = asyncio.get_running_loop()
    served = 0
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        asked = json.loads(line)
        if asked.get("memory"):
            found: dict[str, Any] = {"memory": memory()}
        else:
            start = time.perf_counter()
            await asyncio.gather(*(consume(engine, asked, f"{served}-{i}") for i in range(asked["batch"])))
            found = {"seconds": time.perf_counter() - start}
        served += 1
        print(json.dumps(found), file=answers, flush=True)


async def consume(engine: Any, asked: dict[str, Any], request_id: str) -> None:
    """One request, streamed as the API server streams it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=asked["tokens"],
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    async for _ in engine.generate({"prompt_token_ids": asked["ids"]}, params, request_id):
        pass


def memory() -> dict[str, float]:
    """MB that belong to one process alone: this one, the engine's, the worker's."""
    import psutil

    front = psutil.Process()
    found = {"front end": front.memory_full_info().uss / 1e6}
    for child in front.children(recursive=True):
        title = child.cmdline()[0]
        if title.startswith("VLLM::"):
            found[title.removeprefix("VLLM::")] = child.memory_full_info().uss / 1e6
    return found


def main() -> None:
    """Starts the engine that the arguments (JSON) describe."""
    # What the engine prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def run() -> None:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**json.loads(sys.argv[1])))
        try:
            print(
                json.dumps({"ready": sorted(m for m in sys.modules if m.startswith("vllm_align_spec"))[:1]}),
                file=answers,
            )
            answers.flush()
            await serve(engine, answers)
        finally:
            engine.shutdown()

    asyncio.run(run())


if __name__ == "__main__":
    main()
