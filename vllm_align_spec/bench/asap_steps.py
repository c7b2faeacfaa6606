"""Bench `asap` without an engine: what one step costs, on the device and on the host, and as tries grow.

The model is a law over ranks: token (A * latest + B * rank) mod V follows with the probability of its rank. So rows
cost nothing to make, a trie of a million nodes is filled in seconds with strings as a mask would draw them, and
whatever the processor draws goes on in that trie.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from vllm_align_spec.bench.measure import Figure, Result, median, ratios

A, B = 1103, 2654435761
NOT_DRAWN = 4
"""The first ids: three control ids and the end, none of which the grammar allows anywhere."""
LENGTH = 24
"""Tokens of a string."""
SKEW = 2.0
"""P(rank) falls with this power: 1.6 nats a token, as a language model's."""
TRIE = "ab" * 32

VOCABULARIES, ROWS = (4096, 131072), (1, 8, 64)
SIZES = (1_000, 10_000, 100_000, 1_000_000)
LANES = 16
GROWTH_VOCABULARY = 4096
REUSED = 1_000_000
"""Tries from this size on are not built anew for each repeat: a repeat's few hundred nodes make no difference."""

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


class Law:
    """The model and the grammar: every eighth rank is illegal.

    Args:
        vocab: V, a power of two.
        skew: of the probabilities of ranks; 0 makes all equal.
    """

    def __init__(self, vocab: int, skew: float = SKEW) -> None:
        self.vocab = vocab
        rank = np.arange(vocab)
        log_p = -skew * np.log(rank + 1.0)
        self.log_p: Floats = log_p - np.logaddexp.reduce(log_p)
        self.legal = rank % 8 != 7
        masked = np.where(self.legal, np.exp(self.log_p), 0.0)
        self._cdf = masked.cumsum()
        self._back = pow(B, -1, vocab)
        # What follows token 0, twice: every row is a part of it.
        row = np.where(self.legal, self.log_p, -np.inf).astype(np.float32)
        self._row = np.tile(row[self.rank(np.zeros(1, np.int64), rank)], 2)

    def rank(self, latest: Ints, token: Ints) -> Ints:
        """Of a token after another."""
        return (token - A * latest) % self.vocab * self._back % self.vocab

    def draw(self, latest: Ints, rng: np.random.Generator) -> tuple[Ints, Floats]:
        """Legal tokens and log P of each, as a mask alone draws them."""
        token = np.full(latest.shape, -1, np.int64)
        log_p = np.zeros(latest.shape)
        while (open_ := np.flatnonzero(token < NOT_DRAWN)).size:
            rank = np.searchsorted(self._cdf, rng.random(open_.size) * self._cdf[-1], side="right")
            rank = np.minimum(rank, self.vocab - 2)
            token[open_] = (A * latest[open_] + B % self.vocab * rank) % self.vocab
            log_p[open_] = self.log_p[rank]
        return token, log_p

    def legal_mass(self, latest: Ints) -> Floats:
        """P of all legal tokens after each."""
        rank = self.rank(latest[:, None], np.arange(NOT_DRAWN))
        barred = np.where(self.legal[rank], np.exp(self.log_p[rank]), 0.0).sum(1)
        return np.asarray(self._cdf[-1] - barred)

    def rows(self, latest: Ints) -> Any:
        """[S, V] float32 logits after the mask."""
        import torch

        begins = -A * latest % self.vocab
        rows = np.stack([self._row[begin : begin + self.vocab] for begin in begins])
        rows[:, :NOT_DRAWN] = -np.inf
        return torch.from_numpy(rows)


def fill(tries: Any, trie: int, law: Law, nodes: int, seed: int) -> None:
    """Records strings, many at once, until the trie has as many nodes."""
    rng = np.random.default_rng(seed)
    while (missing := nodes - tries.nodes(trie)) > 0:
        strings = max(1, min(4096, missing // LENGTH))
        latest = np.zeros((strings, LENGTH + 1), np.int64)
        latest[:, 0] = NOT_DRAWN
        log_p = np.zeros((strings, LENGTH + 1))
        for j in range(LENGTH):
            latest[:, j + 1], log_p[:, j + 1] = law.draw(latest[:, j], rng)
        token, log_p, unvisited = (x[:, :LENGTH] for x in (latest, log_p, np.log(_masses(law, latest))))
        token[:, 0] = -1
        count = strings * LENGTH
        above = np.arange(count) - 1
        above[::LENGTH] = -1
        nothing = np.full(count, -1)
        tries.record(np.full(count, trie), nothing, above, nothing, token.ravel(), log_p.ravel(), unvisited.ravel())


def _masses(law: Law, latest: Ints) -> Floats:
    return law.legal_mass(latest.ravel()).reshape(latest.shape)


class Stepper:
    """An `AsapProcessor` stepped by hand, as `engine.v1` does it without drafts.

    Args:
        law: the model.
        lanes: requests a step, all of one trie.
        nodes: of the trie before the first step.
    """

    def __init__(self, law: Law, lanes: int, nodes: int = 0, seed: int = 0) -> None:
        import torch

        from vllm_align_spec.options import AsapEngineOptions, EngineOptions
        from vllm_align_spec.processors.asap import AsapProcessor
        from vllm_align_spec.processors.rows import Layout
        from vllm_align_spec.processors.trie import BYTES_PER_NODE

        asap = AsapEngineOptions(max_bytes=BYTES_PER_NODE * (2 * nodes + 200_000), warm_up=True)
        layout = Layout(torch.device("cpu"), lanes, 1, law.vocab, EngineOptions(asap=asap))
        self.processor = AsapProcessor(layout)
        self._law, self._lanes, self._seed = law, lanes, seed << 32
        if nodes:
            tries = self.processor._tries
            fill(tries, tries.open(bytes.fromhex(TRIE)), law, nodes, seed)
        self.begin()

    def begin(self) -> None:
        """New attempts in all lanes."""
        self.processor.reports(range(self._lanes))
        for lane in range(self._lanes):
            self._seed += 1
            self.processor.admit(
                lane,
                {
                    "asap": "adaptive",
                    "align_spec_trie": TRIE,
                    "align_spec_seed": self._seed,
                    "align_spec_length": 1 << 20,
                    "align_spec_min_tokens": 0,
                    "align_spec_temperature": 1.0,
                    "align_spec_stop_ids": [NOT_DRAWN - 1],
                },
                1,
            )
        self.processor.flush()
        self._latest = np.full(self._lanes, NOT_DRAWN, np.int64)
        self._position = 0

    def step(self) -> float:
        """Seconds of a step, what it leaves to the next one's beginning included."""
        import torch

        from vllm_align_spec.processors.rows import Rows

        lanes = np.arange(self._lanes)
        index = torch.arange(self._lanes)[:, None]
        rows = Rows(
            logits=self._law.rows(self._latest),
            index=index,
            count=torch.ones(self._lanes, dtype=torch.int64),
            position=torch.full((self._lanes,), self._position),
            fed=lambda: torch.zeros(self._lanes, dtype=torch.int64),
            draft=torch.full((self._lanes, 1), -1),
            entry_np=lanes,
            unmasked=torch.zeros(self._lanes, 1),
            control=torch.arange(3),
        )
        began = time.perf_counter()
        self.processor.apply(rows)
        self.processor.flush()
        seconds = time.perf_counter() - began
        self._latest = rows.logits.argmax(1).numpy()
        assert (self._latest >= NOT_DRAWN).all(), "every row has a legal token"
        self._position += 1
        return seconds

    def attempts(self) -> list[float]:
        """Seconds of each step of new attempts in all lanes."""
        self.begin()
        return [self.step() for _ in range(LENGTH)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: the barriers of more would measure the machine's other work."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def device_clock() -> Iterator[list[float]]:
    """Seconds of every call of the processor's device function, as they come."""
    from vllm_align_spec.processors import asap

    spent: list[float] = []
    decide = asap.decide

    def timed(*args: Any) -> Any:
        began = time.perf_counter()
        found = decide(*args)
        spent.append(time.perf_counter() - began)
        return found

    try:
        asap.decide = timed  # type: ignore[assignment]
        yield spent
    finally:
        asap.decide = decide


def vllm_sampling(logits: Any, fused: bool) -> float:
    """Seconds that vLLM takes to sample rows without our method.

    Args:
        logits: [S, V] float32.
        fused: with the kernel that vLLM's CPU build has; else softmax and a race of exponentials.
    """
    import torch
    from vllm.v1.sample.ops.topk_topp_sampler import random_sample

    began = time.perf_counter()
    if fused:
        torch.ops._C.fused_gumbel_argmax(logits, torch.randint(0, 2**31, (len(logits),)))
    else:
        random_sample(logits.softmax(-1, dtype=torch.float32), {})
    return time.perf_counter() - began


def normaliser(logits: Any) -> float:
    """Seconds of the log-sum-exp that is taken of every row before the grammar mask."""
    import torch

    from vllm_align_spec.processors.rows import row_logsumexp

    began = time.perf_counter()
    row_logsumexp(logits, torch.arange(len(logits)), torch.ones(len(logits)))
    return time.perf_counter() - began


PARTS = ("device", "host", "normaliser", "sampling", "sampling_fused")


def steps(result: Result, quick: bool, tick: Callable[[], None]) -> None:
    """Device and host part of a step, beside vLLM's sampling of the same rows; microseconds go into the samples."""
    from vllm import _custom_ops

    # The kernel that vLLM's CPU build samples with; other builds have none.
    fused = hasattr(_custom_ops.torch.ops._C, "fused_gumbel_argmax")
    taken: dict[str, dict[str, list[float]]] = result.samples.setdefault("step_us", {})
    for vocab in VOCABULARIES:
        law = Law(vocab)
        repeats = {4096: 60, 131072: 10}[vocab] if quick else {4096: 240, 131072: 40}[vocab]
        for lanes in ROWS:
            stepper = Stepper(law, lanes)
            stepper.attempts()
            found: dict[str, list[float]] = {part: [] for part in PARTS}
            for repeat in range(-2, repeats):
                if repeat % LENGTH == 0:
                    stepper.begin()
                logits = law.rows(stepper._latest)
                with device_clock() as spent:
                    whole = stepper.step()
                device = sum(spent)
                race = vllm_sampling(logits, fused=False)
                kernel = vllm_sampling(logits, fused=True) if fused else race
                if repeat >= 0:
                    for part, seconds in zip(
                        PARTS, (device, whole - device, normaliser(logits), race, kernel), strict=True
                    ):
                        found[part].append(1e6 * seconds)
            name = f"vocabulary {vocab}, {lanes} rows"
            taken[name] = found
            for part in ("device", "host"):
                figure = median(ratios(found[part], found["sampling"]))
                result.figures[f"{part}_ratio_{vocab}_{lanes}"] = figure
            tick()


def growth(result: Result, quick: bool, tick: Callable[[], None]) -> None:
    """Cost per token at every size of a trie, of the processor's whole step and of its trie alone."""
    repeats = 5 if quick else 15
    whole: dict[str, dict[int, list[float]]] = {"narrow": {}, "wide": {}}
    host: dict[int, list[float]] = {size: [] for size in SIZES}
    for shape, skew in (("narrow", SKEW), ("wide", 0.0)):
        law = Law(GROWTH_VOCABULARY, skew)
        of_size = whole[shape] = {size: [] for size in SIZES}
        kept: dict[int, Stepper] = {}
        for repeat in range(-1, repeats):
            for size in SIZES:
                stepper = kept.get(size) or Stepper(law, LANES, size, seed=repeat + 1)
                if size >= REUSED:
                    kept[size] = stepper
                seconds = sum(stepper.attempts())
                if repeat >= 0:
                    of_size[size].append(1e6 * seconds / (LENGTH * LANES))
                if shape == "narrow":
                    alone = _trie_alone(stepper.processor._tries, law, np.random.default_rng(1000 + repeat))
                    if repeat >= 0:
                        host[size].append(1e6 * alone / (LENGTH * LANES))
            tick()
        del kept
        gc.collect()
    result.samples["token_us"] = {shape: {str(n): v for n, v in found.items()} for shape, found in whole.items()}
    result.samples["trie_row_us"] = {str(n): v for n, v in host.items()}
    largest, smallest = SIZES[-1], SIZES[0]
    for name, found, target in (
        ("growth_ratio", whole["narrow"], "<= 1.2"),
        ("growth_ratio_wide", whole["wide"], ""),
        ("growth_ratio_host", host, ""),
    ):
        result.figures[name] = median(ratios(found[largest], found[smallest]), target)
    memory(result)
    tick()


def _trie_alone(tries: Any, law: Law, rng: np.random.Generator) -> float:
    """Seconds that finding nodes, reading children and recording take for new strings in all lanes."""
    trie = tries.open(bytes.fromhex(TRIE))
    latest = np.full(LANES, NOT_DRAWN, np.int64)
    parent, token, log_p = np.full(LANES, -1, np.int32), np.full(LANES, -1, np.int64), np.zeros(LANES)
    of_trie, no_row = np.full(LANES, trie), np.full(LANES, -1)
    total = 0.0
    for j in range(LENGTH):
        began = time.perf_counter()
        node = tries.root(of_trie) if j == 0 else tries.child(parent, token)
        offsets, _, _, child_log_p = tries.children(node)
        total += time.perf_counter() - began
        sums = np.concatenate([[0.0], np.exp(child_log_p).cumsum()])
        unvisited = np.log(np.maximum(law.legal_mass(latest) - np.diff(sums[offsets]), 1e-300))
        began = time.perf_counter()
        parent = tries.record(of_trie, node, no_row, parent, token, log_p, unvisited)
        total += time.perf_counter() - began
        latest, log_p = law.draw(latest, rng)
        token = latest
    return total


def memory(result: Result) -> None:
    """Bytes a node: what the tries count, and what the process grew by."""
    import psutil

    from vllm_align_spec.processors.trie import BYTES_PER_NODE, Tries

    law = Law(GROWTH_VOCABULARY)
    tries = Tries(BYTES_PER_NODE * (SIZES[-1] + 2 * SIZES[-2]))
    fill(tries, tries.open(b"what filling itself takes"), law, SIZES[-2], 0)
    trie = tries.open(bytes.fromhex(TRIE))
    gc.collect()
    before, nodes = psutil.Process().memory_info().rss, tries.nodes_used
    fill(tries, trie, law, SIZES[-1], 1)
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    result.figures["bytes_per_node"] = exactly(tries.bytes_used / tries.nodes_used)
    result.figures["bytes_per_node_resident"] = exactly(grown / (tries.nodes_used - nodes))


def exactly(value: float, target: str = "") -> Figure:
    """A figure that is counted and has no spread."""
    return Figure(value, value, value, target)


def middles(samples: Sequence[Sequence[float]]) -> tuple[list[float], list[list[float]]]:
    """Medians for a plot, and the distances to the ends of their intervals."""
    points = [median(values) for values in samples]
    return [p.value for p in points], [[p.value - p.low for p in points], [p.high - p.value for p in points]]
