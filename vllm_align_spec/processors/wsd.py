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
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from vllm_align_spec.options import MAX_STOP_IDS, MAX_WINDOW
from vllm_align_spec.processors.rows import Layout, Rows, force, token_logprobs

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

# Columns of the constants that admission writes.
_PROMPT, _FIRST, _WINDOW, _MAX = range(4)
# Columns of the state that steps write.
_REASON, _KEPT, _STEPS = range(3)
STEP_CAPACITY = 1024
"""Steps of a response whose boundaries the report itemises."""


class WsdProcessor:
    """The switch, for all requests of a step at once. The rule of each row is in METHODS order: (a), (b), (c)."""

    method: ClassVar[str] = "wsd"

    def __init__(self, layout: Layout) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=layout.device)

        entries = layout.entries
        self._constants = zeros(entries, 4 + MAX_STOP_IDS, dtype=torch.int64)
        self._log_gamma = zeros(entries, dtype=torch.float64)
        self._state = zeros(entries, 3, dtype=torch.int64)
        self._window = zeros(entries, MAX_WINDOW, dtype=torch.float64)  # log p of the latest draft tokens
        self._starts = zeros(entries, STEP_CAPACITY, dtype=torch.int32)  # tokens already out when step j began
        self._columns = torch.arange(max(layout.rows, MAX_WINDOW), device=layout.device)
        self._staged: dict[int, tuple[list[int], float, int]] = {}

    def admit(self, entry: int, arguments: Mapping[str, Any], prompt_len: int) -> None:
        """``prompt_len`` counts the inner request's prompt, whose last token was held back to be forced first."""
        stops = list(arguments["align_spec_stop_ids"])
        constants = [prompt_len, arguments["align_spec_first_token"], arguments["wsd_window"], arguments["wsd_max_draft"]]
        padding = [-2] * (MAX_STOP_IDS - len(stops))
        self._staged[entry] = (constants + stops + padding, math.log(arguments["wsd_gamma"]), _DRAFTING)

    def abandon(self, entry: int) -> None:
        """Ends the opening where it is."""
        if entry in self._staged:
            constants, log_gamma, _ = self._staged[entry]
            self._staged[entry] = (constants, log_gamma, _FAILED)
        else:
            self._state[entry, _REASON] = _FAILED

    def flush(self) -> None:
        """One copy to the device for all requests admitted since the last step."""
        if not self._staged:
            return
        device = self._state.device
        entries = torch.tensor(list(self._staged), device=device)
        rows = list(self._staged.values())
        self._constants[entries] = torch.tensor([row[0] for row in rows], device=device)
        self._log_gamma[entries] = torch.tensor([row[1] for row in rows], dtype=torch.float64, device=device)
        self._state[entries] = torch.tensor([[row[2], 0, 0] for row in rows], device=device)
        self._window[entries] = 0.0
        self._staged.clear()

    def apply(self, rows: Rows) -> torch.Tensor | None:
        """Forces the opening's rows and finds the switch; see `rows.Processor.apply`."""
        entry = rows.entry
        constants, state = self._constants[entry], self._state[entry]
        kept_before = rows.position - constants[:, _PROMPT]  # -1 until the held-back prompt token is out again
        counted = rows.count > 0
        begun = counted & (kept_before >= 0)

        step = state[:, _STEPS].clamp(max=STEP_CAPACITY - 1)
        self._starts[entry, step] = torch.where(begun, kept_before, self._starts[entry, step]).to(torch.int32)

        drafts = rows.draft.shape[1] - 1
        drafting = begun & (state[:, _REASON] == _DRAFTING)
        window = constants[:, _WINDOW, None]
        token = rows.draft[:, :drafts]
        log_p = token_logprobs(rows.logits, rows.index[:, :drafts], token).double()
        r = self._columns[:drafts]
        i = kept_before[:, None] + r

        # (a) the opening ends before a stop id, a masked token, or a row without a usable draft.
        is_stop = (token[:, :, None] == constants[:, None, 4:]).any(-1)
        opening = ((token >= 0) & ~is_stop & (log_p > -math.inf)).cumprod(1).bool()
        # (c) switch after the first i whose windowed mean reaches gamma, or at the draft's bound.
        log_p = torch.where(opening, log_p, 0.0)
        history = torch.cat([self._window[entry], log_p], 1)
        in_window = self._columns[:MAX_WINDOW] >= MAX_WINDOW - window
        mean = (history.unfold(1, MAX_WINDOW, 1)[:, 1:] * in_window[:, None]).sum(-1) / window
        reached = opening & (i >= window - 1) & (mean >= self._log_gamma[entry, None] - TOLERANCE)
        bounded = opening & (i >= constants[:, _MAX, None] - 1)
        switch = reached | bounded
        # Rows 0 .. n-1 belong to the opening in this step.
        before_switch = switch.cumsum(1) - switch.long() == 0
        n = (opening & before_switch).sum(1)
        switched = switch.any(1)
        unbroken = n == (rows.count - 1).clamp(min=0)

        reason = torch.where((reached & before_switch).any(1), _SWITCHED, _MAX_DRAFT)
        if drafts:
            broken_by = token.gather(1, n.clamp(max=drafts - 1)[:, None])[:, 0]
        else:
            broken_by = torch.full_like(n, -1)
        reason = torch.where(switched, reason, torch.where(broken_by >= 0, _PILOT_END, _INTERRUPTED))
        goes_on = drafting & ~switched & unbroken & (rows.count > 1)
        # Tokens that were forced but did not come out (a step that the scheduler took back) end the opening too.
        lost = drafting & (kept_before != state[:, _KEPT])
        reason = torch.where(lost, _INTERRUPTED, reason)
        n = torch.where(drafting & ~lost, n, 0)
        goes_on &= ~lost

        # (b) one-hot rows; the first row of a response gives back the prompt token that was held back.
        first = counted & (kept_before < 0)
        forced = torch.cat([r < n[:, None], torch.zeros_like(first[:, None])], 1)
        forced[:, 0] |= first
        tokens = rows.draft.clone()
        tokens[:, 0] = torch.where(first, constants[:, _FIRST], tokens[:, 0])
        force(rows.logits, rows.index, forced, tokens)

        shifted = self._columns[:MAX_WINDOW] + n[:, None]
        self._window[entry] = history.gather(1, shifted)
        ended = drafting & ~goes_on
        state[:, _REASON] = torch.where(ended, reason, state[:, _REASON])
        state[:, _KEPT] += n
        state[:, _STEPS] += begun.long()
        self._state[entry] = state
        return torch.where(goes_on, n, torch.where(first, 1, rows.draft.shape[1]))

    def reports(self, entries: Sequence[int]) -> list[dict[str, Any]]:
        """Reason, draft tokens kept, engine steps and where each began, one dictionary a request."""
        state = self._state[list(entries)].tolist()
        starts = self._starts[list(entries)].tolist()
        return [
            {"reason": REASONS[reason], "kept": kept, "steps": steps, "starts": row[: min(steps, STEP_CAPACITY)]}
            for (reason, kept, steps), row in zip(state, starts, strict=True)
        ]
