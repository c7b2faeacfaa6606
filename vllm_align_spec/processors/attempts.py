"""Where attempts of ASAp stand, row after row: the host's part of a step, compiled by numba (`loops`).

`look_up` finds what the tries know of a step's rows before they are drawn, `take_in` moves the attempts to where the
drawing took them and tells the tries what was seen. Records are `asap.ATTEMPT` and `asap.PLACE`. Letters of the
shapes: S requests, L rows of each, E end tokens, K visited children of all rows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vllm_align_spec.processors.asap import ATTEMPT, MODES, PLACE, State
from vllm_align_spec.processors.loops import jit
from vllm_align_spec.processors.rows import Control
from vllm_align_spec.processors.trie import BYTES_PER_NODE, Arena, Tries, children, find, record

_Array = np.ndarray[Any, np.dtype[Any]]
_LIVE, _REJECTED, _DEAD_END, _FAILED = (int(state) for state in State)
_EXACT, _ABANDON, _FAIL = MODES.index("exact"), int(Control.ABANDON), int(Control.FAILED)
_LOWEST = float(np.finfo(np.float64).min)
_STEP, _FIRST, _SECOND = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@jit
def uniform(seed: int, counter: int) -> float:
    """A uniform number in (0, 1) that depends on (seed, counter) alone: SplitMix64 of both, its upper 52 bits."""
    z = np.uint64(seed) + (np.uint64(counter) + np.uint64(1)) * _STEP
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    z ^= z >> np.uint64(31)
    return (np.float64(z >> np.uint64(12)) + 0.5) * 2.0**-52


@jit
def _is_end(ends: _Array, token: int) -> bool:
    for end in ends:  # noqa: SIM110 - numba has no any()
        if end == token:
            return True
    return False


@jit
def _newest(offsets: _Array, child_node: _Array, row: int) -> int:
    """The newest of the visited children of a row's node; -1 if it has none."""
    return int(child_node[offsets[row]]) if offsets[row] < offsets[row + 1] else -1


@jit
def look_up(
    arena: Arena,
    attempt: _Array,
    place: _Array,
    before: _Array,
    ends: _Array,
    entry: _Array,
    position: _Array,
    count: _Array,
    draft: _Array,
) -> tuple[_Array, ...]:
    """What is known of a step's rows.

    Args:
        arena: the tries.
        attempt: `asap.ATTEMPT` of all entries; a lost one becomes failed.
        place: `asap.PLACE` of all entries; put back to ``before`` where a step is drawn again.
        before: the places one step earlier.
        ends: [entries, E] int64.
        entry: [S] int64.
        position: [S] int64, as in `rows.Rows`.
        count: [S] int64, likewise; set to 0 where the attempt is over.
        draft: [S, L] int64.

    Returns:
        the fields of `asap.Known` up to ``otherwise``, and the nodes, [K] int32, of the visited children.
    """
    nodes, tries = arena[0], arena[1]
    requests, width = draft.shape
    node = np.full((requests, width), -1, np.int32)
    of_rows = np.zeros((3, requests, width))
    of_requests = np.empty((3, requests))
    limits = np.zeros((2, requests, width), np.bool_)
    otherwise = np.empty(requests, np.int64)
    for s in range(requests):
        e = entry[s]
        a = attempt[e]
        out = position[s] + 1 - a.prompt
        if count[s] > 0 and out != place[e].out and out == before[e].out:
            # What the step that was taken back said of the attempt's end goes with it.
            place[e] = before[e]
            if a.state == _REJECTED or a.state == _DEAD_END:
                a.state = _LIVE
        at = place[e]
        # A row behind a drawn end token: with asynchronous scheduling vLLM computes one more step and drops it.
        if count[s] > 0 and at.token >= 0 and _is_end(ends[e], at.token):
            count[s] = 0
        drawing = count[s] > 0
        lost = drawing and (out != at.out or not a.open)
        if lost:
            a.state = _FAILED
        for r in range(width):
            if r == 0 and out == 0:
                node[s, 0] = tries[a.trie].root if a.trie >= 0 else -1
            elif r == 0:
                if drawing and at.parent >= 0 and at.node < 0:
                    at.node = find(nodes, at.parent, at.token, at.until)
                    at.until = nodes[at.parent].first_child
                node[s, 0] = at.node if drawing else -1
            elif r < count[s] and not lost and node[s, r - 1] >= 0:
                node[s, r] = find(nodes, node[s, r - 1], draft[s, r - 1])
            of_rows[0, s, r] = uniform(a.seed, 2 * (out + r))
            # The rows of a failed attempt never survive; without thinning, all do from which a token can be drawn.
            if a.state == _FAILED:
                of_rows[1, s, r] = np.inf
            elif a.mode == _EXACT:
                of_rows[1, s, r] = math.log(uniform(a.seed, 2 * (out + r) + 1))
            else:
                of_rows[1, s, r] = _LOWEST
            if r == 0:
                of_rows[2, s, r] = at.log_h
            elif node[s, r] >= 0:
                of_rows[2, s, r] = nodes[node[s, r]].log_c
            limits[0, s, r] = out + r >= a.length - 1
            limits[1, s, r] = out + r < a.shortest
        of_requests[0, s], of_requests[1, s] = a.inverse_temperature, at.log_bank
        of_requests[2, s] = 1.0 if out == 0 else 0.0
        otherwise[s] = _FAIL if a.state == _FAILED else _ABANDON
    offsets, child_node, child, child_log_c = children(nodes, node.reshape(-1))
    return node, offsets, child, child_log_c, of_rows, of_requests, limits, otherwise, child_node


@jit
def take_in(
    arena: Arena,
    attempt: _Array,
    place: _Array,
    before: _Array,
    ends: _Array,
    entry: _Array,
    count: _Array,
    draft: _Array,
    known: _Array,
    offsets: _Array,
    child: _Array,
    child_node: _Array,
    numbers: _Array,
    seconds: float,
) -> None:
    """What a step's rows said: into the tries, and to where its attempts stand.

    Args:
        arena: as for `look_up`, like the others up to ``draft``.
        attempt: gets state, log H of the first row, and number of new nodes.
        place: moved on.
        before: the places until now.
        ends: [entries, E] int64.
        entry: [S] int64.
        count: [S] int64, as `look_up` left it.
        draft: [S, L] int64.
        known: [S, L] int32, the nodes that `look_up` found; ``offsets``, ``child`` and ``child_node`` are their
            visited children.
        numbers: [9, S, L] float64: `asap.NUMBERS`.
        seconds: what each request is charged with.
    """
    log_h, unvisited, token = numbers[0], numbers[1], numbers[2]
    token_log_p, token_log_h, draft_log_p = numbers[3], numbers[4], numbers[5]
    alive, log_rho, log_bank = numbers[6], numbers[7], numbers[8]
    requests, width = draft.shape
    # Which rows stand behind legal drafts that do not end the response, in the order of their requests, so that a row's
    # parent stands right before it; and how many rows of each request were reached.
    at = np.empty((2, requests * width), np.int64)
    reached = np.zeros(requests, np.int64)
    seen = 0
    for s in range(requests):
        attempt[entry[s]].seconds += seconds
        if attempt[entry[s]].state != _LIVE:
            continue
        agrees = True
        for r in range(count[s]):
            at[0, seen], at[1, seen] = s, r
            seen += 1
            reached[s] += agrees
            if r + 1 == width or draft_log_p[s, r] == -np.inf or _is_end(ends[entry[s]], draft[s, r]):
                break
            agrees = agrees and alive[s, r] > 0 and np.int64(token[s, r]) == draft[s, r]

    trie, parent_row, tokens = np.empty(seen, np.int64), np.full(seen, -1, np.int64), np.empty(seen, np.int64)
    node, parent, until = np.empty(seen, np.int32), np.full(seen, -1, np.int32), np.full(seen, -1, np.int32)
    log_p, mass = np.empty(seen), np.empty(seen)
    for i in range(seen):
        s, r = at[0, i], at[1, i]
        e = entry[s]
        trie[i], node[i], mass[i] = attempt[e].trie, known[s, r], unvisited[s, r]
        if r > 0:
            parent_row[i], tokens[i], log_p[i] = i - 1, draft[s, r - 1], draft_log_p[s, r - 1]
            until[i] = _newest(offsets, child_node, s * width + r - 1)
        else:
            parent[i], tokens[i], log_p[i] = place[e].parent, place[e].token, place[e].log_p
            until[i] = place[e].until
    node = record(arena, trie, node, parent_row, parent, tokens, log_p, mass, until)
    for i in range(seen):
        s, r = at[0, i], at[1, i]
        if node[i] >= 0 and known[s, r] < 0:
            once = True  # two lanes may have met one prefix
            for j in range(i):
                once = once and node[j] != node[i]
            attempt[entry[s]].nodes += once

    i = 0
    for s in range(requests):
        if reached[s] == 0:
            continue
        while at[0, i] < s:
            i += 1
        e, last = entry[s], reached[s] - 1
        if place[e].out == 0:
            attempt[e].log_h0 = log_h[s, 0]
        before[e] = place[e]
        place[e].out += reached[s]
        place[e].parent = node[i + last]
        place[e].token = np.int64(token[s, last])
        row = s * width + last
        place[e].node, place[e].until = -1, _newest(offsets, child_node, row)
        for j in range(offsets[row], offsets[row + 1]):
            if child[j] == place[e].token:
                place[e].node = child_node[j]
        place[e].log_p = token_log_p[s, last]
        place[e].log_h = token_log_h[s, last]
        place[e].log_bank = log_bank[s, last]
        died = dead_end = False
        for r in range(reached[s]):
            place[e].log_w += log_rho[s, r]
            died = died or alive[s, r] == 0
            dead_end = dead_end or log_h[s, r] == -np.inf
        if died:
            attempt[e].state = _DEAD_END if dead_end else _REJECTED


def warm_up() -> None:
    """Compiles everything: some seconds once on a machine, then from numba's cache."""
    tries = Tries(BYTES_PER_NODE)
    attempt, place, before = np.zeros(1, ATTEMPT), np.zeros(1, PLACE), np.zeros(1, PLACE)
    ends, entry, count = np.full((1, 1), -1), np.zeros(1, np.int64), np.zeros(1, np.int64)
    draft = np.full((1, 1), -1)
    attempt["trie"] = -1
    known, offsets, child, *_, node = look_up(tries.arena, attempt, place, before, ends, entry, count, count, draft)
    of_rows = known, offsets, child, node, np.zeros((9, 1, 1)), 0.0
    take_in(tries.arena, attempt, place, before, ends, entry, count, draft, *of_rows)
