"""Weak-to-strong decoding, the switch (arXiv 2506.07434, section 3). Steering: it changes what the model says.

A small aligned pilot drafts the opening of a response; the large base model takes over as soon as it agrees::

    g_i = (p_{i-w+1} * ... * p_i) ** (1/w)        0 while i + 1 < w
    switch after the first i with g_i >= gamma;   the whole draft is kept if there is none

p_i is the base model's untempered probability of the pilot's i-th token. In the engine the pilot is the speculative
draft model: a row whose draft belongs to the opening becomes one-hot on it, so verification accepts it with certainty,
and as long as no switch came, no token follows the last draft. From the switch on rows are free, and the same pilot
goes on as an ordinary, lossless drafter.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from vllm_align_spec.options import MAX_STOP_IDS, MAX_WINDOW
from vllm_align_spec.processors.rows import Layout, Processor, Rows, force, token_logprobs

_Entries = np.ndarray[Any, np.dtype[np.int64]]

TOLERANCE = 1e-6
"""The published rule is inclusive; sums of logarithms in float64 miss equality for 143 of 999 values of gamma."""


def switch_index(probabilities: Sequence[float], *, gamma: float = 0.8, window: int = 6) -> int:
    """Index of the last draft token kept: the first i whose windowed geometric mean reaches gamma, else the last one.

    Args:
        probabilities: the base model's probability of each draft token, in order.
        gamma: threshold in (0, 1].
        window: tokens in the mean, at least 1.

    Returns:
        0-based index; -1 for an empty draft.
    """
    bound = window * (math.log(gamma) - TOLERANCE)
    logs = [math.log(p) if p > 0 else -math.inf for p in probabilities]
    for i in range(window - 1, len(logs)):
        # Summed anew each time: a running sum cannot forget a -inf.
        if sum(logs[i - window + 1 : i + 1]) >= bound:
            return i
    return len(logs) - 1


REASONS = ("drafting", "switched", "max_draft", "pilot_end", "interrupted", "failed")
"""Why the opening ended; ``drafting`` if the response ended before it did."""
_DRAFTING, _SWITCHED, _MAX_DRAFT, _PILOT_END, _INTERRUPTED, _FAILED = range(len(REASONS))

# Columns of the constants that admission writes; stop ids follow.
_PROMPT, _FIRST, _WINDOW, _MAX = range(4)
STEP_CAPACITY = 1024
"""Steps of a response whose boundaries the report itemises."""


class WsdProcessor(Processor):
    """The switch, for all requests of a step at once. The rule of each row is in METHODS order: (a), (b), (c)."""

    method: ClassVar[str] = "wsd"
    drafter: ClassVar[bool] = True
    grammar: ClassVar[bool] = False
    control: ClassVar[bool] = False
    observes: ClassVar[bool] = True

    def __init__(self, layout: Layout) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=layout.device)

        entries = layout.entries
        self._constants = zeros(entries, 4 + MAX_STOP_IDS, dtype=torch.int64)
        self._log_gamma = zeros(entries, dtype=torch.float64)
        self._reason = zeros(entries, dtype=torch.int64)
        self._kept = zeros(entries, dtype=torch.int64)
        self._window = zeros(entries, MAX_WINDOW, dtype=torch.float64)  # log p of the latest draft tokens
        self._steps = zeros(entries, dtype=torch.int64)
        # Tokens already out when step j began; the last column takes what does not count.
        self._starts = zeros(entries, STEP_CAPACITY + 1, dtype=torch.int32)
        self._columns = torch.arange(max(layout.rows, MAX_WINDOW), device=layout.device)
        self._in_window = self._columns[:MAX_WINDOW] - MAX_WINDOW
        self._staged: dict[int, tuple[list[int], float, int]] = {}
        # The host's view of which openings have ended. It may lag behind the device, never run ahead of it.
        self._ended = np.zeros(entries, dtype=bool)
        self._admissions = np.zeros(entries, dtype=np.int64)
        self._in_flight: deque[tuple[torch.cuda.Event, _Entries, _Entries, torch.Tensor]] = deque()

    def admit(self, entry: int, arguments: Mapping[str, Any], prompt_len: int) -> None:
        """``prompt_len`` counts the inner request's prompt, whose last token was held back to be forced first."""
        stops = list(arguments["align_spec_stop_ids"])
        first, window, bound = (arguments[k] for k in ("align_spec_first_token", "wsd_window", "wsd_max_draft"))
        constants = [prompt_len, first, window, bound]
        padding = [-2] * (MAX_STOP_IDS - len(stops))
        self._staged[entry] = (constants + stops + padding, math.log(arguments["wsd_gamma"]), _DRAFTING)
        self._ended[entry] = False
        self._admissions[entry] += 1

    def abandon(self, entry: int) -> None:
        """Ends the opening where it is."""
        if entry in self._staged:
            constants, log_gamma, _ = self._staged[entry]
            self._staged[entry] = (constants, log_gamma, _FAILED)
        else:
            self._reason[entry] = _FAILED
        self._ended[entry] = True

    def flush(self) -> None:
        """One copy to the device for all requests admitted since the last step."""
        if not self._staged:
            return
        device = self._reason.device
        entries = torch.tensor(list(self._staged), device=device)
        rows = list(self._staged.values())
        self._constants[entries] = torch.tensor([row[0] for row in rows], device=device)
        self._log_gamma[entries] = torch.tensor([row[1] for row in rows], dtype=torch.float64, device=device)
        self._reason[entries] = torch.tensor([row[2] for row in rows], device=device)
        for state in (self._kept, self._steps, self._window):
            state[entries] = 0
        self._staged.clear()

    def observe(self, entry: torch.Tensor, position: torch.Tensor, counted: torch.Tensor) -> None:
        """Notes where in the response each engine step began."""
        out = position - self._constants[entry, _PROMPT]
        begun = counted & (out >= 0)
        steps = self._steps[entry]
        self._starts[entry, torch.where(begun, steps.clamp(max=STEP_CAPACITY - 1), STEP_CAPACITY)] = out.int()
        self._steps[entry] = steps + begun

    def active(self, entry: _Entries) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Requests whose opening has not ended, as far as the host knows."""
        while self._in_flight and self._in_flight[0][0].query():
            _, entries, admissions, reason = self._in_flight.popleft()
            same_request = self._admissions[entries] == admissions
            self._ended[entries] |= same_request & (reason.numpy() != _DRAFTING)
        return ~self._ended[entry]

    def apply(self, rows: Rows) -> torch.Tensor:
        """Forces the opening's rows and finds the switch; see `rows.Processor.apply`."""
        entry = rows.entry
        constants, reason_before, kept = self._constants[entry], self._reason[entry], self._kept[entry]
        window = constants[:, _WINDOW, None]
        out = rows.position - constants[:, _PROMPT]  # -1 until the held-back prompt token is out again
        counted = rows.count > 0
        first = counted & (out < 0)
        # Forced tokens that did not come out (a step that the scheduler took back) end the opening.
        drafting = counted & (out >= 0) & (reason_before == _DRAFTING)
        lost = drafting & (out != kept)

        drafts = rows.draft.shape[1] - 1
        token = rows.draft[:, :drafts]
        r = self._columns[:drafts]
        i = out[:, None] + r
        log_p = token_logprobs(rows.logits, rows.index[:, :drafts], token).double()

        # (a) the opening ends before a stop id, a masked token, or a row without a usable draft.
        is_stop = (token[:, :, None] == constants[:, None, 4:]).any(-1)
        opening = ((log_p > -math.inf) & ~is_stop).cumprod(1).bool()
        # (c) switch after the first i whose windowed mean reaches gamma, or at the draft's bound.
        history = torch.cat([self._window[entry], torch.where(opening, log_p, 0.0)], 1)
        recent = history.unfold(1, MAX_WINDOW, 1)[:, 1:] * (self._in_window >= -window)[:, None]
        mean = recent.sum(-1) / window
        reached = opening & (i >= window - 1) & (mean >= self._log_gamma[entry, None] - TOLERANCE)
        switch = reached | (opening & (i >= constants[:, _MAX, None] - 1))
        # Rows 0 .. n-1 belong to the opening in this step.
        up_to_switch = switch.cumsum(1) - switch.long() == 0
        n = (opening & up_to_switch).sum(1) * (drafting & ~lost)
        switched = switch.any(1)
        goes_on = drafting & ~lost & ~switched & (rows.count > 1) & (n == rows.count - 1)

        broken_by = rows.draft.gather(1, n[:, None])[:, 0]  # -1 where no usable draft stands
        reason = torch.where(broken_by >= 0, _PILOT_END, _INTERRUPTED)
        by_gamma = (reached & up_to_switch).any(1)
        reason = torch.where(switched, torch.where(by_gamma, _SWITCHED, _MAX_DRAFT), reason)
        reason = torch.where(lost, _INTERRUPTED, reason)
        reason = torch.where(drafting & ~goes_on, reason, reason_before)

        # (b) one-hot rows; the first row of a response gives back the prompt token that was held back.
        forced = self._columns[: drafts + 1] < torch.where(first, 1, n)[:, None]
        tokens = torch.where(first[:, None], constants[:, _FIRST, None], rows.draft)
        force(rows.logits, rows.index, forced, tokens)

        self._window[entry] = history.gather(1, self._columns[:MAX_WINDOW] + n[:, None])
        self._kept[entry] = kept + n
        self._reason[entry] = reason
        self._mirror(rows.entry_np, reason)
        return torch.where(goes_on, n, torch.where(first, 1, drafts + 1))

    def _mirror(self, entries: _Entries, reason: torch.Tensor) -> None:
        if not reason.is_cuda:
            self._ended[entries] = reason.numpy() != _DRAFTING
            return
        host = torch.empty(reason.shape, dtype=reason.dtype, pin_memory=True)
        host.copy_(reason, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._in_flight.append((event, entries, self._admissions[entries], host))

    def reports(self, entries: Sequence[int]) -> list[dict[str, Any]]:
        """Reason, draft tokens kept, engine steps and where each began, one dictionary a request."""
        which = list(entries)
        columns = (self._reason, self._kept, self._steps, self._starts)
        return [
            {"reason": REASONS[reason], "kept": kept, "steps": steps, "starts": starts[: min(steps, STEP_CAPACITY)]}
            for reason, kept, steps, starts in zip(*(column[which].tolist() for column in columns), strict=True)
        ]
