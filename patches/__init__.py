"""The changes to vLLM that no extension point offers, and the ledger of what is in force.

One file holds one change: a `Patch` record and the function that wraps what it replaces. A patch knows only vLLM; what
it calls is a hook that the engine folder fills. Patches are applied when their target module is imported, so that
registering the plugin stays light, and they refuse to touch source that nobody has verified.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import logging
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

logger = logging.getLogger("vllm.align_spec")

ABSENT = "absent"
"""The fingerprint of a symbol that vLLM does not have: the patch adds it."""

STATE: dict[str, str] = {}
"""Patch name -> ``pending`` (its module is not imported), ``applied``, or ``unverified: ...`` (applied anyway)."""


class PatchMismatchError(RuntimeError):
    """vLLM's source at a patched symbol is none that was verified."""


@dataclass(frozen=True)
class Patch:
    """One replaced symbol. ``wrap(original, hook)`` returns the replacement; the hook of a repair is None."""

    name: str
    module: str
    symbol: str  # attribute path inside the module
    why: str
    how: str
    upstream: str
    removable_when: str
    fingerprints: Mapping[str, str]  # vLLM version -> fingerprint(original)
    wrap: Callable[[Any, Any], Any]


def fingerprint(function: Any) -> str:
    """Hash of a function's syntax tree: blind to comments, docstrings and layout, sensitive to everything else."""
    if function is None:
        return ABSENT
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    return fingerprint_node(ast.parse(source).body[0])


def fingerprint_node(node: ast.AST) -> str:
    """`fingerprint` of a function that was parsed from a file rather than imported."""
    body = getattr(node, "body", [])
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        node.body = body[1:]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.unparse(node).encode()).hexdigest()[:16]


def install(patches: Sequence[Patch], hooks: Mapping[str, str], *, allow_unverified: bool = False) -> None:
    """Applies each patch now, if its module is imported, or else as soon as it is. Doing so twice is harmless.

    Args:
        patches: the ledger.
        hooks: patch name -> ``module:function`` that fills it, resolved when the patch is applied; a repair has none.
        allow_unverified: only warn where a fingerprint is unknown.

    Raises:
        PatchMismatchError: now, or when the module is imported later.
    """
    for patch in patches:
        if patch.name in STATE:
            continue

        def apply(module: ModuleType, patch: Patch = patch) -> None:
            _apply(patch, module, hooks.get(patch.name), allow_unverified)

        STATE[patch.name] = "pending"
        after_import(patch.module, apply)


def after_import(module: str, callback: Callable[[ModuleType], None]) -> None:
    """Calls back with a module: now, if it is imported, or else as soon as it is."""
    if module in sys.modules:
        callback(sys.modules[module])
        return
    _AFTER_IMPORT.waiting.setdefault(module, []).append(callback)
    if _AFTER_IMPORT not in sys.meta_path:
        sys.meta_path.insert(0, _AFTER_IMPORT)


def _apply(patch: Patch, module: ModuleType, hook: str | None, allow_unverified: bool) -> None:
    *path, attribute = patch.symbol.split(".")
    owner: Any = module
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, attribute, None)
    if getattr(original, "__align_spec_patch__", None) == patch.name:
        return
    found = fingerprint(original)
    state = "applied"
    if found not in patch.fingerprints.values():
        import vllm

        message = (
            f"patch {patch.name!r}: {patch.module}.{patch.symbol} of vLLM {vllm.__version__} has fingerprint {found}, "
            f"verified are {dict(patch.fingerprints)}. Use a verified vLLM, upgrade vllm-align-spec, or accept the "
            "risk with VLLM_ALIGN_SPEC_ALLOW_UNVERIFIED=1 in the environment"
        )
        if not allow_unverified:
            raise PatchMismatchError(message)
        logger.warning("%s", message)
        state = f"unverified: {found}"
    filled = None
    if hook is not None:
        function_module, _, function_name = hook.partition(":")
        filled = getattr(importlib.import_module(function_module), function_name)
    replacement = patch.wrap(original, filled)
    replacement.__align_spec_patch__ = patch.name
    setattr(owner, attribute, replacement)
    STATE[patch.name] = state


class _AfterImport(MetaPathFinder):
    """Runs callbacks right after a module of a given name was imported."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        callbacks = self.waiting.pop(fullname, None)
        if callbacks is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _CallbackLoader(spec.loader, callbacks)
        return spec


_AFTER_IMPORT = _AfterImport()


class _CallbackLoader(Loader):
    def __init__(self, loader: Any, callbacks: list[Callable[[ModuleType], None]]) -> None:
        self._loader = loader
        self._callbacks = callbacks

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        # What inspects the module later (pickle, inspect, reload) should see the real loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        for callback in self._callbacks:
            callback(module)
