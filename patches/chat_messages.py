"""A rendered chat prompt still knows the conversation that it came from."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_align_spec.patches import Patch


def wrap(original: Any, hook: Callable[..., Any]) -> Any:
    """The hook sees the conversations, as vLLM parsed them, and the engine inputs made of them, pairwise."""

    @wraps(original)
    async def render_chat_async(self: Any, conversations: Any, *args: Any, **kwargs: Any) -> Any:
        rendered = await original(self, conversations, *args, **kwargs)
        hook(*rendered)
        return rendered

    return render_chat_async


PATCH = Patch(
    name="chat_messages",
    module="vllm.renderers.base",
    symbol="BaseRenderer.render_chat_async",
    why="A pilot with a chat template of its own needs the messages; AsyncLLM.generate sees rendered token ids only.",
    how="Hands a hook the conversations and the engine inputs, which are dictionaries and keep what it adds.",
    upstream="https://github.com/vllm-project/vllm/blob/main/vllm/renderers/base.py",
    removable_when="Engine inputs carry the conversation that they were rendered from.",
    fingerprints={"0.32": "c03075e59b325b5a", "0.33": "c03075e59b325b5a"},
    wrap=wrap,
)
