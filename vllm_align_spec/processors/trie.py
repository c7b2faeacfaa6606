"""What ASAp remembers of the samples it saw (arXiv 2405.21047, section 3): all tries of one worker, in one arena.

c(u) is the probability that a completion of the prefix u, drawn from the unmasked model, lies in the language. A trie
bounds it from above, from the visited prefixes alone::

    log c~(u) = logaddexp( U(u), LSE over visited children ua of (log P(a|u) + log c~(ua)) )

U(u) is the log mass of the legal children that were not visited: each of them counts with c~ = 1, an illegal one with
0. Everything is float64 in log space; in linear space a c~ of e^-800 would be 0. When c~ of a child falls, its parent's
is lessened by the difference; where digits would cancel, it is summed anew. The parent's row is gone when a child
appears, so its U is corrected by what the child takes, and renewed whenever the row is seen again::

    U <- max(U + log1p(-exp(log P(a|u) - U)), U + ln 1e-12)                  rounding up is sound: c~ stays >= c

A row's masses are float32 sums: what a large child leaves of them is known to some 1e-7 of the row until it is renewed.

Between evictions c~ never rises. Prefixes that are illegal or were never visited have no node.

Nodes are records of one array on the host, driven by numba. Children hang in a list (first_child, next_sibling), and
so do free nodes. When the arena is full, the least recently used trie without a reference goes, as a whole: the
attempts in flight keep theirs. If there is none, nothing more is inserted, and all else goes on.

Letters of the shapes: R rows of an engine step, K visited children of all of them. A node, a row or a trie that there
is not is -1 everywhere. A node id is valid while its trie is referenced. Not for several threads at once.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vllm_align_spec.processors import trie_file
from vllm_align_spec.processors.loops import jit
from vllm_align_spec.processors.trie_file import MAX_KEY_BYTES, Tensors

NODE = np.dtype(
    [
        # First what is read of every child, so that it mostly lies in one line of the processor's cache.
        ("token", np.int32),  # what leads here from the parent; -1 at a root
        ("next_sibling", np.int32),  # of a free node: the next free one
        ("log_p", np.float64),  # log P(token | parent)
        ("log_c", np.float64),  # log c~
        ("unvisited", np.float64),  # U
        ("parent", np.int32),  # -1 at a root
        ("first_child", np.int32),
        ("depth", np.int32),  # tokens from the root
        ("queued", np.int32),  # what `record` will do to log_c; 0 between calls
    ]
)
BYTES_PER_NODE = NODE.itemsize

MAX_TRIES = 65536
"""Tries that a worker knows at once, empty ones included. With their keys they take 20 MB at most beside the arena."""

_TRIE = np.dtype([("root", np.int32), ("nodes", np.int32), ("references", np.int64), ("last_use", np.int64)])
_STATE = np.dtype(
    [
        ("free", np.int64),  # head of the list of freed nodes
        ("untouched", np.int64),  # the nodes from here on were never used: their pages cost no memory
        ("tries", np.int64),  # entries of the table in use
        ("nodes", np.int64),
        ("evictions", np.int64),
        ("epoch", np.int64),  # what `_insert` marks new nodes with
    ]
)
_LN_FLOOR, _LN_2 = math.log(1e-12), math.log(2.0)
_LESS, _WHOLE = 1, 2
"""What `record` does to a queued node: take from log c~ what its children lost, or compute it from all of them."""

_Records = np.ndarray[Any, np.dtype[np.void]]
_Int = np.ndarray[Any, np.dtype[np.int64]]
_Int32 = np.ndarray[Any, np.dtype[np.int32]]
_Float = np.ndarray[Any, np.dtype[np.float64]]
Arena = tuple[_Records, _Records, _Records, _Int32]
"""Nodes, tries, the one record of the state, and in what epoch each node was made (-1: it is free), if anybody asks."""


@jit
def _at_most_zero(log_value: float) -> float:
    """Rounding may have gone above 0; a nan becomes 0 too, which only rounds c~ up."""
    return log_value if log_value < 0.0 else 0.0


@jit
def _log_c(nodes: _Records, node: int, visited: bool = True) -> float:
    """The recursion of the module docstring, in one pass over the children; or, with c~ = 1 for the visited ones too,
    the log mass of all legal children."""
    top, total = nodes[node].unvisited, 1.0
    child = nodes[node].first_child
    while child >= 0:
        term = nodes[child].log_p + (nodes[child].log_c if visited else 0.0)
        if term > top:
            total = total * math.exp(top - term) + 1.0
            top = term
        elif term > -math.inf:
            total += math.exp(term - top)
        child = nodes[child].next_sibling
    return top + math.log(total)  # type: ignore[no-any-return]


@jit
def _lessen(nodes: _Records, node: int, child: int, old: float) -> None:
    """Takes from c~ of a node what it loses because c~ of a child fell from ``old``, without asking the other children.

    A difference is only as exact as what it is taken from. Where it would be less than half of that, or below a power
    of two that c~ was above, the node is left to be recomputed from all of its children."""
    log_c, fallen = nodes[node].log_c, nodes[child].log_c - old
    share = -math.exp(nodes[child].log_p + old - log_c) * math.expm1(fallen)
    if share < 0.5:
        less = log_c + math.log1p(-share)
        if math.floor(less / _LN_2) == math.floor(log_c / _LN_2):
            nodes[node].log_c = less
            return
    nodes[node].queued = _WHOLE


@jit
def _without(unvisited: float, log_p: float) -> float:
    """U after a child of this mass has left it."""
    if unvisited == -math.inf:
        return unvisited
    if log_p >= unvisited:
        return unvisited + _LN_FLOOR
    return unvisited + max(math.log1p(-math.exp(log_p - unvisited)), _LN_FLOOR)


@jit
def find(nodes: _Records, node: int, token: int, until: int = -1) -> int:
    """The visited child of a node by a token; -1 if there is none.

    New children come first in the list, so who knows that it is not ``until`` or one behind it asks the newer ones."""
    child = nodes[node].first_child
    while child >= 0 and child != until and nodes[child].token != token:
        child = nodes[child].next_sibling
    return child if child != until else -1


@jit
def _victim(tries: _Records, state: _Records, empty: bool) -> int:
    """The least recently used of the tries without references that have nodes, or of those that have none."""
    found = -1
    for trie in range(state[0].tries):
        candidate = tries[trie].references == 0 and (tries[trie].nodes == 0) == empty
        if candidate and (found < 0 or tries[trie].last_use < tries[found].last_use):
            found = trie
    return found


@jit
def _evict(arena: Arena, trie: int) -> None:
    """Frees all nodes of a trie; its entry in the table stays. The list of nodes still to visit needs no memory
    either: it is threaded through next_sibling like the list of free ones."""
    nodes, tries, state, epochs = arena
    node = tries[trie].root
    while node >= 0:
        if len(epochs) > 0:
            epochs[node] = -1
        following = nodes[node].next_sibling
        child = nodes[node].first_child
        if child >= 0:
            last = child
            while nodes[last].next_sibling >= 0:
                last = nodes[last].next_sibling
            nodes[last].next_sibling = following
            following = child
        nodes[node].next_sibling = state[0].free
        state[0].free = node
        node = following
    state[0].nodes -= tries[trie].nodes
    state[0].evictions += 1
    tries[trie].root = -1
    tries[trie].nodes = 0


@jit
def _insert(arena: Arena, trie: int, parent: int, token: int, log_p: float, log_c: float, unvisited: float) -> int:
    """A new child of ``parent``, or the root if that is -1; -1 if there is no room even after an eviction."""
    nodes, tries, state, epochs = arena
    if state[0].free < 0 and state[0].untouched == len(nodes):
        victim = _victim(tries, state, False)
        if victim < 0:
            return -1
        _evict(arena, victim)
    if state[0].free >= 0:
        node = state[0].free
        state[0].free = nodes[node].next_sibling
    else:
        node = state[0].untouched
        state[0].untouched += 1
    if len(epochs) > 0:
        epochs[node] = state[0].epoch
    state[0].nodes += 1
    tries[trie].nodes += 1
    new = nodes[node]
    new.parent, new.token, new.first_child, new.next_sibling, new.depth, new.queued = parent, token, -1, -1, 0, 0
    new.log_p, new.log_c, new.unvisited = log_p, log_c, unvisited
    if parent < 0:
        tries[trie].root = node
    else:
        new.depth = nodes[parent].depth + 1
        new.next_sibling = nodes[parent].first_child
        nodes[parent].first_child = node
    return node  # type: ignore[no-any-return]


@jit
def _queue(nodes: _Records, node: int, dirty: _Int, count: int) -> int:
    """Puts a node, once, on the list of those to recompute."""
    if nodes[node].queued:
        return count
    nodes[node].queued = _WHOLE
    dirty[count] = (np.int64(nodes[node].depth) << 32) | node
    return count + 1


@jit
def record(
    arena: Arena,
    trie: _Int,
    node: _Int32,
    parent_row: _Int,
    parent: _Int32,
    token: _Int,
    log_p: _Float,
    legal: _Float,
    until: _Int32,
) -> _Int32:
    """See `Tries.record`; ``until`` [R] is what `find` may stop at where a row has no node."""
    nodes, tries, _, _ = arena
    rows = len(trie)
    out = np.full(rows, -1, np.int32)
    dirty = np.empty(2 * rows, np.int64)  # depth << 32 | node
    count = 0
    for i in range(rows):
        if trie[i] >= 0:
            tries[trie[i]].references += 1  # no trie of this call may be evicted by it

    # (1) Renew U where the row was seen again.
    for i in range(rows):
        u = out[i] = node[i]
        if u < 0:
            continue
        mass = _at_most_zero(legal[i])
        nodes[u].unvisited = max(nodes[u].unvisited, mass) if nodes[u].queued else mass
        count = _queue(nodes, u, dirty, count)

    # (2) Make the nodes that are missing.
    full = False
    for i in range(rows):
        if out[i] >= 0 or trie[i] < 0:
            continue
        u = out[parent_row[i]] if parent_row[i] >= 0 else parent[i]
        if (u < 0 and parent_row[i] >= 0) or (u < 0) != (token[i] < 0):
            continue
        made = tries[trie[i]].root if u < 0 else find(nodes, u, token[i], until[i])
        if made < 0 and not full:
            mass = _at_most_zero(log_p[i]) if u >= 0 else 0.0
            made = _insert(arena, trie[i], u, token[i], mass, 0.0, _at_most_zero(legal[i]))
            full = made < 0
            if made >= 0:
                count = _queue(nodes, made, dirty, count)
            if made >= 0 and u >= 0:
                nodes[u].unvisited = _without(nodes[u].unvisited, mass)
                count = _queue(nodes, u, dirty, count)
        out[i] = made

    # (3) Back up, level by level from the deepest. A level holds the dirty nodes of its depth and the parents of those
    # nodes one deeper that changed; the parents overwrite the front of the list, which has been read by then.
    dirty = np.sort(dirty[:count])
    level, before = np.empty(count, np.int64), np.empty(count)  # nodes, and log c~ of each before this call
    width = 0
    depth = np.int64(0)
    while count > 0 or width > 0:
        if width == 0:
            depth = dirty[count - 1] >> 32
        while count > 0 and dirty[count - 1] >> 32 == depth:
            count -= 1
            u = dirty[count] & 0xFFFFFFFF
            level[width], before[width] = u, nodes[u].log_c
            width += 1
        above = 0
        for i in range(width):
            u, old = level[i], before[i]
            if nodes[u].queued == _WHOLE:
                log_c = _log_c(nodes, u)
                nodes[u].log_c = log_c if log_c < old else old
            nodes[u].queued = 0
            p = nodes[u].parent
            if p >= 0 and nodes[u].log_c < old:
                if not nodes[p].queued:
                    nodes[p].queued = _LESS
                    level[above], before[above] = p, nodes[p].log_c
                    above += 1
                if nodes[p].queued == _LESS:
                    _lessen(nodes, p, u, old)
        width = above
        depth -= 1

    for i in range(rows):
        if trie[i] >= 0:
            tries[trie[i]].references -= 1
    return out


@jit
def _child(nodes: _Records, node: _Int32, token: _Int) -> _Int32:
    out = np.full(len(node), -1, np.int32)
    for i in range(len(node)):
        if node[i] >= 0:
            out[i] = find(nodes, node[i], token[i])
    return out


@jit
def children(nodes: _Records, node: _Int32) -> tuple[_Int, _Int32, _Int, _Float]:
    """Offsets, nodes, tokens and log c~ of the visited children, the newest first; see `Tries.children`."""
    rows = len(node)
    offsets = np.zeros(rows + 1, np.int64)
    # All lists at once, one child of each in turn: in a large trie every child is a miss of the processor's caches, and
    # those of different rows are waited for together. What comes after finds all children in the cache.
    row, child = np.empty(rows, np.int64), np.empty(rows, np.int32)
    going = 0
    for i in range(rows):
        if node[i] >= 0 and nodes[node[i]].first_child >= 0:
            row[going], child[going] = i, nodes[node[i]].first_child
            going += 1
    while going > 0:
        left = 0
        for i in range(going):
            offsets[row[i] + 1] += 1
            following = nodes[child[i]].next_sibling
            if following >= 0:
                row[left], child[left] = row[i], following
                left += 1
        going = left
    for i in range(rows):
        offsets[i + 1] += offsets[i]
    found = np.empty(offsets[-1], np.int32)
    token, log_c = np.empty(offsets[-1], np.int64), np.empty(offsets[-1])
    for i in range(rows):
        at = nodes[node[i]].first_child if node[i] >= 0 else np.int32(-1)
        for k in range(offsets[i], offsets[i + 1]):
            found[k], token[k], log_c[k] = at, nodes[at].token, nodes[at].log_c
            at = nodes[at].next_sibling
    return offsets, found, token, log_c


@jit
def _order(nodes: _Records, roots: _Int32, total: int) -> tuple[_Int32, _Int32]:
    """The nodes of some tries, breadth first, and each one's parent by its place in that order."""
    order, parent = np.empty(total, np.int32), np.full(total, -1, np.int32)
    count = done = 0
    for root in roots:
        order[count] = root
        count += 1
        while done < count:
            child = nodes[order[done]].first_child
            while child >= 0:
                order[count], parent[count] = child, done
                count += 1
                child = nodes[child].next_sibling
            done += 1
    return order, parent


@jit
def _graft(
    arena: Arena, trie: int, parent: _Int32, token: _Int32, log_p: _Float, log_c: _Float, unvisited: _Float
) -> None:
    """Fills an empty trie for which there is room; ``parent`` counts from the trie's root, at 0."""
    at = np.empty(len(parent), np.int64)
    for i in range(len(parent)):
        p = at[parent[i]] if i > 0 else -1
        at[i] = _insert(arena, trie, p, token[i], log_p[i], log_c[i], unvisited[i])


@jit
def _news(arena: Arena, since: int) -> tuple[_Int32, _Float]:
    """The nodes made since an epoch and all that lead to them, by number, and the mass of each one's legal children."""
    nodes, _, state, epochs = arena
    count = 0
    for node in range(state[0].untouched):
        if epochs[node] >= since:
            above = np.int32(node)
            while above >= 0 and nodes[above].queued == 0:
                nodes[above].queued = 1
                count += 1
                above = nodes[above].parent
    found, legal = np.empty(count, np.int32), np.empty(count)
    count = 0
    for node in range(state[0].untouched):
        if nodes[node].queued:
            nodes[node].queued = 0
            found[count], legal[count] = node, _at_most_zero(_log_c(nodes, node, False))
            count += 1
    return found, legal


@jit
def _merge(
    arena: Arena, trie: int, parent: _Int32, token: _Int32, log_p: _Float, legal: _Float, may_evict: bool
) -> None:
    """Adds what is missing of some nodes, their ancestors among them, to a trie, as if their rows had been seen here;
    ``parent`` counts from the root, at 0. Nothing else is taken over: c~ follows from the nodes that are here."""
    nodes, tries, state, _ = arena
    tries[trie].references += 1  # it may not be evicted by itself
    at = np.full(len(parent), -1, np.int64)
    for i in range(len(parent)):
        up = at[parent[i]] if i > 0 else -1
        if i > 0 and up < 0:
            continue
        at[i] = find(nodes, up, token[i]) if i > 0 else tries[trie].root
        room = may_evict or state[0].free >= 0 or state[0].untouched < len(nodes)
        if at[i] < 0 and room:
            at[i] = _insert(arena, trie, up, token[i], log_p[i], 0.0, legal[i])
            if at[i] >= 0 and i > 0:
                nodes[up].unvisited = _without(nodes[up].unvisited, log_p[i])
    # Children stand behind their parents, so from the end every node comes after all of its own that changed.
    for i in range(len(parent) - 1, -1, -1):
        if at[i] >= 0:
            nodes[at[i]].log_c = min(nodes[at[i]].log_c, _log_c(nodes, at[i]))
    tries[trie].references -= 1


def _array(values: Any, dtype: type[np.generic]) -> Any:
    """A copy in the one layout that the compiled functions know: any other would be compiled anew, in seconds."""
    return np.array(values, dtype=dtype, order="C")


class Tries:
    """All tries of one worker.

    Args:
        max_bytes: size of the arena. Its pages are taken as nodes come to be used and are not given back.
        shared: whether `news` will be asked for, which takes 4 bytes more a node.
    """

    def __init__(self, max_bytes: int, *, shared: bool = False) -> None:
        self._nodes: _Records = np.zeros(min(max_bytes // BYTES_PER_NODE, np.iinfo(np.int32).max), NODE)
        self._tries: _Records = np.zeros(MAX_TRIES, _TRIE)
        self._state: _Records = np.zeros(1, _STATE)
        self._state["free"] = -1
        self._state["epoch"] = 1
        self._epochs: _Int32 = np.zeros(len(self._nodes) if shared else 0, np.int32)
        self.arena = (self._nodes, self._tries, self._state, self._epochs)
        self._by_key: dict[bytes, int] = {}
        self._keys: list[bytes] = []
        self._clock = 0

    @property
    def capacity(self) -> int:
        """Nodes that fit."""
        return len(self._nodes)

    @property
    def nodes_used(self) -> int:
        """Nodes of all tries."""
        return int(self._state["nodes"][0])

    @property
    def bytes_used(self) -> int:
        """Bytes of these nodes."""
        return self.nodes_used * BYTES_PER_NODE

    @property
    def evictions(self) -> int:
        """Tries whose nodes were dropped to make room."""
        return int(self._state["evictions"][0])

    def open(self, key: bytes) -> int:
        """The trie with this key, now the most recently used; an empty one if there is none yet.

        If `MAX_TRIES` are known, the least recently used one without references goes, first among the empty ones.

        Returns:
            Its id, valid while it is referenced; -1, a trie that stays empty, if all known ones are referenced.

        Raises:
            ValueError: the key is longer than `MAX_KEY_BYTES`.
        """
        if len(key) > MAX_KEY_BYTES:
            raise ValueError(f"key of {len(key)} bytes; a trie's key has at most {MAX_KEY_BYTES}")
        trie = self._by_key.get(key)
        if trie is None:
            trie = self._entry()
            if trie < 0:
                return -1
            self._keys[trie] = key
            self._by_key[key] = trie
            self._tries[trie] = (-1, 0, 0, 0)
        self._touch(trie)
        return trie

    def _entry(self) -> int:
        """An entry of the table for a new trie."""
        if len(self._keys) < len(self._tries):
            self._keys.append(b"")
            self._state["tries"] = len(self._keys)
            return len(self._keys) - 1
        trie = _victim(self._tries, self._state, True)
        if trie < 0:
            trie = _victim(self._tries, self._state, False)
            if trie < 0:
                return -1
            _evict(self.arena, trie)
        del self._by_key[self._keys[trie]]
        return trie

    def _touch(self, trie: int) -> None:
        self._clock += 1
        self._tries["last_use"][trie] = self._clock

    def retain(self, trie: int) -> None:
        """Keeps the trie from being evicted until a ``release``."""
        if trie >= 0:
            self._tries["references"][trie] += 1

    def release(self, trie: int) -> None:
        """Takes one ``retain`` back. The trie was in use until now.

        Raises:
            ValueError: nobody retains the trie.
        """
        if trie < 0:
            return
        if self._tries["references"][trie] <= 0:
            raise ValueError(f"trie {trie} was released more often than it was retained")
        self._tries["references"][trie] -= 1
        self._touch(trie)

    def root(self, tries: _Int) -> _Int32:
        """Root nodes, [R] int32, of [R] tries."""
        tries = np.asarray(tries, dtype=np.int64)
        return np.where(tries >= 0, self._tries["root"][tries], np.int32(-1))

    def child(self, nodes: _Int32, tokens: _Int) -> _Int32:
        """The visited children, [R] int32, of [R] nodes by [R] tokens."""
        return _child(self._nodes, _array(nodes, np.int32), _array(tokens, np.int64))

    def children(self, nodes: _Int32) -> tuple[_Int, _Int, _Float, _Float]:
        """All visited children of [R] nodes, in no particular order.

        Returns:
            offsets [R+1] int64: those of row i are at offsets[i] to offsets[i+1] of the others; tokens [K] int64;
            log c~ [K] float64; log P of the token [K] float64.
        """
        offsets, node, token, log_c = children(self._nodes, _array(nodes, np.int32))
        return offsets, token, log_c, self._nodes["log_p"][node]

    def log_c(self, nodes: _Int32) -> _Float:
        """log c~, [R] float64, of [R] nodes; 0 for -1, since nothing is known of what was not visited."""
        nodes = np.asarray(nodes, dtype=np.int32)
        if not len(self._nodes):
            return np.zeros(nodes.shape)
        return np.where(nodes >= 0, self._nodes["log_c"][nodes], 0.0)

    def mass_at_root(self, trie: _Int) -> _Float:
        """log c~(root) of each trie, a bound on the log mass of the language; 0 without a root."""
        return self.log_c(self.root(trie))

    def nodes(self, trie: int) -> int:
        """Nodes of a trie."""
        return int(self._tries["nodes"][trie]) if trie >= 0 else 0

    def record(
        self, trie: _Int, node: _Int32, parent_row: _Int, parent: _Int32, token: _Int, log_p: _Float, unvisited: _Float
    ) -> _Int32:
        """Takes in one engine step: all rows whose distribution was seen. They share one snapshot of the tries.

        Args:
            trie: [R] int64.
            node: [R] int32, the row's node if the snapshot had one.
            parent_row: [R] int64, the row of this call, an earlier one, that the row's parent belongs to.
            parent: [R] int32, the node of the parent, if it belongs to no row of this call.
            token: [R] int64, what leads from the parent to the row; -1 and no parent: the row is the trie's root.
            log_p: [R] float64, log P(token | parent), at a root of no meaning.
            unvisited: [R] float64, log mass of the legal children that the snapshot has not.

        Returns:
            [R] int32, the row's node; -1 if its parent has none or there is no room.
        """
        return record(
            self.arena,
            _array(trie, np.int64),
            _array(node, np.int32),
            _array(parent_row, np.int64),
            _array(parent, np.int32),
            _array(token, np.int64),
            _array(log_p, np.float64),
            _array(unvisited, np.float64),
            np.full(len(trie), -1, np.int32),
        )

    def save(self, path: Path, header: Mapping[str, str]) -> None:
        """Writes all tries that have nodes to a safetensors file, at once or not at all.

        Args:
            path: the file; one that exists is replaced.
            header: what the tries depend on (model, revision, dtype, ...); ``load`` wants the same.
        """
        data = trie_file.pack(trie_file.FILE, self._packed(), header)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            unfinished.write_bytes(data)
            os.replace(unfinished, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                unfinished.unlink()

    def load(self, path: Path, header: Mapping[str, str], vocab_size: int = 2**31) -> int:
        """Adds the tries of a file, as far as there is room, the most recently used first; one that is here stays.

        Args:
            path: a file that ``save`` wrote.
            header: what it must have been written with.
            vocab_size: what its tokens must lie below.

        Returns:
            How many tries were added.

        Raises:
            TrieFileError: the file is not of this format, not for this header, or damaged. Nothing was added.
            OSError: the file cannot be read.
        """
        return self._unpack(trie_file.unpack(str(path), trie_file.FILE, path.read_bytes(), header, vocab_size))

    def news(self, since: int, header: Mapping[str, str], shards: int = 1) -> list[bytes]:
        """Nodes made since an epoch, for `merge` elsewhere; tries are split by their keys' first byte.

        Args:
            since: what `next_epoch` returned; 0 for all nodes, those merged from elsewhere included.
            header: as for `save`.
            shards: into how many parts.

        Returns:
            One piece a shard, empty where nothing is new.

        Raises:
            ValueError: these tries are not ``shared``.
        """
        if len(self._epochs) < len(self._nodes):
            raise ValueError("nobody noted when the nodes of these tries were made")
        node, legal = _news(self.arena, since)
        place = np.searchsorted(node, self._nodes["parent"][node])  # of the parent among them; a root's is nobody's
        is_root = self._nodes["parent"][node] < 0
        root = np.where(is_root, np.arange(len(node)), place)
        while not is_root[root].all():
            root = root[root]
        which = np.flatnonzero(self._tries["nodes"])
        which = which[np.argsort(self._tries["root"][which])]
        trie = which[np.searchsorted(self._tries["root"][which], node[root])]
        # Trie after trie, the shallowest first.
        order = np.lexsort((self._nodes["depth"][node], trie))
        rank = np.empty(len(node), np.int32)
        rank[order] = np.arange(len(node))
        node, legal, trie = node[order], legal[order], trie[order]
        parent = np.where(is_root, -1, rank[np.minimum(place, len(node) - 1)])[order]
        shard = np.array([int.from_bytes(key[:1], "big") % shards for key in self._keys], np.int64)[trie]
        found = []
        for number in range(shards):
            mine = np.flatnonzero(shard == number)
            moved = np.cumsum(shard == number) - 1  # tries of other shards left
            tries, sizes = np.unique(trie[mine], return_counts=True)
            keys = [self._keys[one] for one in tries]
            tensors: Tensors = {
                "keys": np.frombuffer(b"".join(keys), np.uint8),
                "key_bytes": np.array([len(key) for key in keys], np.int32),
                "trie_nodes": sizes.astype(np.int32),
                "parent": np.where(parent[mine] < 0, -1, moved[parent[mine]]).astype(np.int32),
                **{name: self._nodes[name][node[mine]] for name in ("token", "log_p")},
                "legal": legal[mine],
            }
            found.append(trie_file.pack(trie_file.NEWS, tensors, header) if len(mine) else b"")
        return found

    def next_epoch(self) -> int:
        """Nodes made from now on are told from earlier ones by the number that this returns."""
        self._state["epoch"] += 1
        return int(self._state["epoch"][0])

    def merge(self, news: bytes, header: Mapping[str, str], vocab_size: int = 2**31, *, foreign: bool) -> int:
        """Adds nodes that another one has and this one has not; c~ never rises.

        Merging is commutative, associative and idempotent, up to the rounding of U: a trie that has merged all others
        holds the union of their nodes, and all else follows from those.

        Args:
            news: what `news` gave.
            header: what it must have been given for.
            vocab_size: what its tokens must lie below.
            foreign: whether the nodes are no news to those who ask here: only `news` since 0 has them. Then they take
                free room only, and their tries are the first to be evicted until somebody opens them.

        Returns:
            How many nodes were added.

        Raises:
            TrieFileError: as for `load`.
        """
        tensors = trie_file.unpack("news", trie_file.NEWS, news, header, vocab_size)
        before, epoch = self.nodes_used, int(self._state["epoch"][0])
        if foreign:
            self._state["epoch"] = 0
        ends = np.cumsum(tensors["trie_nodes"], dtype=np.int64).tolist()
        for key, start, end in zip(trie_file.split_keys(tensors), [0, *ends], ends, strict=False):
            trie = self._by_key.get(key, -1)
            if not foreign or (trie < 0 and len(self._keys) < len(self._tries)):
                trie = self.open(key)
                if foreign:
                    self._tries["last_use"][trie] = 0
            if trie < 0:
                continue
            own = slice(start, end)
            parent = _array(tensors["parent"][own] - start, np.int32)
            token = _array(tensors["token"][own], np.int32)
            log_p, legal = (_array(tensors[name][own], np.float64) for name in ("log_p", "legal"))
            _merge(self.arena, trie, parent, token, log_p, legal, not foreign)
        self._state["epoch"] = epoch
        return self.nodes_used - before

    def _packed(self) -> Tensors:
        which = np.flatnonzero(self._tries["nodes"])
        which = which[np.argsort(self._tries["last_use"][which])]
        keys = [self._keys[trie] for trie in which]
        order, parent = _order(self._nodes, self._tries["root"][which], self.nodes_used)
        tensors: Tensors = {name: self._nodes[name][order] for name in ("token", "log_p", "log_c", "unvisited")}
        return tensors | {
            "keys": np.frombuffer(b"".join(keys), np.uint8),
            "key_bytes": np.array([len(key) for key in keys], np.int32),
            "trie_nodes": self._tries["nodes"][which],
            "parent": parent,
        }

    def _unpack(self, tensors: Tensors) -> int:
        keys = trie_file.split_keys(tensors)
        sizes = tensors["trie_nodes"].tolist()
        starts = (np.cumsum(tensors["trie_nodes"], dtype=np.int64) - tensors["trie_nodes"]).tolist()
        room = self.capacity - self.nodes_used
        chosen = []
        for i in reversed(range(len(keys))):
            if sizes[i] <= room and not self.nodes(self._by_key.get(keys[i], -1)):
                room -= sizes[i]
                chosen.append(i)
        added = 0
        for i in reversed(chosen):  # the most recently used last, so that it is that again
            trie = self.open(keys[i])
            if trie < 0:
                continue
            own = slice(starts[i], starts[i] + sizes[i])
            parent = _array(tensors["parent"][own] - starts[i], np.int32)
            token = _array(tensors["token"][own], np.int32)
            values = [_array(tensors[name][own], np.float64) for name in ("log_p", "log_c", "unvisited")]
            _graft(self.arena, trie, parent, token, *values)
            added += 1
        return added


def warm_up() -> None:
    """Compiles everything on a tiny arena: 6 s once on a machine, then 1 s, from numba's cache."""
    tries = Tries(2 * BYTES_PER_NODE, shared=True)
    trie = tries.open(b"")
    none, zero = np.array([-1]), np.array([0.0])
    root = tries.record(np.array([trie]), none, none, none, none, zero, zero)
    tries.child(root, none)
    tries.children(root)
    (news,) = tries.news(0, {})
    tries.merge(news, {}, foreign=True)
    packed = tries._packed()
    _evict(tries.arena, _victim(tries._tries, tries._state, False))
    tries._unpack(packed)
