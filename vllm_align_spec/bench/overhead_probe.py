"""What the plugin does by itself, timed in a fresh process; run as a script by `overhead`, answers with JSON.

All of vLLM that the patches touch is imported first, so that what is timed is ours alone: importing and registering the
plugin, applying every patch (with the front end and the worker's half in one process, which no real process has), and
building the facade. Then the facade's calls in one step whose requests are none of ours.
"""

from __future__ import annotations

import importlib
import json
import time
from types import SimpleNamespace
from typing import Any

STEPS = 2000
BATCH = 8
DRAFTS = 5
VOCABULARY = 4096


def main() -> None:
    """Prints seconds of start-up, and microseconds of a step on either runner."""
    import numpy as np
    import torch
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

    torch.set_num_threads(1)
    # Targets of the patches and what they import anyway.
    for module in (
        "vllm.entrypoints.launchers.api_server.entry",
        "vllm.v1.engine.async_llm",
        "vllm.v1.worker.gpu_model_runner",
        "vllm.v1.worker.worker_base",
        "vllm.v1.worker.gpu.model_runner",
    ):
        try:
            importlib.import_module(module)
        except ImportError:
            continue  # it will be imported while we are timed, to our disadvantage

    start = time.perf_counter()
    from vllm_align_spec import plugin

    plugin.register()
    from vllm_align_spec.engine.facade import AlignSpecLogitsProcessor

    config = SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=DRAFTS),
        scheduler_config=SimpleNamespace(max_num_seqs=256),
        parallel_config=SimpleNamespace(rank=0, world_size=1, tensor_parallel_size=1, pipeline_parallel_size=1),
        model_config=SimpleNamespace(
            get_vocab_size=lambda: VOCABULARY,
            **dict.fromkeys(("model", "revision", "dtype", "quantization", "tokenizer", "tokenizer_revision")),
        ),
        additional_config={},
    )
    facade = AlignSpecLogitsProcessor(config, torch.device("cpu"), False)
    built = time.perf_counter()

    from vllm_align_spec.engine import v1

    logits = torch.zeros(BATCH * (DRAFTS + 1), VOCABULARY)
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(
            logitsprocs=SimpleNamespace(non_argmax_invariant=[facade]), num_reqs=BATCH, req_ids=["r"] * BATCH
        )
    )
    nobody = SimpleNamespace(extra_args=None)
    update = BatchUpdate(batch_size=BATCH, removed=[0], added=[(0, nobody, [1], [])], moved=[])

    def v1_step() -> None:
        facade.update_state(None)
        v1.before_sample(runner, logits, None)
        facade.apply(logits)

    ctx: Any = SimpleNamespace(
        idx_mapping_np=np.arange(BATCH),
        expanded_local_pos=torch.arange(DRAFTS + 1).repeat(BATCH),
        expanded_idx_mapping=torch.arange(BATCH).repeat_interleave(DRAFTS + 1),
    )

    def v2_step() -> None:
        facade.apply_staged_writes()
        facade.apply(logits, ctx)

    print(
        json.dumps(
            {
                "startup_seconds": built - start,
                "v1_step_us": microseconds(v1_step),
                "v1_new_request_us": microseconds(lambda: facade.update_state(update)),
                "v2_step_us": microseconds(v2_step),
            }
        )
    )


def microseconds(step: Any) -> float:
    """Median over batches of calls, in microseconds a call."""
    found = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(STEPS // 20):
            step()
        found.append((time.perf_counter() - start) / (STEPS // 20))
    return sorted(found)[10] * 1e6


if __name__ == "__main__":
    main()
