"""Methods that steer by a companion in the worker, the request's side: which companion, and can it follow. Steering.

The rows are bent in the worker (`processors.args`, `dera`, `genarm`, `pad`); here one inner request is launched for
each choice and handed on as it comes.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

from vllm_align_spec.options import ArgsOptions, DeraOptions, GenarmOptions, OptionError, PadOptions
from vllm_align_spec.strategies.base import Chunk, Engine, EngineFacts, Notes, Request

BLOCK = 32
"""Prompt tokens that one digest stands for, as in `companion.model`."""

GuidedOptions = ArgsOptions | DeraOptions | GenarmOptions | PadOptions


class GuidedStrategy:
    """One of the methods over a companion.

    Args:
        options: its request options.
    """

    method: str
    control: ClassVar[bool] = False
    structured: ClassVar[bool] = True
    adapters: ClassVar[bool] = False

    def __init__(self, options: type[GuidedOptions]) -> None:
        self.method = options.method
        self._options = options

    def admit(self, request: Request, engine: EngineFacts) -> None:
        """Refuses what cannot be honoured.

        Raises:
            OptionError: names what stands in the way and what would be accepted.
        """
        options: GuidedOptions = request.option(self._options)
        for what, instead in request.bends.items():
            raise OptionError(f"{what} cannot be combined with {self.method}; {instead}", what.partition("=")[0])
        for name, found, accepted, bad in (
            ("rejection_sample_method", engine.rejection_method, "'standard'", engine.rejection_method != "standard"),
            ("enable_batch_sharded_sampling", True, "False", engine.shards_sampling),
        ):
            if bad:
                raise OptionError(
                    f"{self.method} cannot run on this engine: {name}={found!r}; accepted: {accepted}", self.method
                )
        names = companions(options, engine)
        for name in names:
            longest = len(prompt(name, options, request, engine)) + request.max_tokens
            limit = engine.companions[name].max_len
            if longest > limit:
                raise OptionError(
                    f"max_tokens={request.max_tokens} behind this prompt make {longest} tokens, and companion "
                    f"{name!r} follows {limit}; accepted: a shorter prompt, or fewer max_tokens",
                    "max_tokens",
                )
        if isinstance(options, ArgsOptions):
            most = min(engine.companions[name].max_candidates for name in names)
            if options.args_top_k > most:
                raise OptionError(
                    f"args_top_k={options.args_top_k} is not accepted; accepted: 1 to {most} on this server "
                    "(max_candidates of its companions)",
                    "args_top_k",
                )

    async def run(self, request: Request, engine: Engine, notes: Notes) -> AsyncGenerator[Chunk, None]:
        """One choice, one inner request."""
        options: GuidedOptions = request.option(self._options)
        names = companions(options, engine.facts)
        notes["companions"] = names
        told: dict[str, dict[str, Any]] = {}
        for name in names:
            tokens = prompt(name, options, request, engine.facts)
            told[name] = {"prefix": digests(tokens, request.scope)}
            if tokens is not request.prompt_token_ids:
                told[name]["prompt"] = list(tokens)
        arguments = {
            **options.model_dump(exclude={"align_spec_strict", "pad_persona"}),
            "align_spec_companions": told,
        }
        if isinstance(options, ArgsOptions):
            given = options.weights
            arguments["args_weight"] = given * len(names) if len(given) == 1 else given
        inner = engine.generate(
            request.prompt_token_ids, max_tokens=request.max_tokens, min_tokens=request.min_tokens, arguments=arguments
        )
        async with aclosing(inner) as chunks:
            async for chunk in chunks:
                yield chunk

    def report(
        self, notes: Notes, workers: Sequence[Mapping[str, Any] | None], tokens: int, emitted: int
    ) -> dict[str, Any]:
        """The companions, and in how many rows they were heard."""
        worker = next((worker for worker in workers if worker is not None), {})
        report = {
            "companions": notes.get("companions"),
            "rows": worker.get("rows"),
            "unanswered": worker.get("unanswered"),
            "preempted": worker.get("preempted"),
        }
        if "error" in worker:
            report |= {"error": worker["error"], "reason": "failed"}
        return report

    def conclude(self, reports: Sequence[dict[str, Any]]) -> None:
        """Choices have nothing to do with each other."""


def companions(options: GuidedOptions, engine: EngineFacts) -> list[str]:
    """Names of the companions that a request uses: those that it names, or the only one of the right role.

    Raises:
        OptionError: unknown, of another role, or not clear which.
    """
    role = "reward" if isinstance(options, ArgsOptions) else "lm"
    key = "args_reward" if isinstance(options, ArgsOptions) else f"{options.method}_model"
    there = sorted(name for name, one in engine.companions.items() if one.role == role)
    if not there:
        raise OptionError(
            f"{options.method} needs a companion with the role {role!r}, and this server has none; accepted: a server "
            "started with one in additional_config.align_spec.companions",
            options.method,
        )
    given = options.rewards if isinstance(options, ArgsOptions) else [getattr(options, key) or ""]
    named = [name for name in given if name] or there
    if named is there and len(there) > 1:
        raise OptionError(f"{key} is missing; accepted: {' | '.join(map(repr, there))}", key)
    for name in named:
        if name not in there:
            raise OptionError(f"{key}={name!r} is not accepted; accepted: {' | '.join(map(repr, there))}", key)
    return list(named)


def prompt(name: str, options: GuidedOptions, request: Request, engine: EngineFacts) -> Sequence[int]:
    """Token ids of the prompt as a companion reads it: the target's own; or, where a persona stands in front or the
    companion has other tokens, as its chat template or tokenizer writes it.

    Raises:
        OptionError: a persona for a prompt that is no conversation.
    """
    persona = options.pad_persona if isinstance(options, PadOptions) else None
    if persona is not None and request.messages is None:
        raise OptionError(
            f"pad_persona={persona[:40]!r} needs chat messages; accepted: a chat completion, or no pad_persona",
            "pad_persona",
        )
    if persona is None and not engine.companions[name].bridged:
        return request.prompt_token_ids
    return engine.render(name, persona, request)


def digests(tokens: Sequence[int], scope: str) -> list[int]:
    """One number for each whole block of a prompt, which stands for everything before it too: equal ones, equal
    beginnings. Tenants with different cache salts have different ones."""
    found = []
    state = hashlib.blake2b(scope.encode(), digest_size=8)
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        state.update(b"".join(int(token).to_bytes(4, "little") for token in tokens[end - BLOCK : end]))
        found.append(int.from_bytes(state.copy().digest(), "little") >> 1)
    return found
