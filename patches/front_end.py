"""Requests pass our admission before vLLM's."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_align_spec.patches import Patch


def wrap(original: Any, hook: Callable[..., Any]) -> Any:
    """A plain function: what it raises is raised before the response begins, so a stream gets a real 400 too."""

    @wraps(original)
    def generate(self: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> Any:
        return hook(original, self, prompt, sampling_params, request_id, **kwargs)

    return generate


PATCH = Patch(
    name="front_end",
    module="vllm.v1.engine.async_llm",
    symbol="AsyncLLM.generate",
    why="A plugin cannot validate a request against the engine's configuration, steer a response or follow its tokens.",
    how="generate becomes a plain function that hands the original to our front end.",
    upstream="https://github.com/vllm-project/vllm/blob/main/docs/design/plugin_system.md",
    removable_when="vLLM has an extension point around EngineClient.generate.",
    fingerprints={"0.32": "8b3f7e89a988c55d", "0.33": "e2b5405255ba3299"},
    wrap=wrap,
)
