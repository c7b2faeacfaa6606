"""On V1, processors of plugins stay when speculative decoding is on."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_align_spec.patches import Patch


def wrap(original: Any, hook: Callable[..., Any]) -> Any:
    """The hook builds our processor; vLLM's own list is left as it is."""

    @wraps(original)
    def build_logitsprocs(
        vllm_config: Any, device: Any, is_pin_memory: bool, is_pooling_model: bool, custom_logitsprocs: Any = ()
    ) -> Any:
        processors = original(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs)
        if vllm_config.speculative_config and not is_pooling_model:
            processors.non_argmax_invariant.append(hook(vllm_config, device, is_pin_memory))
        return processors

    return build_logitsprocs


PATCH = Patch(
    name="v1_facade",
    module="vllm.v1.worker.gpu_model_runner",
    symbol="build_logitsprocs",
    why="With speculative decoding V1 drops the processors of plugins without a word.",
    how="Appends ours to the list that vLLM built.",
    upstream="https://github.com/vllm-project/vllm/blob/main/vllm/v1/sample/logits_processor/__init__.py",
    removable_when="V1 is gone, or keeps processors that say they can handle drafts.",
    fingerprints={"0.32": "6b56ae0c1d2aa7b0", "0.33": "6b56ae0c1d2aa7b0"},
    wrap=wrap,
)
