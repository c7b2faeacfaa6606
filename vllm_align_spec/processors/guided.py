"""What the methods over a companion share: how its requests come and go, and how a row is bent by what it says."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from vllm_align_spec.processors.rows import Layout, Processor, Rows, send

_Entries = np.ndarray[Any, np.dtype[np.int64]]


class Guided(Processor):
    """A method that follows its requests with companions.

    Its arguments hold, besides its options, ``align_spec_companions``: for each of them by name its ``prefix`` (digests
    of its prompt, see `companion.model.Companion.enter`) and, where it is not the target's, its ``prompt`` (token ids).
    """

    drafter: ClassVar[bool] = False
    grammar: ClassVar[bool] = False
    control: ClassVar[bool] = False
    follows: ClassVar[bool] = True

    def __init__(self, layout: Layout) -> None:
        self.companions = layout.companions
        self.device = layout.device
        entries = layout.entries
        self._arguments: dict[int, Mapping[str, Any]] = {}
        self._prompt_len = np.zeros(entries, dtype=np.int64)
        self._off = np.zeros(entries, dtype=bool)
        self._entered = np.zeros(entries, dtype=np.int64)  # times that it came into the batch
        self.constants = torch.zeros(entries, self.width, device=layout.device)  # per request, see `constants_of`
        self._uses = {name: np.zeros(entries, dtype=bool) for name in self.companions}
        self._staged: dict[int, Sequence[float]] = {}
        # Rows bent, and rows where the companion's answer was no number.
        self.counts = torch.zeros(entries, 2, dtype=torch.int64, device=layout.device)

    width: ClassVar[int]
    """Numbers that a request's options come down to on the device."""

    @abstractmethod
    def constants_of(self, arguments: Mapping[str, Any]) -> Sequence[float]:
        """``width`` numbers."""

    def admit(self, entry: int, arguments: Mapping[str, Any], prompt_len: int) -> None:
        """Keeps the arguments for `enter`."""
        unknown = [name for name in arguments["align_spec_companions"] if name not in self.companions]
        if unknown:
            raise KeyError(f"the worker has no companion {', '.join(unknown)}")
        self._arguments[entry] = arguments
        self._prompt_len[entry] = prompt_len
        self._off[entry] = False
        self._entered[entry] = 0
        for name, uses in self._uses.items():
            uses[entry] = name in arguments["align_spec_companions"]
        self._staged[entry] = self.constants_of(arguments)

    def enter(self, entry: int, tokens: torch.Tensor) -> None:
        """Tells the companions what precedes the token that the target is fed next."""
        arguments = self._arguments[entry]
        self._entered[entry] += 1
        tokens = tokens.to(self.device)
        prompt_len = int(self._prompt_len[entry])
        for name, told in arguments["align_spec_companions"].items():
            prompt = tokens[:prompt_len]
            if "prompt" in told:
                prompt = torch.tensor(told["prompt"], dtype=torch.int64, device=self.device)
            self.companions[name].enter(entry, prompt, tokens[prompt_len:], prompt_len, told["prefix"])

    def leave(self, entry: int) -> None:
        """Gives the companions' slots back."""
        for name in self._arguments.get(entry, {}).get("align_spec_companions", ()):
            self.companions[name].leave(entry)

    def abandon(self, entry: int) -> None:
        """Decodes plainly from here on."""
        self._off[entry] = True
        self.leave(entry)

    def flush(self) -> None:
        """Sends the constants of new requests, and lets the companions read what is new to them."""
        if self._staged:
            entries = torch.tensor(list(self._staged), device=self.device)
            self.constants[entries] = torch.tensor([list(v) for v in self._staged.values()], device=self.device)
            self.counts[entries] = 0
            self._staged.clear()
        for companion in self.companions.values():
            companion.prepare()

    def active(self, entry: _Entries) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """All requests but those whose companion lost them."""
        for name, companion in self.companions.items():
            self._off[entry] |= self._uses[name][entry] & ~companion.knows(entry)
        on: np.ndarray[Any, np.dtype[np.bool_]] = ~self._off[entry]
        return on

    def by_companion(self, entry: _Entries) -> dict[str, _Entries]:
        """Companion -> which of these requests it follows, as indices into ``entry``; only those that follow any."""
        found = {name: np.flatnonzero(uses[entry]) for name, uses in self._uses.items()}
        return {name: which for name, which in found.items() if which.size}

    def reports(self, entries: Sequence[int]) -> list[dict[str, Any]]:
        """Rows bent, rows without an answer, and what went wrong."""
        counts = self.counts[list(entries)].tolist()
        reports: list[dict[str, Any]] = []
        for entry, (rows, unanswered) in zip(entries, counts, strict=True):
            report = {
                "rows": rows,
                "unanswered": unanswered,
                "preempted": max(0, int(self._entered[entry]) - 1),
                "companions": list(self._arguments[entry]["align_spec_companions"]),
            }
            if unanswered:
                report["error"] = f"the companion's answer was not finite in {unanswered} rows, which decoded plainly"
            elif self._off[entry]:
                report["error"] = "the companion lost the request, which decoded plainly from there on"
            reports.append(report)
        return reports


class Realigned(Guided):
    """A method that bends whole rows by the next-token logits of one language model."""

    @abstractmethod
    def bend(
        self, target: torch.Tensor, companion: torch.Tensor, constants: torch.Tensor, entries: _Entries
    ) -> torch.Tensor:
        """The method's formula.

        Args:
            target: [R, V] the target's logits; -inf where masked.
            companion: [R, V] the companion's.
            constants: [R, width].
            entries: of the requests that these rows belong to, on the host.

        Returns:
            [R, V]; what is masked in ``target`` does not matter.
        """

    def apply(self, rows: Rows) -> None:
        """Bends every row; see `rows.Processor.apply`."""
        chain = rows.chain()
        requests, width = rows.index.shape
        vocabulary = rows.logits.shape[1]
        for name, which in self.by_companion(rows.entry_np).items():
            whole = len(which) == requests
            at = send(which, self.device)
            position, count, fed, index, entry = (
                values if whole else values[at] for values in (rows.position, rows.count, chain, rows.index, rows.entry)
            )
            companion: Any = self.companions[name]  # never a bridged one: they have other logits
            said = companion.logits(rows.entry_np[which], position, count, fed).flatten(0, 1)
            if said.shape[1] < vocabulary:  # what only the target has is padding
                said = torch.nn.functional.pad(said, (0, vocabulary - said.shape[1]), value=-torch.inf)
            lines = index.reshape(-1)
            target = rows.logits.index_select(0, lines)
            constants = self.constants[entry].repeat_interleave(width, 0)
            bent = self.bend(target, said[:, :vocabulary], constants, rows.entry_np[which])
            bent = torch.where(target > -torch.inf, bent, target)
            answered = (bent < torch.inf).all(1) & (bent > -torch.inf).any(1)
            rows.logits.index_copy_(0, lines, torch.where(answered[:, None], bent, target))
            real = torch.arange(width, device=self.device) < count[:, None]
            unanswered = (real & ~answered.view(real.shape)).sum(1)
            self.counts[entry] += torch.stack([count, unanswered], 1)
