"""The tries of ASAp against a dictionary, against enumeration, at their bounds, and through a file."""

import math
import os
import random
import resource
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from vllm_align_spec.processors import loops, trie_file
from vllm_align_spec.processors import trie as trie_module
from vllm_align_spec.processors.trie import BYTES_PER_NODE, Tries, warm_up
from vllm_align_spec.processors.trie_file import TrieFileError

INF = math.inf
LN_FLOOR = math.log(1e-12)
# What is left of a mass after a child took nearly all of it is known to 1e-16 of that mass, and may be 1e-12 of it.
ROUNDING = 1e-3


def mass_at_root(tries, trie):
    return float(tries.mass_at_root(np.array([trie]))[0])


def lse(values):
    top = max(values, default=-INF)
    return top + math.log(sum(math.exp(v - top) for v in values)) if top > -INF else -INF


class World:
    """A bigram model and a language of strings of one length that both follow from a seed; token `END` ends."""

    def __init__(self, seed, vocab=3, length=4):
        self.seed, self.vocab, self.length = seed, vocab, length

    @cache  # noqa: B019
    def log_p(self, prefix):
        """log P of each token after a prefix, the end token last."""
        rng = random.Random(f"{self.seed} model {prefix[-1:]}")
        z = [rng.choice((-INF, rng.gauss(0, 1), rng.gauss(0, 8))) for _ in range(self.vocab)] + [rng.gauss(0, 1)]
        total = lse(z)
        return [x - total for x in z]

    @cache  # noqa: B019
    def legal(self, prefix):
        """The tokens that may follow; there are dead ends. Only the longest strings may end."""
        if len(prefix) == self.length:
            return frozenset([self.vocab])
        rng = random.Random(f"{self.seed} language {prefix}")
        return frozenset(a for a in range(self.vocab) if rng.random() < 0.7)

    @cache  # noqa: B019
    def log_c(self, prefix):
        """The true log c, by enumeration."""
        return lse([self.log_p(prefix)[a] + self.after(prefix, a) for a in self.legal(prefix)])

    def after(self, prefix, token):
        return 0.0 if token == self.vocab else self.log_c((*prefix, token))

    def unvisited(self, prefix, visited):
        return lse([self.log_p(prefix)[a] for a in self.legal(prefix) - visited])


class Reference:
    """What `Tries` does to one trie, with dictionaries and full recomputation."""

    def __init__(self):
        self.nodes = {}  # prefix -> [log_p, U, log_c]

    def children(self, prefix):
        return {u[-1] for u in self.nodes if len(u) == len(prefix) + 1 and u[:-1] == prefix}

    def record(self, rows):
        """Rows are (prefix, log P of its last token, unvisited)."""
        before = set(self.nodes)
        seen = {}
        for prefix, _, unvisited in rows:
            if prefix in before:
                seen[prefix] = max(seen.get(prefix, -INF), unvisited)
        for prefix, unvisited in seen.items():
            self.nodes[prefix][1] = unvisited
        for prefix, log_p, unvisited in rows:
            if prefix in self.nodes:
                continue
            self.nodes[prefix] = [log_p if prefix else 0.0, unvisited, 0.0]
            if prefix:
                parent = self.nodes[prefix[:-1]]
                taken = math.exp(min(log_p - parent[1], 0.0)) if parent[1] > -INF else 0.0
                parent[1] += max(math.log1p(-taken), LN_FLOOR) if taken < 1 else LN_FLOOR
        for prefix in sorted(self.nodes, key=len, reverse=True):
            node = self.nodes[prefix]
            children = [self.nodes[(*prefix, a)] for a in self.children(prefix)]
            node[2] = min(node[2], lse([node[1], *(child[0] + child[2] for child in children)]))


def contents(tries, trie):
    """prefix -> (log P, U, log c~) of all nodes, found from the root by `children` and `child`."""
    found, front = {}, [((), int(tries.root([trie])[0]))]
    while front:
        prefix, node = front.pop()
        if node < 0:
            continue
        record = tries._nodes[node]
        assert record["depth"] == len(prefix)
        assert not record["queued"]
        found[prefix] = (record["log_p"], record["unvisited"], record["log_c"])
        _, tokens, log_c, log_p = tries.children([node])
        below = tries.child(np.full(len(tokens), node), tokens)
        assert len(set(tokens.tolist())) == len(tokens)
        assert tries.log_c(below).tolist() == log_c.tolist()
        assert tries._nodes["log_p"][below].tolist() == log_p.tolist()
        front += [((*prefix, token), child) for token, child in zip(tokens.tolist(), below.tolist(), strict=True)]
    assert len(found) == tries.nodes(trie)
    return found


def find(tries, trie, prefix):
    node = tries.root([trie])
    for token in prefix:
        node = tries.child(node, [token])
    return int(node[0])


def visit(tries, world, lanes):
    """One engine step: each lane, a trie and a path of prefixes that extend each other, shows a row at each of them.

    Returns:
        The rows as `Reference.record` takes them, and the nodes that they got.
    """
    columns, rows = [], []
    for trie, path in lanes:
        for r, prefix in enumerate(path):
            node = find(tries, trie, prefix)
            visited = frozenset(tries.children([node])[1].tolist())
            log_p = world.log_p(prefix[:-1])[prefix[-1]] if prefix else 0.0
            unvisited = world.unvisited(prefix, visited)
            parent = find(tries, trie, prefix[:-1]) if r == 0 and prefix else -1
            parent_row = len(rows) - 1 if r > 0 else -1
            columns.append((trie, node, parent_row, parent, prefix[-1] if prefix else -1, log_p, unvisited))
            rows.append((prefix, log_p, unvisited))
    return rows, tries.record(*map(list, zip(*columns, strict=True)))


def random_path(rng, world, known):
    """A prefix that is known or a child of one that is, and a chain of drafts behind it."""
    prefix = rng.choice(sorted(known)) if known else ()
    path = []
    while len(path) < 4:
        if known:
            choices = sorted(world.legal(prefix) - {world.vocab})
            if choices and (path or rng.random() < 0.5):
                prefix = (*prefix, rng.choice(choices))
            elif path:
                break
        path.append(prefix)
        if not known or rng.random() < 0.3:
            break
    return path


def sample(tries, trie, tokens, log_p, legal):
    """Records a whole string as one chain: `log_p[r]` led to row r, `legal[r]` is the mass of all its legal tokens."""
    rows = len(tokens) + 1
    root = tries.root([trie])
    node = [int(root[0]), *[-1] * len(tokens)]
    return tries.record([trie] * rows, node, range(-1, rows - 1), [-1] * rows, [-1, *tokens], [0.0, *log_p], legal)


@given(seed=st.integers(0, 2**32), lanes=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_any_sequence_of_steps_does_what_a_dictionary_does_and_never_raises_or_undercuts_c(seed, lanes):
    rng, world, reference = random.Random(seed), World(seed), Reference()
    tries = Tries(1000 * BYTES_PER_NODE)
    trie = tries.open(b"one")
    for _ in range(12):
        paths = [random_path(rng, world, reference.nodes) for _ in range(lanes)]
        before = contents(tries, trie)
        rows, nodes = visit(tries, world, [(trie, path) for path in paths])
        reference.record(rows)
        assert nodes.tolist() == [find(tries, trie, prefix) for prefix, _, _ in rows]
        assert nodes.min() >= 0
        found = contents(tries, trie)
        assert found.keys() == reference.nodes.keys()
        for prefix, node in found.items():
            log_p, unvisited, log_c = reference.nodes[prefix]
            assert node == pytest.approx((log_p, unvisited, log_c), rel=1e-9, abs=1e-9)
            assert node[2] <= before.get(prefix, (0.0, 0.0, 0.0))[2]
            assert node[2] >= world.log_c(prefix) - ROUNDING
    assert mass_at_root(tries, trie) == found[()][2]


@given(seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_c_is_exact_once_every_prefix_was_visited_and_seen_again(seed):
    world, tries = World(seed, length=3), Tries(1000 * BYTES_PER_NODE)
    trie = tries.open(b"one")
    prefixes = [()]
    for prefix in prefixes:
        prefixes += [(*prefix, a) for a in sorted(world.legal(prefix) - {world.vocab})]
    for _ in range(2):
        for prefix in prefixes:
            visit(tries, world, [(trie, [prefix])])
    for prefix, (_, _, log_c) in contents(tries, trie).items():
        assert log_c == pytest.approx(world.log_c(prefix), rel=1e-9, abs=1e-9)


def test_the_published_example():
    tries = Tries(100 * BYTES_PER_NODE)
    trie = tries.open(b"00000 or 1xxxx")
    log = math.log
    for again in (False, True):
        if not again:
            nodes = sample(tries, trie, [0] * 5, [log(0.45), *[log(0.1)] * 4], [log(0.9), *[log(0.1)] * 4, 0.0])
        else:  # every row but the last one has lost its only unvisited child, the root one of two
            none = [-1] * 6
            tries.record([trie] * 6, nodes, none, none, none, [0.0] * 6, [log(0.45), *[-INF] * 4, 0.0])
        c_0 = math.exp(tries.log_c(nodes)[1])
        c_root = math.exp(mass_at_root(tries, trie))
        assert c_0 == pytest.approx(1e-4, rel=1e-12 if again else 1e-8)
        assert c_root == pytest.approx(0.450045, rel=1e-12 if again else 1e-9)
        assert 0.45 * c_0 / c_root == pytest.approx(9.999e-5, rel=1e-6)


@pytest.mark.parametrize("log_mass", [-28.44, -800.0, -1e6])
def test_masses_that_linear_space_loses_stay_right(log_mass):
    tries = Tries(100 * BYTES_PER_NODE)
    trie = tries.open(b"deep")
    steps = 40
    log_p = [0.0, *[log_mass / (steps - 1)] * (steps - 1)]
    nodes = sample(tries, trie, list(range(steps)), log_p, [*log_p[1:], 0.0, 0.0])
    none = [-1] * steps
    tries.record([trie] * steps, nodes[:-1], none, none, none, [0.0] * steps, [-INF] * steps)
    assert mass_at_root(tries, trie) == pytest.approx(log_mass, rel=1e-12)


def test_a_dead_end_costs_its_prefixes_their_mass_and_nothing_becomes_nan():
    tries = Tries(100 * BYTES_PER_NODE)
    trie = tries.open(b"dead")
    nodes = sample(tries, trie, [5, 6], [math.log(0.5), -INF], [math.log(0.8), math.log(0.5), -INF])
    assert tries.log_c(nodes)[2] == -INF
    assert tries.log_c(nodes)[1] == pytest.approx(math.log(0.5))
    tries.record([trie], [nodes[1]], [-1], [-1], [-1], [0.0], [-INF])
    assert tries.log_c(nodes)[1] == -INF
    assert mass_at_root(tries, trie) == pytest.approx(math.log(0.3))
    tries.record([trie], [nodes[0]], [-1], [-1], [-1], [0.0], [-INF])
    assert mass_at_root(tries, trie) == -INF
    # A child of a node whose mass is gone: nothing is left to take from it.
    sample(tries, trie, [7], [-INF], [-INF, -INF])
    assert mass_at_root(tries, trie) == -INF
    assert not any(np.isnan(values).any() for values in contents(tries, trie).values())


def test_what_c_loses_child_by_child_adds_up_to_what_all_children_say():
    """A thousand children of as many grandchildren die one after the other: differences of c~, down to the last."""
    width, log_p = 40, -math.log(40)
    tries = Tries(BYTES_PER_NODE * 3000)
    trie = tries.open(b"k")
    root = sample(tries, trie, [], [], [0.0])[0]
    rest = [math.log1p(-k / width) for k in range(width)] + [-INF]  # what k visited children leave
    inner = [sample(tries, trie, [a], [log_p], [rest[a], 0.0])[-1] for a in range(width)]
    leaves = [
        (a, sample(tries, trie, [a, b], [log_p, log_p], [-INF, rest[b], 0.0])[-1])
        for a in range(width)
        for b in range(width)
    ]
    assert tries.log_c([root])[0] == pytest.approx(0.0, abs=1e-9)
    random.Random(0).shuffle(leaves)
    before, left = 0.0, dict.fromkeys(range(width), width)
    for dead, (a, leaf) in enumerate(leaves, 1):
        tries.record([trie], [leaf], [-1], [-1], [-1], [0.0], [-INF])
        left[a] -= 1
        for node, share in ((root, 1 - dead / width**2), (inner[a], left[a] / width)):
            # Of a node's mass, what its visited children do not take is a trillionth at least.
            expected = math.log(share) if share > 1e-6 else -20.0
            found = tries.log_c([node])[0]
            assert found == pytest.approx(expected, abs=1e-9) if share > 1e-6 else found < expected
        assert tries.log_c([root])[0] <= before
        before = tries.log_c([root])[0]


def test_a_nan_and_masses_above_one_round_up_to_one():
    tries = Tries(100 * BYTES_PER_NODE)
    trie = tries.open(b"nan")
    nodes = sample(tries, trie, [1], [math.nan], [1e-9, math.nan])
    assert tries.log_c(nodes).tolist() == [0.0, 0.0]
    assert contents(tries, trie)[(1,)] == (0.0, 0.0, 0.0)


def test_a_child_that_takes_all_leaves_a_trillionth():
    tries = Tries(100 * BYTES_PER_NODE)
    trie = tries.open(b"floor")
    sample(tries, trie, [1], [-1.0], [-2.0, -3.0])
    assert contents(tries, trie)[()][1] == -2.0 + LN_FLOOR


def test_rows_whose_parent_is_unknown_get_no_node_and_missing_nodes_answer_with_nothing():
    tries = Tries(100 * BYTES_PER_NODE)
    trie = tries.open(b"one")
    # No root yet: a token without a parent, and behind it a row with a token and one without.
    nodes = tries.record([trie] * 3, [-1] * 3, [-1, 0, 0], [-1] * 3, [4, 5, -1], [-1.0] * 3, [0.0] * 3)
    assert nodes.tolist() == [-1, -1, -1]
    assert tries.record([-1], [-1], [-1], [-1], [-1], [0.0], [0.0]).tolist() == [-1]
    assert tries.nodes_used == 0
    assert tries.root([trie, -1]).tolist() == [-1, -1]
    root = tries.record([trie], [-1], [-1], [-1], [-1], [0.0], [-0.5])
    # A row behind padding has a parent and no token.
    assert tries.record([trie], [-1], [-1], root, [-1], [0.0], [-0.5]).tolist() == [-1]
    assert tries.child([-1, root[0]], [4, 4]).tolist() == [-1, -1]
    assert tries.log_c([-1, root[0]]).tolist() == [0.0, -0.5]
    offsets, *flat = tries.children([-1, root[0], -1])
    assert offsets.tolist() == [0, 0, 0, 0]
    assert [len(column) for column in flat] == [0, 0, 0]
    assert mass_at_root(tries, -1) == 0.0
    assert tries.nodes(-1) == 0


def test_two_rows_of_one_call_that_reach_the_same_prefix_share_a_node_and_take_its_mass_once():
    tries = Tries(100 * BYTES_PER_NODE)
    trie = tries.open(b"one")
    root = int(tries.record([trie], [-1], [-1], [-1], [-1], [0.0], [math.log(0.9)])[0])
    half = math.log(0.5)
    nodes = tries.record([trie] * 2, [-1] * 2, [-1] * 2, [root] * 2, [3, 3], [half] * 2, [half, half])
    assert nodes[0] == nodes[1]
    assert tries.nodes_used == 2
    assert contents(tries, trie)[()][1] == pytest.approx(math.log(0.4))


def test_of_two_rows_at_one_node_the_larger_unvisited_mass_counts():
    tries = Tries(100 * BYTES_PER_NODE)
    trie = tries.open(b"one")
    root = int(tries.record([trie], [-1], [-1], [-1], [-1], [0.0], [0.0])[0])
    tries.record([trie] * 3, [root] * 3, [-1] * 3, [-1] * 3, [-1] * 3, [0.0] * 3, [-2.0, -1.0, -3.0])
    assert mass_at_root(tries, trie) == -1.0


def test_a_node_with_thousands_of_children_is_read_back_whole():
    tries, width = Tries(10_000 * BYTES_PER_NODE), 5000
    trie = tries.open(b"wide")
    root = tries.record([trie], [-1], [-1], [-1], [-1], [0.0], [0.0])
    tokens = np.random.default_rng(0).permutation(width)
    each = np.full(width, -math.log(width))
    nodes = tries.record(np.full(width, trie), *np.full((2, width), -1), np.repeat(root, width), tokens, each, each)
    offsets, found, log_c, log_p = tries.children(np.repeat(root, 2))
    assert offsets.tolist() == [0, width, 2 * width]
    assert sorted(found[:width]) == list(range(width))
    assert (log_c == each[0]).all()
    assert (log_p == each[0]).all()
    assert (tries.child(np.repeat(root, width), tokens) == nodes).all()
    tries.record([trie], root, [-1], [-1], [-1], [0.0], [-INF])
    assert mass_at_root(tries, trie) == pytest.approx(each[0])


def test_tries_of_different_keys_share_nothing_and_the_same_key_gives_the_same_trie():
    tries = Tries(100 * BYTES_PER_NODE)
    one, two = tries.open(b"one"), tries.open(b"two")
    assert tries.open(b"one") == one != two
    first = sample(tries, one, [1, 2], [-1.0, -1.0], [-0.5, -0.5, -7.0])
    untouched = contents(tries, one)
    second = sample(tries, two, [1, 2], [-1.0, -1.0], [-0.5, -0.5, -9.0])
    assert set(first.tolist()).isdisjoint(second.tolist())
    assert contents(tries, one) == untouched
    assert contents(tries, two) != untouched
    assert tries.nodes_used == 6
    assert tries.bytes_used == 6 * BYTES_PER_NODE


def filled(tries, key, nodes):
    """A trie that is a chain of so many nodes."""
    trie = tries.open(key)
    sample(tries, trie, [0] * (nodes - 1), [-0.1] * (nodes - 1), [-0.2] * nodes)
    return trie


def test_when_the_arena_is_full_the_least_recently_used_trie_without_references_goes():
    tries = Tries(12 * BYTES_PER_NODE + BYTES_PER_NODE - 1)
    assert tries.capacity == 12
    a, b, c = (filled(tries, key, 4) for key in (b"a", b"b", b"c"))
    tries.retain(b)
    tries.open(b"a")
    d = filled(tries, b"d", 4)  # c goes: b is older but referenced, a was opened again
    assert [tries.nodes(trie) for trie in (a, b, c, d)] == [4, 4, 0, 4]
    assert tries.evictions == 1
    assert tries.root([c]).tolist() == [-1]
    assert mass_at_root(tries, c) == 0.0
    tries.release(b)  # b was in use until now
    filled(tries, b"e", 6)  # a and d go, both wholly
    assert [tries.nodes(trie) for trie in (a, b, c, d)] == [0, 4, 0, 0]
    assert tries.evictions == 3
    assert tries.nodes_used == 10
    assert len(contents(tries, b)) == 4
    assert len(contents(tries, tries.open(b"e"))) == 6
    assert tries.open(b"c") == c
    filled(tries, b"c", 2)
    assert tries.nodes_used == 12


def test_a_full_arena_without_a_trie_to_evict_takes_no_more_nodes_but_keeps_learning():
    tries = Tries(3 * BYTES_PER_NODE)
    a, b = tries.open(b"a"), tries.open(b"b")
    tries.retain(a)
    nodes = sample(tries, a, [1, 2, 3, 4], [-1.0] * 4, [-0.5] * 5)
    assert (nodes >= 0).tolist() == [True, True, True, False, False]
    before = mass_at_root(tries, a)
    assert sample(tries, b, [1], [-1.0], [-0.5, -0.5]).tolist() == [-1, -1]
    assert tries.evictions == 0
    tries.record([a] * 2, [nodes[2], -1], [-1, 0], [-1] * 2, [-1, 9], [0.0, -1.0], [-4.0, -1.0])
    assert mass_at_root(tries, a) < before
    assert tries.children(nodes[:1])[1].tolist() == [1]
    tries.release(a)
    assert (sample(tries, b, [1], [-1.0], [-0.5, -0.5]) >= 0).all()
    assert tries.evictions == 1


def test_a_call_never_evicts_a_trie_that_it_records_itself():
    tries = Tries(4 * BYTES_PER_NODE)
    trie = filled(tries, b"a", 4)
    deepest = find(tries, trie, (0, 0, 0))
    assert tries.record([trie], [-1], [-1], [deepest], [0], [-0.1], [-0.2]).tolist() == [-1]
    assert tries.nodes(trie) == 4
    assert tries.evictions == 0


@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_under_constant_eviction_every_trie_stays_whole_and_every_node_is_accounted_for(seed):
    rng, world = random.Random(seed), World(seed)
    tries = Tries(30 * BYTES_PER_NODE)
    held = []
    for _ in range(40):
        trie = tries.open(bytes([rng.randrange(6)]))
        tries.retain(trie)
        held.append(trie)
        if len(held) > 2:
            tries.release(held.pop(rng.randrange(len(held))))
        visit(tries, world, [(t, random_path(rng, world, contents(tries, t))) for t in held])
        bounds = [contents(tries, t) for t in range(len(tries._keys))]
        assert sum(map(len, bounds)) == tries.nodes_used <= tries.capacity
        for prefix, (_, _, log_c) in (item for bound in bounds for item in bound.items()):
            assert log_c >= world.log_c(prefix) - ROUNDING
    for trie in held:
        tries.release(trie)
    filled(tries, b"last", tries.capacity)
    assert tries.nodes_used == tries.nodes(tries.open(b"last")) == tries.capacity


def test_the_table_is_bounded_and_empty_tries_leave_it_first(monkeypatch):
    monkeypatch.setattr(trie_module, "MAX_TRIES", 3)
    tries = Tries(100 * BYTES_PER_NODE)
    a = filled(tries, b"a", 2)
    b, c = tries.open(b"b"), tries.open(b"c")
    for trie in (b, c):
        tries.retain(trie)
    tries.release(b)
    assert tries.open(b"d") == b  # a is older, but has nodes
    assert tries.nodes(a) == 2
    tries.retain(b)
    assert tries.open(b"e") == a
    assert tries.nodes_used == 0
    assert tries.evictions == 1
    tries.retain(a)
    assert tries.open(b"f") == tries.open(b"b") == -1
    tries.retain(-1)
    tries.release(-1)
    tries.release(a)
    assert tries.open(b"a") == a
    assert tries.root([a]).tolist() == [-1]


def test_misuse_is_refused():
    tries = Tries(10 * BYTES_PER_NODE)
    with pytest.raises(ValueError, match="at most 64"):
        tries.open(b"x" * 65)
    with pytest.raises(ValueError, match="more often"):
        tries.release(tries.open(b"a"))


def test_an_arena_without_room_answers_like_an_empty_one():
    tries = Tries(BYTES_PER_NODE - 1)
    trie = tries.open(b"a")
    assert tries.record([trie], [-1], [-1], [-1], [-1], [0.0], [0.0]).tolist() == [-1]
    assert mass_at_root(tries, trie) == 0.0
    assert tries.children([-1])[0].tolist() == [0, 0]


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's own account of memory")
def test_a_million_nodes_take_less_than_100_bytes_each_and_an_unused_arena_takes_none():
    warm_up()
    start = resident_bytes()
    tries = Tries(2 * 10**9)
    trie = tries.open(b"big")
    assert resident_bytes() - start < 10**6
    level = tries.record([trie], [-1], [-1], [-1], [-1], [0.0], [0.0])
    while tries.nodes_used < 10**6:
        made = []
        for parents in np.array_split(np.repeat(level, 10), max(1, len(level) // 10**4)):
            rows = len(parents)
            tokens, log_p = np.arange(rows), np.full(rows, -3.0)
            made.append(tries.record(np.full(rows, trie), *np.full((2, rows), -1), parents, tokens, log_p, log_p))
        level = np.concatenate(made)
    used = tries.nodes_used
    assert (resident_bytes() - start) / used <= 100
    arrays = tries._nodes[:used].nbytes + tries._tries.nbytes + tries._state.nbytes
    assert arrays / used <= 100
    assert tries._nodes.itemsize == BYTES_PER_NODE


HEADER = {"model": "base", "revision": "7"}


def two_tries():
    tries = Tries(200 * BYTES_PER_NODE)
    for key in (b"first", b"", b"\x00second"):
        trie = tries.open(key)
        if key:
            world = World(7)
            for step in range(8):
                rng = random.Random(f"{key} {step}")
                visit(tries, world, [(trie, random_path(rng, world, contents(tries, trie)))])
    return tries


def test_a_file_brings_back_every_node_as_it_was(tmp_path):
    tries, back = two_tries(), Tries(200 * BYTES_PER_NODE)
    path = tmp_path / "tries.safetensors"
    path.write_bytes(b"an older file")
    tries.save(path, HEADER)
    assert os.listdir(tmp_path) == [path.name]
    assert back.load(path, HEADER) == 2
    for key in (b"first", b"\x00second"):
        expected = contents(tries, tries.open(key))
        assert len(expected) > 3
        assert contents(back, back.open(key)) == expected
    assert back.nodes_used == tries.nodes_used
    # What is loaded goes on like what was saved.
    world = World(7)
    for store in (tries, back):
        visit(store, world, [(store.open(b"first"), [()])])
    assert mass_at_root(back, back.open(b"first")) == mass_at_root(tries, tries.open(b"first"))


def test_loading_keeps_the_order_of_use_prefers_recent_tries_and_leaves_known_ones_alone(tmp_path):
    tries = Tries(100 * BYTES_PER_NODE)
    for key, nodes in ((b"old", 5), (b"new", 4), (b"middle", 3)):
        filled(tries, key, nodes)
    tries.open(b"new")
    tries.save(tmp_path / "f", HEADER)
    small = Tries(9 * BYTES_PER_NODE)
    assert small.load(tmp_path / "f", HEADER) == 2
    assert [small.nodes(small._by_key.get(key, -1)) for key in (b"old", b"middle", b"new")] == [0, 3, 4]
    assert small.load(tmp_path / "f", HEADER) == 0
    filled(small, b"another", 3)
    assert [small.nodes(small._by_key[key]) for key in (b"middle", b"new")] == [0, 4]
    other = Tries(100 * BYTES_PER_NODE)
    mine = filled(other, b"new", 2)
    assert other.load(tmp_path / "f", HEADER) == 2
    assert other.nodes(mine) == 2


def test_a_store_without_nodes_makes_a_file_that_loads(tmp_path):
    Tries(10 * BYTES_PER_NODE).save(tmp_path / "f", {})
    assert Tries(10 * BYTES_PER_NODE).load(tmp_path / "f", {}) == 0


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "tries.safetensors"
    two_tries().save(path, HEADER)
    return path


def refuse(path, message, header=HEADER, **options):
    tries = two_tries()
    tries.open(b"more")
    before = tries._nodes.copy(), tries._tries.copy(), tries._state.copy(), dict(tries._by_key)
    with pytest.raises(TrieFileError, match=message) as error:
        tries.load(path, header, **options)
    assert str(path) in str(error.value)
    after = tries._nodes, tries._tries, tries._state, tries._by_key
    assert all(np.array_equal(x, y) for x, y in zip(before[:3], after[:3], strict=True))
    assert before[3] == after[3]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({**HEADER, "model": "other"}, "model is 'base', not 'other'"),
        ({**HEADER, "dtype": "bf16"}, "dtype is None, not 'bf16'"),
        ({"model": "base"}, "revision is '7', not None"),
    ],
)
def test_a_file_written_for_something_else_is_refused_with_both_values(saved, header, message):
    refuse(saved, message, header)


def test_a_file_with_any_one_byte_flipped_is_refused(saved):
    whole = saved.read_bytes()
    tries = Tries(200 * BYTES_PER_NODE)
    for at in range(len(whole)):
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(TrieFileError):
            tries.load(saved, HEADER)
    assert tries.nodes_used == 0
    saved.write_bytes(whole[:-1] + bytes([whole[-1] ^ 128]))
    refuse(saved, "sha256 is")


def test_a_truncated_file_and_files_of_other_kinds_are_refused(saved):
    whole = saved.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        saved.write_bytes(whole[:size])
        refuse(saved, "not a safetensors file")
    save_file({"x": np.zeros(3)}, saved)
    refuse(saved, "format is None")
    saved.unlink()
    with pytest.raises(FileNotFoundError):
        Tries(BYTES_PER_NODE).load(saved, HEADER)


def rewrite(path, changes):
    """Changes tensors and makes the checksum right again."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, change in changes.items():
        tensors[name] = change(tensors[name].copy())
    metadata["sha256"] = trie_file.checksum(tensors)
    save_file(tensors, path, metadata)


def put(at, value):
    def change(array):
        array[at] = value
        return array

    return change


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("parent", {"parent": put(2, 10**6)}),
        ("parent", {"parent": put(2, -2)}),
        ("parent", {"parent": put(2, -1)}),
        ("parent", {"parent": put(0, 0)}),
        ("parent", {"parent": put(2, 2)}),
        ("parent", {"parent": put(1, 3)}),
        ("parent", {"parent": put(-1, 0)}),  # of another trie
        ("token", {"token": put(1, -1)}),
        ("token", {"token": put(0, 1)}),
        ("one token", {"parent": put(slice(1, 3), 0), "token": put(slice(1, 3), 1)}),
        ("log_p above 0", {"log_p": put(1, 0.5)}),
        ("log_c above 0", {"log_c": put(1, math.nan)}),
        ("unvisited above 0", {"unvisited": put(1, INF)}),
        ("node counts", {"log_c": lambda array: array[:-1]}),
        ("one dimension", {"log_c": lambda array: array[None]}),
        ("add up", {"trie_nodes": put(0, 1)}),
        ("without nodes", {"trie_nodes": put(0, 0)}),
        ("without nodes", {"trie_nodes": put(0, -5)}),
        ("add up", {"trie_nodes": put(0, 2**31 - 1)}),
        ("not one key", {"key_bytes": lambda array: array[:1]}),
        ("64 bytes", {"key_bytes": put(0, -1)}),
        ("64 bytes", {"key_bytes": put(0, 65)}),
        ("size of keys", {"key_bytes": put(0, 4)}),
        ("one key", {"keys": lambda _: np.frombuffer(b"xx", np.uint8), "key_bytes": put(slice(0, 2), 1)}),
        ("tensors are", {"parent": lambda array: array.astype(np.int64)}),
        ("tensors are", {"extra": lambda array: array}),
    ],
)
def test_a_crafted_file_with_the_right_checksum_is_refused(saved, message, changes):
    if "extra" in changes:
        with safe_open(saved, framework="numpy") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(tensors | {"extra": np.zeros(1)}, saved, metadata)
    else:
        rewrite(saved, changes)
    refuse(saved, message)


def test_tokens_outside_the_vocabulary_are_refused(saved):
    refuse(saved, "vocabulary", vocab_size=2)
    assert Tries(200 * BYTES_PER_NODE).load(saved, HEADER, vocab_size=3) == 2


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, saved, monkeypatch):
    before = saved.read_bytes()

    def fail(path, data):
        path.open("wb").write(data[:100])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        two_tries().save(saved, HEADER)
    assert saved.read_bytes() == before
    assert os.listdir(tmp_path) == [saved.name]


def exact(world, prefixes):
    """log c~ of each prefix, when just these were visited."""
    found = {}
    for prefix in sorted(prefixes, key=len, reverse=True):
        visited = {u[-1] for u in prefixes if len(u) == len(prefix) + 1 and u[:-1] == prefix}
        below = [world.log_p(prefix)[a] + found[(*prefix, a)] for a in visited]
        found[prefix] = lse([world.unvisited(prefix, visited), *below])
    return found


def agree(found, expected):
    """What is left of a mass is known to 1e-12 of it, so masses agree, and not their logarithms."""
    assert found.keys() == expected.keys()
    for prefix, log_c in expected.items():
        assert math.exp(found[prefix][2]) == pytest.approx(math.exp(log_c), abs=1e-9)


def replica(world, rng, steps=8):
    tries = Tries(1000 * BYTES_PER_NODE, shared=True)
    for _ in range(steps):
        learn(tries, world, rng)
    return tries


def learn(tries, world, rng):
    trie = tries.open(b"one")
    visit(tries, world, [(trie, random_path(rng, world, contents(tries, trie))) for _ in range(2)])


def of(tries):
    return contents(tries, tries.open(b"one"))


@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_tries_merge_into_the_trie_of_all_their_samples_in_any_order_and_however_often(seed):
    rng, world = random.Random(seed), World(seed)
    replicas = [replica(world, rng) for _ in range(3)]
    known = [of(one) for one in replicas]
    news = [one.news(0, HEADER)[0] for one in replicas]
    union = exact(world, set().union(*known))
    for order in ((0, 1, 2), (2, 0, 1), (1, 1, 2, 0, 2)):
        merged = Tries(1000 * BYTES_PER_NODE, shared=True)
        for i in order:
            before = of(merged)
            merged.merge(news[i], HEADER, world.vocab, foreign=False)
            after = of(merged)
            assert all(after[prefix][2] <= node[2] for prefix, node in before.items())
        agree(of(merged), union)
        assert merged.merge(news[order[0]], HEADER, foreign=False) == 0
        assert of(merged) == after
        # Grouped differently: what was merged is merged on.
        onto = replicas[0]
        onto.merge(merged.news(0, HEADER)[0], HEADER, foreign=True)
        agree(of(onto), union)
    assert all(of(onto)[prefix][2] <= node[2] for prefix, node in known[0].items())
    # Rows of the merged trie are seen like any others.
    learn(onto, world, rng)
    for prefix, (_, _, log_c) in of(onto).items():
        assert log_c >= world.log_c(prefix) - ROUNDING


@given(seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_replicas_that_exchange_news_with_shards_all_come_to_know_what_any_saw(seed):
    from vllm_align_spec.cluster.tries import Shard

    rng, world = random.Random(seed), World(seed, length=5)
    shards = [Shard(HEADER, 1000 * BYTES_PER_NODE) for _ in range(2)]
    replicas = [replica(world, rng, steps=2) for _ in range(2)]
    ours = [[0, 0] for _ in replicas]
    theirs = [[("", 0), ("", 0)] for _ in replicas]
    bytes_of_rounds = []

    def exchange():
        size = 0
        for r in rng.sample(range(2), 2):
            pieces = [replicas[r].news(since, HEADER, 2)[shard] for shard, since in enumerate(ours[r])]
            now = replicas[r].next_epoch()
            for shard, piece in enumerate(pieces):
                found, life, since = shards[shard].exchange(piece, *theirs[r][shard])
                if found:
                    replicas[r].merge(found, HEADER, foreign=True)
                again = ours[r][shard] > 0 and life != theirs[r][shard][0]
                ours[r][shard], theirs[r][shard] = 0 if again else now, (life, since)
                size += len(piece) + len(found)
        bytes_of_rounds.append(size)

    seen = set()
    for turn in range(6):
        for one in replicas:
            for key in (b"one", b"two"):  # the keys' first bytes differ, but not in the shard
                trie = one.open(key)
                visit(one, world, [(trie, random_path(rng, world, contents(one, trie)))])
            learn(one, world, rng)
            seen |= set(of(one))
        if turn == 3:  # a shard that dies and begins anew is filled by the replicas
            shards = [Shard(HEADER, 1000 * BYTES_PER_NODE) for _ in range(2)]
        exchange()
    for _ in range(3):
        exchange()
    for one in replicas:
        agree(of(one), exact(world, seen))
    assert bytes_of_rounds[-1] == 0  # nothing is sent twice


def test_news_are_what_was_made_since_and_what_leads_there():
    tries = Tries(100 * BYTES_PER_NODE, shared=True)
    a, b = tries.open(b"a"), tries.open(b"b")
    half = math.log(0.5)
    sample(tries, a, [1, 2], [half, half], [0.0, 0.0, half])
    (first,) = tries.news(0, HEADER)
    since = tries.next_epoch()
    assert tries.news(since, HEADER) == [b""]
    sample(tries, b, [5], [half], [0.0, 0.0])
    node = find(tries, a, (1,))
    tries.record([a], [-1], [-1], [node], [7], [half], [half])
    (second,) = tries.news(since, HEADER)
    other = Tries(100 * BYTES_PER_NODE, shared=True)
    assert other.merge(second, HEADER, foreign=True) == 5
    assert set(contents(other, other.open(b"a"))) == {(), (1,), (1, 7)}
    assert other.merge(first, HEADER, foreign=True) == 1
    assert other.merge(second, HEADER, foreign=True) == 0
    for key in (b"a", b"b"):
        found, expected = contents(other, other.open(key)), contents(tries, tries.open(key))
        agree(found, {prefix: node[2] for prefix, node in expected.items()})
    # What came from elsewhere is told only to those who know nothing.
    assert other.news(other.next_epoch(), HEADER) == other.news(1, HEADER) == [b""]
    assert Tries(100 * BYTES_PER_NODE).merge(other.news(0, HEADER)[0], HEADER, foreign=True) == 6
    # A trie that was evicted is no news.
    small = Tries(3 * BYTES_PER_NODE, shared=True)
    filled(small, b"a", 2)
    filled(small, b"b", 3)
    (news,) = small.news(0, HEADER)
    assert Tries(100 * BYTES_PER_NODE).merge(news, HEADER, foreign=True) == 3


def test_tries_that_are_not_shared_have_no_news():
    tries = Tries(100 * BYTES_PER_NODE)
    filled(tries, b"a", 2)
    with pytest.raises(ValueError, match="nobody noted"):
        tries.news(0, HEADER)


def test_shards_divide_the_keys():
    tries = Tries(100 * BYTES_PER_NODE, shared=True)
    for key in (b"\x00", b"\x01", b"\x02", b"\x04"):
        filled(tries, key, 3)
    pieces = tries.news(0, HEADER, 3)
    stores = [Tries(100 * BYTES_PER_NODE) for _ in pieces]
    for store, piece, nodes in zip(stores, pieces, (3, 6, 3), strict=True):
        assert store.merge(piece, HEADER, foreign=True) == nodes
    assert [sorted(store._by_key) for store in stores] == [[b"\x00"], [b"\x01", b"\x04"], [b"\x02"]]
    expected = {prefix: node[2] for prefix, node in contents(tries, tries.open(b"\x04")).items()}
    agree(contents(stores[1], stores[1].open(b"\x04")), expected)
    assert tries.news(0, HEADER, 5)[3] == b""


def test_what_comes_from_elsewhere_takes_free_room_only_and_goes_first(monkeypatch):
    source = Tries(100 * BYTES_PER_NODE, shared=True)
    for key in (b"x", b"y"):
        filled(source, key, 4)
    (news,) = source.news(0, HEADER)
    tries = Tries(10 * BYTES_PER_NODE)
    mine = filled(tries, b"mine", 5)
    assert tries.merge(news, HEADER, foreign=True) == 5  # all of one and the beginning of another
    assert (tries.nodes(mine), tries.evictions) == (5, 0)
    assert len(contents(tries, tries._by_key[b"x"])) == 4
    assert len(contents(tries, tries._by_key[b"y"])) == 1
    filled(tries, b"new", 5)
    assert (tries.nodes(mine), tries.evictions) == (5, 2)
    monkeypatch.setattr(trie_module, "MAX_TRIES", 1)
    full = Tries(100 * BYTES_PER_NODE)
    full.open(b"mine")
    assert full.merge(news, HEADER, foreign=True) == 0
    # A shard, on the other hand, keeps what was used last.
    assert Tries(4 * BYTES_PER_NODE, shared=True).merge(news, HEADER, foreign=False) == 4


@pytest.mark.parametrize("foreign", [False, True])
def test_news_that_are_damaged_or_of_another_model_change_nothing(foreign):
    source = Tries(100 * BYTES_PER_NODE, shared=True)
    filled(source, b"x", 4)
    (news,) = source.news(0, HEADER)
    tries = two_tries()
    before = tries._nodes.copy(), tries._tries.copy(), tries._state.copy(), dict(tries._by_key)
    for wrong, header, vocab, message in (
        (news, {**HEADER, "model": "other"}, 9, "model is 'base'"),
        (news, HEADER, 0, "vocabulary"),
        (news[:-1] + b"\xff", HEADER, 9, "sha256"),
        (b"", HEADER, 9, "not a safetensors file"),
        (trie_file.pack(trie_file.FILE, tries._packed(), HEADER), HEADER, 9, "format is"),
    ):
        with pytest.raises(TrieFileError, match=message):
            tries.merge(wrong, header, vocab, foreign=foreign)
    after = tries._nodes, tries._tries, tries._state
    assert all(np.array_equal(x, y) for x, y in zip(before[:3], after, strict=True))
    assert before[3] == tries._by_key


def test_after_the_warm_up_nothing_is_left_to_compile(tmp_path, monkeypatch):
    compiled = [f for f in vars(trie_module).values() if hasattr(f, "signatures")]
    assert trie_module.record in compiled
    warm_up()
    before = {f.__name__: len(f.signatures) for f in compiled}
    tries = two_tries()
    contents(tries, 0)
    tries.save(tmp_path / "f", HEADER)
    monkeypatch.setattr(trie_module, "MAX_TRIES", 2)
    few = Tries(9 * BYTES_PER_NODE)
    few.load(tmp_path / "f", HEADER)
    for i, rows in product(range(5), (1, 7)):
        frozen = np.broadcast_to(-1.0, rows)
        trie = few.open(bytes([i]))
        few.record(np.full(rows, trie, np.int32), *[[-1] * rows] * 4, frozen, frozen)
    assert few.evictions
    assert {f.__name__: len(f.signatures) for f in compiled} == before


def test_without_a_folder_for_the_cache_everything_compiles_all_the_same(monkeypatch):
    real = loops.njit

    def njit(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(loops, "njit", njit)
    assert loops.jit(lambda x: x + 1)(1) == 2
