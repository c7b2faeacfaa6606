"""Prometheus metrics, fed in the API server from finished requests and their reports.

Created at first use, in whatever mode vLLM set prometheus_client up for: in a single API server they stand in its
registry, with several of them in vLLM's multi-process directory, and ``/metrics`` shows both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from vllm_align_spec.options import METHODS

_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """All collectors of one API server process. Use `metrics`.

    Args:
        counter: prometheus_client's class, or one that is made and used like it.
        gauge: as above.
        histogram: as above.
    """

    def __init__(self, counter: Any = Counter, gauge: Any = Gauge, histogram: Any = Histogram) -> None:
        self.requests = counter(
            "align_spec:requests", "Requests that used a method, by how they ended.", ("method", "outcome")
        )
        self.refused = counter(
            "align_spec:refused", "Requests refused at admission, by the option at fault.", ("option",)
        )
        self.method_failures = counter(
            "align_spec:method_failures",
            "Choices whose method, pilot or judge failed; their report says what followed.",
            ("method",),
        )
        self.wsd_opening_tokens = histogram(
            "align_spec:wsd_opening_tokens", "Draft tokens kept as a response's opening.", buckets=(0, *_TOKENS)
        )
        self.wsd_switch = counter("align_spec:wsd_switch", "Openings, by why they ended.", ("reason", "mode"))
        self.wsd_tokens_per_forward = histogram(
            "align_spec:wsd_tokens_per_forward",
            "Response tokens per forward pass of the target.",
            buckets=(1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 11),
        )
        self.wsd_time_to_first_token = histogram(
            "align_spec:wsd_time_to_first_token_seconds", "From admission to the first token sent.", buckets=_SECONDS
        )
        self.wsd_pilot = histogram(
            "align_spec:wsd_pilot_seconds", "Time that a hand-over spent waiting for its pilot.", buckets=_SECONDS
        )
        self.wsd_pilot_errors = counter("align_spec:wsd_pilot_errors", "Hand-overs whose pilot did not deliver.")
        self.asap_attempts = histogram(
            "align_spec:asap_attempts",
            "Attempts of a choice, accepted or not.",
            ("mode",),
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096),
        )
        self.asap_failed = counter("align_spec:asap_exhausted", "Choices without an accepted attempt.", ("mode",))
        self.asap_mass_at_root = histogram(
            "align_spec:asap_mass_at_root",
            "Bound on the probability that the model obeys the grammar, when a choice ended.",
            buckets=(1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1),
        )
        self.asap_host = histogram(
            "align_spec:asap_host_seconds",
            "Host time per row of a choice's attempts.",
            buckets=(1e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3, 0.1),
        )
        self.asap_nodes = gauge("align_spec:asap_nodes", "Nodes of all tries.", multiprocess_mode="mostrecent")
        self.asap_bytes = gauge("align_spec:asap_bytes", "Bytes of all tries.", multiprocess_mode="mostrecent")
        self.asap_evictions = gauge(
            "align_spec:asap_evictions", "Tries evicted since the worker started.", multiprocess_mode="mostrecent"
        )
        self.asap_shared_bytes = counter(
            "align_spec:asap_shared_bytes", "Of tries exchanged with other replicas: sent, received.", ("direction",)
        )
        self.asap_share_failures = counter(
            "align_spec:asap_share_failures", "Exchanges with other replicas that failed; this one went on alone."
        )
        self.guided_rows = counter(
            "align_spec:guided_rows", "Rows of logits that a companion bent, drafts included.", ("method",)
        )
        self.guided_unanswered = counter(
            "align_spec:guided_unanswered", "Rows where a companion's answer was no finite number.", ("method",)
        )
        self.cards_segments = counter(
            "align_spec:cards_segments",
            "Candidates of segments, by their fate: accepted, taken as the best of all, rejected, not needed.",
            ("fate",),
        )
        self.cards_tries = histogram(
            "align_spec:cards_tries",
            "Candidates until a segment was accepted.",
            buckets=(1, 2, 3, 4, 6, 8, 12, 16, 20, 21),
        )
        self.cards_segment_tokens = histogram(
            "align_spec:cards_segment_tokens",
            "Tokens of an accepted segment.",
            buckets=(4, 6, 8, 12, 16, 24, 32, 48, 63, 64),
        )
        self.sampled_tokens = counter(
            "align_spec:sampled_tokens", "Tokens that the engine made for responses that a judge chose.", ("method",)
        )
        self.delivered_tokens = counter(
            "align_spec:delivered_tokens", "Tokens of those responses that clients received.", ("method",)
        )
        self.judge_calls = histogram(
            "align_spec:judge_calls",
            "Answers judged for one response.",
            ("method",),
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096),
        )
        self.judge_seconds = histogram(
            "align_spec:judge_seconds", "Time of one scoring, waiting included.", ("judge",), buckets=_SECONDS
        )
        self.judge_answers = counter("align_spec:judge_answers", "Answers that a judge scored.", ("judge",))
        self.judge_failures = counter(
            "align_spec:judge_failures", "Scorings that brought no reward, by why.", ("judge", "reason")
        )
        self.judge_open = gauge(
            "align_spec:judge_open",
            "1 while a judge is not asked because it failed.",
            ("judge",),
            multiprocess_mode="mostrecent",
        )
        self.reports_stored = gauge(
            "align_spec:reports_stored", "Reports that can be read now.", multiprocess_mode="livesum"
        )
        self.grammar_bytes = gauge(
            "align_spec:verified_grammar_bytes",
            "Bytes of grammars that need not be verified again.",
            multiprocess_mode="livesum",
        )
        self.report_calls = counter("align_spec:report_calls", "Calls that asked the workers for reports.")
        self.report_calls_failed = counter("align_spec:report_calls_failed", "Those of them that failed.")
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        # A series that appears with its first event has no rate at that moment, so an alert would miss it.
        for options in METHODS:
            self.method_failures.labels(options.method)
            for outcome in ("completed", "cancelled", "failed"):
                self.requests.labels(options.method, outcome)
        for mode in ("adaptive", "exact", "weighted"):
            self.asap_attempts.labels(mode)
            self.asap_failed.labels(mode)
        for direction in ("sent", "received"):
            self.asap_shared_bytes.labels(direction)
        for method in ("args", "dera", "pad", "genarm"):
            self.guided_rows.labels(method)
            self.guided_unanswered.labels(method)
        for fate in ("accepted", "best", "rejected", "surplus"):
            self.cards_segments.labels(fate)
        for method in ("cards", "bon", "deal"):
            self.sampled_tokens.labels(method)
            self.delivered_tokens.labels(method)
            self.judge_calls.labels(method)

    def know_judge(self, name: str) -> None:
        """Its series begin at zero."""
        self.judge_open.labels(name).set(0)
        self.judge_seconds.labels(name)
        self.judge_answers.labels(name)
        for reason in ("timeout", "failed", "nonsense", "busy", "refused"):
            self.judge_failures.labels(name, reason)

    def observe_choice(self, report: Mapping[str, Any]) -> None:
        """Counts one choice's report, as `strategies.base.Strategy.report` made it."""
        if report.get("reason") == "failed":
            self.method_failures.labels(report["method"]).inc()
        if report["method"] == "wsd":
            self._observe_wsd(report)
        elif report["method"] == "asap":
            self._observe_asap(report)
        elif "companions" in report:
            self.guided_rows.labels(report["method"]).inc(report["rows"] or 0)
            self.guided_unanswered.labels(report["method"]).inc(report["unanswered"] or 0)
        elif "judge_calls" in report:
            self._observe_judged(report)

    def _observe_asap(self, report: Mapping[str, Any]) -> None:
        self.asap_attempts.labels(report["mode"]).observe(report["attempts"])
        if report["outcome"] != "cancelled" and not report["acceptance"]:
            self.asap_failed.labels(report["mode"]).inc()
        if (store := report["store"]) is None:
            return
        mass = report["log_mass_at_root"]
        self.asap_mass_at_root.observe(0.0 if mass is None else math.exp(mass))
        self.asap_host.observe(report["host_ms"] / 1e3 / max(report["rows"], 1))
        self.asap_nodes.set(store["nodes"])
        self.asap_bytes.set(store["bytes"])
        self.asap_evictions.set(store["evictions"])

    def _observe_judged(self, report: Mapping[str, Any]) -> None:
        method = report["method"]
        self.judge_calls.labels(method).observe(report["judge_calls"])
        self.sampled_tokens.labels(method).inc(report["sampled_tokens"])
        self.delivered_tokens.labels(method).inc(report["response_tokens"])
        for fate, count in report.get("candidates", {}).items():
            self.cards_segments.labels(fate).inc(count)
        for segment in report.get("segments", ()):
            self.cards_tries.observe(segment["tries"])
            self.cards_segment_tokens.observe(segment["tokens"])

    def _observe_wsd(self, report: Mapping[str, Any]) -> None:
        if report["reason"] is not None:
            self.wsd_switch.labels(report["reason"], report["mode"]).inc()
            self.wsd_opening_tokens.observe(report["draft_tokens_kept"])
        if report["tokens_per_forward"] is not None:
            self.wsd_tokens_per_forward.observe(report["tokens_per_forward"])
        if report["first_token_ms"] is not None:
            self.wsd_time_to_first_token.observe(report["first_token_ms"] / 1e3)
        if "pilot_ms" in report:
            self.wsd_pilot.observe(report["pilot_ms"] / 1e3)
            if report["reason"] == "failed":
                self.wsd_pilot_errors.inc()


_kinds: list[Any] = []


def collect_with(counter: Any, gauge: Any, histogram: Any) -> None:
    """Says, before anyone calls `metrics`, what this process collects with instead of prometheus_client."""
    _kinds[:] = counter, gauge, histogram


@cache
def metrics() -> Metrics:
    """The process's collectors, created by the first caller."""
    return Metrics(*_kinds)
