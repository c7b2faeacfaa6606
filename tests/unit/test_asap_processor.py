"""ASAp's processor: the laws on the CPU, the worked example of the method's paper, corner cases, and statistics."""

import hashlib
import math
import random
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from asap_laws import (
    KEY,
    OTHER_KEY,
    AsapLaws,
    Engine,
    Feed,
    World,
    Written,
    assert_same_snapshot,
    snapshot,
    thinned,
    uniforms,
)

from vllm_align_spec.options import AsapEngineOptions, EngineOptions
from vllm_align_spec.processors.asap import AsapProcessor
from vllm_align_spec.processors.rows import Layout


class TestOnTheCpu(AsapLaws):
    pass


# The worked example -------------------------------------------------------------------------------------------------


class Zeros(World):
    """``"00000" | "1" [01] [01] [01] [01]`` and a model that hardly ever goes on with zeros."""

    def __init__(self):
        super().__init__("zeros", tokens=2, length=6)

    def z(self, prefix):
        p = [0.45, 0.45, 0.1]
        if len(prefix) == 5:
            p = [0.0, 0.0, 1.0]
        elif prefix and not any(prefix):
            p = [0.1, 0.8, 0.1]
        return [math.log(x) if x else -math.inf for x in p] + [-math.inf] * 3

    def allows(self, prefix, token):
        return len(prefix) < 5 and (not prefix or prefix[0] == 1 or token == 0)

    def accepts(self, prefix):
        return len(prefix) == 5


def seed_that_begins_with(engine, token):
    """A seed whose first uniform lets a fresh trie draw a token."""
    cdf = np.exp(engine.world.believed((), {})[1]).cumsum()
    return next(
        seed
        for seed in range(1000)
        if np.searchsorted(cdf, uniforms(np.array([seed], np.uint64), np.array([0], np.uint64))[0]) == token
    )


ZEROS = (0, 0, 0, 0, 0, 2)


def test_the_papers_example_comes_out_as_computed_by_hand():
    engine = Engine(Zeros())
    world = engine.world
    assert len(world.language) == 17
    assert world.mass == pytest.approx(0.29529, rel=1e-6)
    assert world.truth()[ZEROS] == pytest.approx(1.5239e-4, rel=1e-4)
    assert [p for w, p in world.truth().items() if w[0] == 1] == pytest.approx([0.0624905] * 16, rel=1e-5)
    assert world.next_law({})[ZEROS] == pytest.approx(0.5)

    lane = engine.drive(engine.launch("adaptive", seed_that_begins_with(engine, 0)))
    assert lane.out == ZEROS
    engine.check_report(lane)
    c = {u: math.exp(node[2]) for u, node in snapshot(engine.processor, KEY).items()}
    assert c[(0,)] == pytest.approx(1e-4, rel=1e-5)
    assert c[()] == pytest.approx(0.450045, rel=1e-5)
    engine.step([Feed(engine.launch("adaptive", 0))])
    assert math.exp(engine.trace[-1].log_q[0]) == pytest.approx(9.999e-5, rel=1e-4)


# Corner cases -------------------------------------------------------------------------------------------------------


def run_many(engine, mode, count, draft=lambda lane: ()):
    """Attempts one after the other: how each ended, and its report."""
    found = []
    for seed in range(count):
        lane = engine.drive(engine.launch(mode, seed), draft)
        found.append((lane, engine.check_report(lane)))
    return found


def test_two_tokenisations_of_one_string_are_two_leaves():
    engine = Engine(Written(3, [(0, 1), (2,)], tokens=3, length=4))  # say 0 is "a", 1 is "b" and 2 is "ab"
    world = engine.world
    assert world.language.keys() == {(0, 1, 3), (2, 3)}
    outs = {lane.out for lane, _ in run_many(engine, "exact", 40)}
    assert outs >= world.language.keys()
    known = snapshot(engine.processor, KEY)
    assert known.keys() == {(), (0,), (0, 1), (2,)}
    assert known[()][2] == pytest.approx(math.log(world.mass), abs=1e-5)


@pytest.mark.parametrize("mode", ["adaptive", "exact", "weighted"])
def test_a_dead_end_is_met_once_and_then_never_again(mode):
    """The mask lets 1, 1 begin a response; nothing completes it."""
    engine = Engine(Written(1, [(0,)], blind=[(1, 1), (2,)], tokens=3, length=4))
    found = run_many(engine, mode, 60)
    met = Counter(lane.out for lane, report in found if report["state"] == "dead_end")
    assert met
    assert met.keys() <= {(1, 1), (2,)}
    assert set(met.values()) == {1}
    assert snapshot(engine.processor, KEY)[(2,)][2] == -math.inf
    assert found[-1][1]["log_mass_at_root"] == pytest.approx(math.log(engine.world.mass), abs=1e-5)


@pytest.mark.parametrize("mode", ["adaptive", "exact", "weighted"])
def test_a_language_of_the_empty_response_alone_needs_one_row(mode):
    engine = Engine(Written(0, [()], length=3))
    for lane, report in run_many(engine, mode, 5):
        assert (lane.out, report["state"], report["rows"]) == ((3,), "completed", 1)
        assert report["log_v"] == pytest.approx(float(engine.world.log_p(())[3]), abs=1e-5)
        assert report["nodes_added"] == (lane.seed == 0)


@pytest.mark.parametrize("mode", ["adaptive", "exact", "weighted"])
def test_a_grammar_that_accepts_nothing_within_the_bound_ends_every_attempt_and_says_so(mode):
    engine = Engine(Written(0, [(0, 0, 0, 0)], blind=[(1, 0, 1, 1)], tokens=2, length=4))
    found = run_many(engine, mode, 20)
    assert all(lane.ended == "ABANDON" for lane, _ in found)
    assert all(report["log_v"] is None for _, report in found)
    *_, (last, report) = found
    assert (last.out, report["rows"]) == ((), 1)  # by now the root is known for a dead end
    assert report["log_mass_at_root"] is None
    assert report["log_h0"] is None


@pytest.mark.parametrize(("shortest", "wanted"), [(0, {0, 1, 2}), (1, {1, 2}), (2, {2}), (3, set())])
def test_min_tokens_and_the_bound_cut_the_language_at_both_ends(shortest, wanted):
    class Rambling(Written):
        def z(self, prefix):
            return [2.0] + [0.0] * (self.vocab - 1)

    world = Rambling(0, [(0,) * n for n in range(6)], tokens=1, length=3, shortest=shortest)
    engine = Engine(world)
    found = run_many(engine, "exact", 40)
    assert {len(lane.out) - 1 for lane, report in found if report["state"] == "completed"} == wanted
    assert {len(w) - 1 for w in world.language} == wanted


def test_an_abandoned_attempt_ends_as_failed_at_its_next_row_and_is_not_taken_in():
    engine = Engine(World(2025, temperature=0.7), rows=3)
    lane, other = engine.launch("exact", 5), engine.launch("adaptive", 6)
    engine.processor.abandon(lane.entry)
    lane.doomed = True
    engine.step([Feed(lane, (0, 1)), Feed(other)])
    assert lane.ended == "FAILED"
    engine.drive(other)
    assert engine.check_report(lane)["state"] == "failed"
    assert engine.check_report(other)["state"] in ("completed", "dead_end")
    assert engine.processor._tries.nodes_used == len({row.prefix for row in engine.trace})


def test_an_unfinished_prefill_gets_nothing_and_notes_nothing():
    engine = Engine(World(2025, temperature=0.7))
    lane = engine.launch("exact", 5)
    for _ in range(3):
        engine.step([Feed(lane, None)])
    assert snapshot(engine.processor, KEY) == {}
    engine.drive(lane)
    assert engine.check_report(lane)["rows"] == len(lane.out)


def test_the_nodes_that_attempts_added_are_those_that_are_there():
    """Also where two of them met a new prefix in one step."""
    engine = Engine(World(2025, temperature=0.7))
    lanes = [engine.launch("adaptive", seed) for seed in range(6)]
    while any(lane.ended is None for lane in lanes):
        engine.step([Feed(lane) for lane in lanes if lane.ended is None])
    reports = [engine.check_report(lane) for lane in lanes]
    assert sum(report["nodes_added"] for report in reports) == reports[-1]["store"]["nodes"]


def test_a_finished_attempt_gives_its_trie_up_and_an_unfinished_one_keeps_it():
    """Room for one attempt's path only: the other tenant's nodes go when nobody needs them, not sooner."""
    world = Written(0, [(0, 0)], tokens=1, length=3)
    engine = Engine(world, max_nodes=3)
    lane = engine.launch("adaptive", 1)
    engine.drive(lane)
    other = engine.drive(engine.launch("adaptive", 1, OTHER_KEY))
    assert engine.report(other)["store"]["evictions"] == 0
    assert engine.report(lane)["store"]["nodes"] == 3
    engine.drive(engine.launch("adaptive", 1, OTHER_KEY))
    engine.processor._settle()
    assert engine.processor._tries.evictions == 1
    assert snapshot(engine.processor, KEY) == {}
    assert len(snapshot(engine.processor, OTHER_KEY)) == 3


def layout(folder, world, **arguments):
    options = EngineOptions(asap=AsapEngineOptions(save_path=str(folder), max_bytes=2**16))
    arguments = {"identity": {"model": "m", "revision": "1"}, **arguments}
    return Layout(torch.device("cpu"), 8, 4, world.vocab, options, **arguments)


def test_tries_outlive_the_worker_where_the_operator_named_a_folder(tmp_path):
    world = World(2025, temperature=0.7)
    engine = Engine(world, layout=layout(tmp_path, world))
    run_many(engine, "adaptive", 5)
    known = snapshot(engine.processor, KEY)
    engine.processor.close()
    assert_same_snapshot(snapshot(AsapProcessor(layout(tmp_path, world)), KEY), known)
    other = layout(tmp_path, world, identity={"model": "m", "revision": "2"})
    assert snapshot(AsapProcessor(other), KEY) == {}


def test_only_the_keeper_among_the_ranks_saves(tmp_path):
    world = World(2025, temperature=0.7)
    engine = Engine(world, layout=layout(tmp_path, world, keeper=False))
    run_many(engine, "adaptive", 1)
    engine.processor.close()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_costs_the_saved_tries_and_nothing_else(tmp_path):
    world = World(2025, temperature=0.7)
    engine = Engine(world, layout=layout(tmp_path, world))
    run_many(engine, "adaptive", 1)
    engine.processor.close()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    assert snapshot(AsapProcessor(layout(tmp_path, world)), KEY) == {}


def test_saved_tries_with_tokens_beyond_the_vocabulary_are_not_taken(tmp_path):
    """The file's name and header say which model it is for; its token ids are indices into rows."""
    world = World(2025, temperature=0.7)
    engine = Engine(world, layout=layout(tmp_path, world))
    run_many(engine, "adaptive", 5)
    engine.processor.close()
    smaller = SimpleNamespace(vocab=2)
    assert snapshot(AsapProcessor(layout(tmp_path, smaller)), KEY) == {}


def test_a_ratio_above_one_is_banked_for_the_rows_that_follow_and_no_longer():
    """Rounding makes them; without the bank, what it adds to a response's probability would be lost."""

    def ask(ratios, bank, coins, first=False):
        alive, _, banks = thinned(
            torch.tensor([ratios], dtype=torch.float64).log(),
            torch.zeros(1, len(ratios), dtype=torch.float64),
            torch.tensor([first]),
            torch.tensor([bank], dtype=torch.float64).log(),
            torch.tensor([coins], dtype=torch.float64).log(),
        )
        return alive[0].tolist(), banks[0].exp().tolist()

    assert ask([1.25, 0.8, 0.5], 1.0, [0.999, 0.999, 0.49]) == ([True] * 3, pytest.approx([1.25, 1.0, 1.0]))
    assert ask([1.25, 0.8, 0.5], 1.0, [0.999, 0.999, 0.51])[0] == [True, True, False]
    assert ask([0.5, 0.5], 1.5, [0.74, 0.49]) == ([True, True], pytest.approx([1.0, 1.0]))
    assert ask([0.5, 0.5], 1.5, [0.76, 0.51])[0] == [False, False]
    assert ask([0.3, 0.5], 1.0, [0.999, 0.49], first=True) == ([True, True], pytest.approx([1.0, 1.0]))
    assert ask([0.0, 1.0], 1.0, [1e-9, 0.5], first=True)[0][0] is False


def test_uniforms_depend_on_seed_and_counter_alone_and_are_uniform():
    seeds, counters = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(64, dtype=np.uint64))
    u = uniforms(seeds, counters)
    assert np.array_equal(u[5, 7], uniforms(np.array([7], np.uint64), np.array([5], np.uint64))[0])
    assert len(np.unique(u)) == u.size
    observed = np.histogram(u, bins=64, range=(0, 1))[0]
    assert upper_tail(observed, np.full(64, u.size / 64)) > 1e-4
    for a, b in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:])):  # neighbours in position, neighbours in seed
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / math.sqrt(a.size)


def test_uniforms_never_reach_their_bounds():
    """The seeds for which SplitMix64 gives its largest and its smallest number, found by running it backwards."""
    for largest, z in ((True, 2**64 - 1), (False, 0)):
        z ^= (z >> 31) ^ (z >> 62)
        z = z * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
        z ^= (z >> 27) ^ (z >> 54)
        z = z * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
        z ^= (z >> 30) ^ (z >> 60)
        seed = np.array([(z - 0x9E3779B97F4A7C15) % 2**64], np.uint64)
        u = uniforms(seed, np.array([0], np.uint64))[0]
        assert 0.0 < u < 1.0
        assert (u > 0.5) == largest


# Statistics ---------------------------------------------------------------------------------------------------------
# On fixed seeds, so that they pass or fail once and for all.

WORLD = World(2025, temperature=0.7)
"""38 responses of 1 to 5 tokens, Z = 0.09, dead ends; a mask alone is 0.54 in total variation from the truth."""


def upper_tail(observed, expected):
    """p-value of chi-squared."""
    statistic = float(((observed - expected) ** 2 / expected).sum())
    halves = torch.tensor([(len(expected) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


@dataclass
class Fit:
    p: float  # chi-squared
    distance: float  # total variation
    limit: float  # its 99.9% quantile if the samples were from the truth

    @property
    def good(self):
        return self.p >= 1e-4 and self.distance < self.limit


def fit(samples, truth):
    """Holds samples against a law."""
    n, responses = len(samples), sorted(truth, key=lambda w: truth[w])
    counts = Counter(samples)
    assert counts.keys() <= truth.keys()
    p = np.array([truth[w] for w in responses])
    observed = np.array([counts[w] for w in responses])
    resampled = np.random.default_rng(1).multinomial(n, p / p.sum(), size=5000) / n
    limit = float(np.quantile(np.abs(resampled - p).sum(1) / 2, 0.999))
    cells, pool = [], np.zeros(2)
    for o, e in zip(observed, n * p, strict=True):  # from the rarest: what is below 8 is pooled
        pool += (o, e)
        if pool[1] >= 8:
            cells.append(pool)
            pool = np.zeros(2)
    cells[-1] = cells[-1] + pool
    assert len(cells) >= 5
    return Fit(upper_tail(*np.array(cells).T), float(np.abs(observed / n - p).sum() / 2), limit)


def guess(lane):
    """What a drafter would offer, which knows the model, not the trie's uniforms: its best legal tokens."""
    out, found = lane.out, []
    for _ in range(3):
        legal = WORLD.legal(out)
        if not legal.any():
            break
        found.append(int(np.where(legal, WORLD.log_p(out), -np.inf).argmax()))
        if found[-1] in WORLD.ends:
            break
        out = (*out, found[-1])
    return tuple(found)


@dataclass
class Choice:
    """A choice of one request."""

    key: str
    number: int
    attempts: int = 0
    response: tuple[int, ...] = ()


def sample(mode, *, tries, lanes, choices, attempts=10**6, seed=0, processor=AsapProcessor, drafted=False):
    """Requests with ``choices`` choices each, one a fresh trie, of which ``lanes`` run at once in random interleaving.

    Returns:
        for each request, its choices in the order in which they finished; and all reports.
    """
    rng = random.Random(f"{seed} {mode} {tries} {lanes}")
    engine = Engine(WORLD, rows=4, entries=tries * lanes, processor=processor, checked=False)
    keys = [hashlib.sha256(f"{seed} {i}".encode()).hexdigest() for i in range(tries)]
    waiting = {key: [Choice(key, number) for number in reversed(range(choices))] for key in keys}
    finished = {key: [] for key in keys}
    reports, live = [], []

    def launch(choice):
        choice.attempts += 1
        live.append((engine.launch(mode, rng.getrandbits(63), choice.key), choice))

    for key in keys:
        for _ in range(min(lanes, choices)):
            launch(waiting[key].pop())
    while live:
        share = 1.0 if lanes == 1 else rng.uniform(0.2, 1.0)
        chosen = [lane for lane, _ in live if rng.random() < share]
        if not chosen:
            continue
        engine.step([Feed(lane, guess(lane) if drafted and rng.random() < 0.7 else ()) for lane in chosen])
        ended = [(lane, choice) for lane, choice in live if lane.ended is not None]
        live = [(lane, choice) for lane, choice in live if lane.ended is None]
        if not ended:
            continue
        reports += [
            {**report, "out": lane.out}
            for report, (lane, _) in zip(
                engine.processor.reports([lane.entry for lane, _ in ended]), ended, strict=True
            )
        ]
        for lane, choice in ended:
            engine.free.append(lane.entry)
            if lane.ended == "ABANDON" and choice.attempts < attempts:
                launch(choice)
                continue
            choice.response = lane.out
            finished[choice.key].append(choice)
            if waiting[choice.key]:
                launch(waiting[choice.key].pop())
    return list(finished.values()), reports


def in_launch_order(requests, first=None):
    return [
        choice.response
        for finished in requests
        for choice in sorted(finished, key=lambda choice: choice.number)[:first]
    ]


class ThinsBeforeExpanding(AsapProcessor):
    """The mutant: reads h_used of a row from the trie as it is now, not as it was when the row's token was drawn."""

    def apply(self, rows):
        self._settle()
        e = rows.entry_np
        place = self._place[e]
        now = self._tries.log_c(self._tries.child(place["parent"], place["token"]))
        self._place["log_h"][e] = np.where(place["out"] > 0, now, 0.0)
        return super().apply(rows)


def test_exact_with_one_lane_samples_the_model_given_the_grammar():
    requests, _ = sample("exact", tries=400, lanes=1, choices=4)
    found = fit(in_launch_order(requests), WORLD.truth())
    assert found.good, found


def test_exact_with_32_lanes_on_one_trie_samples_it_too():
    requests, _ = sample("exact", tries=50, lanes=32, choices=32)
    found = fit(in_launch_order(requests), WORLD.truth())
    assert found.good, found


def test_exact_with_drafts_samples_it_too():
    requests, _ = sample("exact", tries=50, lanes=32, choices=32, drafted=True)
    found = fit(in_launch_order(requests), WORLD.truth())
    assert found.good, found


def test_the_same_test_rejects_adaptive():
    for lanes, tries, choices in ((1, 400, 4), (32, 50, 32)):
        requests, _ = sample("adaptive", tries=tries, lanes=lanes, choices=choices)
        found = fit(in_launch_order(requests), WORLD.truth())
        assert not found.good, found


def test_the_same_test_rejects_thinning_by_what_the_trie_says_now():
    requests, _ = sample("exact", tries=50, lanes=32, choices=32, processor=ThinsBeforeExpanding)
    found = fit(in_launch_order(requests), WORLD.truth())
    assert not found.good, found


def test_the_same_test_rejects_delivering_whatever_finishes_first():
    requests, _ = sample("exact", tries=200, lanes=32, choices=32)
    right = fit(in_launch_order(requests, 8), WORLD.truth())
    first = fit([choice.response for finished in requests for choice in finished[:8]], WORLD.truth())
    assert right.good, right
    assert not first.good, first


@pytest.mark.parametrize("drafted", [False, True])
def test_weighted_estimates_the_mass_and_its_weights_reproduce_the_truth(drafted):
    _, reports = sample("weighted", tries=100, lanes=8, choices=24, attempts=1, drafted=drafted)
    n = len(reports)
    assert n == 2400
    v = np.array([0.0 if report["log_v"] is None else math.exp(report["log_v"]) for report in reports])
    assert abs(v.mean() - WORLD.mass) < 4 * v.std(ddof=1) / math.sqrt(n)
    distance = 0.0
    for response, p in WORLD.language.items():
        mine = np.where([report["out"] == response for report in reports], v, 0.0)
        if p / WORLD.mass * n >= 8:
            assert abs(mine.mean() - p) < 4 * mine.std(ddof=1) / math.sqrt(n), response
        distance += abs(mine.sum() / v.sum() - p / WORLD.mass) / 2
    assert distance < 0.06


def test_adaptive_comes_ever_closer_and_passes_importance_resampling():
    checkpoints, tries = (0, 5, 25, 100, 400), 8
    engine = Engine(WORLD, entries=tries, checked=False)
    keys = [hashlib.sha256(f"adaptive {i}".encode()).hexdigest() for i in range(tries)]
    truth, distances, drawn = WORLD.truth(), [], 0
    for checkpoint in checkpoints:
        while drawn < checkpoint:
            lanes = [engine.launch("adaptive", 1000 * drawn + i, key) for i, key in enumerate(keys)]
            drawn += 1
            while live := [lane for lane in lanes if lane.ended is None]:
                engine.step([Feed(lane) for lane in live])
            for lane in lanes:
                engine.report(lane)
        distances.append(
            np.mean([variation({u: n[2] for u, n in snapshot(engine.processor, key).items()}, truth) for key in keys])
        )
    mask_alone, resampled = variation({}, truth), resampling(10, truth)
    assert distances[0] == pytest.approx(mask_alone)
    assert all(later < sooner for sooner, later in pairwise(distances)), distances
    assert resampled < mask_alone
    assert distances[-1] < min(0.02, resampled / 3), (distances, resampled)


def variation(log_c, truth):
    """Total variation between the truth and the next response that an adaptive lane completes."""
    law = WORLD.next_law(log_c)
    total = sum(law.values())
    return sum(abs(law[w] / total - truth[w]) for w in truth) / 2


def resampling(draws, truth):
    """The same for so many samples of a mask alone, of which one is chosen by its importance."""
    law, responses = WORLD.next_law({}), list(truth)
    q = np.array([*(law[w] for w in responses), 1 - sum(law.values())])
    weight = np.array([*(WORLD.language[w] / law[w] for w in responses), 0.0])
    chosen = np.random.default_rng(0).choice(len(q), p=q / q.sum(), size=(100_000, draws))
    weights = weight[chosen]
    weights = weights[weights.sum(1) > 0] / weights.sum(1, keepdims=True)[weights.sum(1) > 0]
    found = np.bincount(chosen[weight[chosen].sum(1) > 0].ravel(), weights.ravel(), len(q))[:-1] / len(weights)
    return float(np.abs(found - [truth[w] for w in responses]).sum() / 2)
