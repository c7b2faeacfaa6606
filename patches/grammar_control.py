"""A grammar does not hear of a token that ends its request on purpose."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_align_spec.patches import Patch


def wrap(original: Any, hook: Callable[..., Any]) -> Any:
    """The hook takes a trailing control id away from what the grammar is advanced by."""

    @wraps(original)
    def accept_tokens(self: Any, request: Any, new_token_ids: Any) -> Any:
        return original(self, request, hook(request, new_token_ids))

    return accept_tokens


PATCH = Patch(
    name="grammar_control",
    module="vllm.v1.structured_output",
    symbol="StructuredOutputManager.accept_tokens",
    why="A request under a grammar cannot be ended on purpose: the grammar rejects the token, the client gets a 500.",
    how="A hook removes the token from those that advance the grammar; the scheduler has ended the request already.",
    upstream="https://github.com/vllm-project/vllm/blob/main/vllm/v1/structured_output/__init__.py",
    removable_when="Stop token ids that are not the grammar's end a request without advancing it.",
    fingerprints={"0.32": "cb3362d0fcd3f0ae", "0.33": "cb3362d0fcd3f0ae"},
    wrap=wrap,
)
