"""ASAp, the request's side: grammar-aligned sampling (arXiv 2405.21047; ``exact``: CARS, arXiv 2510.01902). Steering.

A choice is one lane: attempts one after the other, each an inner request whose rows the worker draws
(`processors.asap`), until one is not abandoned. Nothing of an attempt leaves before it is complete, because an
abandoned one is nobody's response.

``adaptive`` abandons an attempt only where no token is left, ``exact`` also where thinning says so, and a choice that
runs out of attempts fails. ``weighted`` makes one attempt a choice; with v = H0 W of each (0 if abandoned),

    Z^ = mean of v        the probability that the model obeys the grammar, +- s / sqrt(N)
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import statistics
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

from vllm_align_spec.options import MAX_STOP_IDS, AsapOptions, OptionError
from vllm_align_spec.strategies.base import Chunk, Engine, EngineFacts, Notes, Request, StrategyError

_SEEDS = 2**63


class AsapStrategy:
    """All modes of ASAp."""

    method: ClassVar[str] = "asap"
    control: ClassVar[bool] = True
    structured: ClassVar[bool] = True
    adapters: ClassVar[bool] = True

    def admit(self, request: Request, engine: EngineFacts) -> None:
        """Refuses whatever makes the base distribution another one than the model's at its temperature, or the
        language another one than the grammar's up to the bound on the length.

        Raises:
            OptionError: names what stands in the way and what would be accepted.
        """
        options: AsapOptions = request.option(AsapOptions)
        if request.grammar is None:
            raise OptionError(
                f"asap={options.asap!r} needs a grammar; accepted: response_format of type json_schema or json_object, "
                "or structured_outputs with json, regex, choice, grammar or structural_tag",
                "asap",
            )
        if request.temperature <= 0:
            raise OptionError(
                f"temperature={request.temperature:g} cannot be combined with asap, which samples; accepted: "
                "temperature > 0, or drop asap",
                "temperature",
            )
        for what, instead in {**request.truncates, **request.bends}.items():
            raise OptionError(f"{what} cannot be combined with asap; {instead}", what.partition("=")[0])
        for name, value, is_set in (
            ("ignore_eos", True, request.ignore_eos),
            ("stop", list(request.stop_strings), bool(request.stop_strings)),
        ):
            if is_set:
                raise OptionError(
                    f"{name}={value!r} cannot be combined with asap: the grammar says where a response ends; drop it",
                    name,
                )
        if len(request.stop_token_ids) > MAX_STOP_IDS:
            raise OptionError(
                f"asap with {len(request.stop_token_ids)} stop token ids, those of the model included; "
                f"accepted: at most {MAX_STOP_IDS}",
                "stop_token_ids",
            )
        for name, found, accepted, bad in (
            ("rejection_sample_method", engine.rejection_method, "'standard'", engine.rejection_method != "standard"),
            ("verification", "adaptive", "of all drafts", not engine.fixed_draft_length),
            ("enable_batch_sharded_sampling", True, "False", engine.shards_sampling),
            ("reasoning_parser", "set", "none, or --structured-outputs-config.enable_in_reasoning", engine.reasoning),
            ("control ids", "none to spare", "additional_config.align_spec.control_ids", not engine.control_ids),
        ):
            if bad:
                raise OptionError(f"asap cannot run on this engine: {name}={found!r}; accepted: {accepted}", "asap")

    async def run(self, request: Request, engine: Engine, notes: Notes) -> AsyncGenerator[Chunk, None]:
        """One choice.

        Raises:
            StrategyError: no attempt of the request's only choice was accepted; says how many were made and what is
                known of the probability that the model obeys the grammar.
        """
        options: AsapOptions = request.option(AsapOptions)
        notes["mode"] = options.asap
        most = 1 if options.asap == "weighted" else options.asap_max_attempts
        for attempt in range(most):
            notes["attempts"] = attempt + 1
            token_ids: list[int] = []
            logprobs: list[Any] = []
            inner = engine.generate(
                request.prompt_token_ids,
                max_tokens=request.max_tokens,
                min_tokens=0,  # the worker sees to it
                drawn=True,
                whole=True,
                arguments={
                    **options.model_dump(exclude={"asap_max_attempts", "align_spec_strict"}),
                    "align_spec_trie": trie_key(request),
                    "align_spec_seed": attempt_seed(request.seed, attempt),
                    "align_spec_length": request.max_tokens,
                    "align_spec_min_tokens": request.min_tokens,
                    "align_spec_temperature": request.temperature,
                    "align_spec_stop_ids": list(request.stop_token_ids),
                },
            )
            async with aclosing(inner) as chunks:
                async for chunk in chunks:
                    if chunk.control is not None:
                        break
                    token_ids += chunk.token_ids
                    logprobs += chunk.logprobs or ()
                    if chunk.finish_reason is not None:
                        notes["accepted"] = True
                        yield Chunk(
                            token_ids, logprobs or None, chunk.finish_reason, chunk.stop_reason, source=chunk.source
                        )
                        return
        found = [report for report in await engine.worker_reports() if report is not None]
        instead = {"exact": "asap='adaptive', more asap_max_attempts, ", "adaptive": "more asap_max_attempts, "}
        error = (
            f"asap={options.asap!r}: no attempt of {most} was accepted. The model obeys this grammar within "
            f"{request.max_tokens} tokens {likelihood(found)}; accepted: {instead.get(options.asap, '')}"
            "more max_tokens, or a grammar that the model is likelier to obey"
        )
        if request.n == 1:
            raise StrategyError(error)
        yield Chunk([], None, "abort", error)  # the other choices are none the worse for it

    def report(
        self, notes: Notes, workers: Sequence[Mapping[str, Any] | None], tokens: int, emitted: int
    ) -> dict[str, Any]:
        """Attempts, their fate, and the log importance weight of the accepted one."""
        known = [worker for worker in workers if worker is not None and "state" in worker]
        last = known[-1] if known else {}
        attempts = notes.get("attempts", 0)
        accepted = bool(notes.get("accepted"))
        report = {
            "mode": notes["mode"],
            "attempts": attempts,
            "acceptance": round(1 / attempts, 6) if accepted else 0.0,
            "rejected": sum(worker["state"] == "rejected" for worker in known),
            "dead_ends": sum(worker["state"] == "dead_end" for worker in known),
            "log_weight": last.get("log_v") if accepted else None,
            "log_h0": [worker["log_h0"] for worker in known],
            "log_mass_at_root": last.get("log_mass_at_root"),
            "nodes_added": sum(worker["nodes_added"] for worker in known),
            "host_ms": round(sum(worker["host_ms"] for worker in known), 3),
            "rows": sum(worker["rows"] for worker in known),
            "store": last.get("store"),
        }
        if error := next((worker["error"] for worker in workers if worker is not None and "error" in worker), None):
            report |= {"error": error, "reason": "failed"}
        return report

    def conclude(self, reports: Sequence[dict[str, Any]]) -> None:
        """``weighted``: the estimate of Z from all choices, whose number was fixed before any was drawn."""
        if not reports or reports[0]["mode"] != "weighted" or not all(r["complete"] for r in reports):
            return
        v = [0.0 if r["log_weight"] is None else math.exp(r["log_weight"]) for r in reports]
        estimate = {
            "n": len(v),
            "sum_v": math.fsum(v),
            "sum_v2": math.fsum(x * x for x in v),
            "z": statistics.fmean(v),
            "z_standard_error": statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else None,
        }
        squares = estimate["sum_v2"]
        estimate["effective_sample_size"] = estimate["sum_v"] ** 2 / squares if squares else 0.0  # type: ignore[operator]
        for report in reports:
            report["estimate"] = estimate


def trie_key(request: Request) -> str:
    """Digest of everything that P(w) and the language depend on; requests that agree in it share a trie.

    The engine's part (model, revision, dtype) is the same for all requests of a worker, and stands in the header of a
    saved trie. ``scope`` holds the cache salt: tenants that do not share prefixes do not share tries either.
    """
    parts = [
        list(request.prompt_token_ids),
        request.grammar,
        sorted(request.stop_token_ids),
        float(request.temperature).hex(),
        request.max_tokens,
        request.min_tokens,
        request.scope,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def attempt_seed(seed: int | None, attempt: int) -> int:
    """Seed of one attempt: unpredictable, or a function of the choice's own seed."""
    if seed is None:
        return secrets.randbelow(_SEEDS)
    digest = hashlib.blake2b(f"{seed}/{attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _SEEDS


def likelihood(attempts: Sequence[Mapping[str, Any]]) -> str:
    """What attempts that all failed say of Z: the trie's bound, and Z < 3 / sum(1 / H0) with 95% confidence."""
    if not attempts:
        return "with a probability that nobody knows"
    bounds = [attempt["log_mass_at_root"] for attempt in attempts]
    if None in bounds:
        return "never (probability 0)"
    inverse = math.fsum(math.exp(-attempt["log_h0"]) for attempt in attempts if attempt["log_h0"] is not None)
    text = f"with probability at most {math.exp(min(bounds)):.3g}"
    return f"{text} (with 95% confidence at most {3 / inverse:.3g})" if inverse > 3 else text
