"""What must hold for every attempt of ASAp: a world small enough to enumerate, an engine that calls the processor as
vLLM's does (`engine.facade`), and laws to mix into a test class. Nothing here is random but by seed."""

import math
import random
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_align_spec.options import AsapEngineOptions, EngineOptions
from vllm_align_spec.processors import asap
from vllm_align_spec.processors.asap import MODES, AsapProcessor
from vllm_align_spec.processors.attempts import uniform
from vllm_align_spec.processors.rows import Control, Layout, Rows, row_logsumexp

INF = math.inf
uniforms = np.vectorize(uniform, otypes=[float])
# The rows' normalisers are float32, so log P is known to about 1e-6; a coin or a uniform closer than this to where
# the outcome changes may fall either way.
NEAR = 1e-5
KEY, OTHER_KEY = "aa" * 32, "bb" * 32


def lse(values):
    values = np.asarray(values, dtype=np.float64)
    top = values.max(initial=-INF)
    return float(top + np.log(np.exp(values - top).sum())) if top > -INF else -INF


class World:
    """A language model and a grammar that follow from a seed. Tokens: ordinary ones, then ends, then control ids.

    Args:
        bigram: whether the model sees only the latest token.
        deep: most ordinary tokens of what the grammar lets begin; may be beyond the bound on the length.
        length: N, end token included.
        shortest: min_tokens.
    """

    def __init__(self, seed, *, tokens=3, ends=1, bigram=False, deep=4, length=5, shortest=0, temperature=1.0):
        self.seed, self.bigram, self.deep = seed, bigram, deep
        self.length, self.shortest, self.temperature = length, shortest, temperature
        self.ordinary = tokens
        self.ends = list(range(tokens, tokens + ends))
        self.control = torch.arange(tokens + ends, tokens + ends + len(Control))
        self.vocab = tokens + ends + len(Control)
        self.told = f"{type(self).__name__}({seed!r}, {tokens=}, {ends=}, {bigram=}, {deep=}, {length=}, {shortest=}, "
        self.told += f"{temperature=})"

    def __repr__(self):
        return self.told

    # What a subclass may replace: the model and the grammar.

    def z(self, prefix):
        """Logits."""
        rng = random.Random(f"{self.seed} model {prefix[-1:] if self.bigram else prefix}")
        return [max(-4.0, min(4.0, rng.gauss(0, 1.5))) for _ in range(self.vocab)]

    def allows(self, prefix, token):
        """Whether the grammar's mask lets an ordinary token follow. There may be no way to end from there."""
        return len(prefix) < self.deep and random.Random(f"{self.seed} grammar {prefix} {token}").random() < 0.7

    def accepts(self, prefix):
        """Whether the response may end here."""
        return random.Random(f"{self.seed} accepts {prefix}").random() < 0.4

    # What follows.

    @cache  # noqa: B019
    def follows(self, prefix):
        """Whether the grammar lets a prefix without end tokens begin a response."""
        return not prefix or (
            self.follows(prefix[:-1]) and prefix[-1] < self.ordinary and self.allows(prefix[:-1], prefix[-1])
        )

    @cache  # noqa: B019
    def mask(self, prefix):
        """[V] bool, the grammar's; permissive where it has lost the thread: behind illegal and end tokens."""
        if not self.follows(prefix):
            return np.ones(self.vocab, bool)
        found = np.zeros(self.vocab, bool)
        found[: self.ordinary] = [self.allows(prefix, a) for a in range(self.ordinary)]
        found[self.ends] = self.accepts(prefix)
        return found

    @cache  # noqa: B019
    def legal(self, prefix):
        """[V] bool: the grammar's mask, the bound on the length, and ``min_tokens``; never a control id."""
        found = self.mask(prefix).copy()
        if len(prefix) >= self.length - 1:
            found[: self.ordinary] = False
        if len(prefix) < self.shortest:
            found[self.ends] = False
        found[self.control.numpy()] = False
        return found

    @cache  # noqa: B019
    def log_p(self, prefix):
        """[V] log P over the whole vocabulary at the temperature."""
        scaled = np.array(self.z(prefix), dtype=np.float32).astype(np.float64) / self.temperature
        return scaled - lse(scaled)

    @cache  # noqa: B019
    def row(self, prefix):
        """The model's row after the grammar mask, [V], and its normaliser before it, as `engine.facade` makes it."""
        z = torch.tensor(self.z(prefix), dtype=torch.float32)
        scale = torch.tensor([1 / self.temperature], dtype=torch.float32)
        unmasked = row_logsumexp(z[None], torch.zeros(1, dtype=torch.int64), scale)
        return z.masked_fill(torch.from_numpy(~self.mask(prefix)), -INF), float(unmasked[0])

    @cache  # noqa: B019
    def log_c(self, prefix):
        """log of the probability that a completion lies in the language, by enumeration."""
        log_p = self.log_p(prefix)
        return lse([log_p[a] + self.after(prefix, int(a)) for a in np.flatnonzero(self.legal(prefix))])

    def after(self, prefix, token):
        return 0.0 if token in self.ends else self.log_c((*prefix, token))

    @cached_property
    def language(self):
        """All responses, end token included -> P."""
        found = {}

        def walk(prefix, log_p):
            row = self.log_p(prefix)
            for a in map(int, np.flatnonzero(self.legal(prefix))):
                if a in self.ends:
                    found[(*prefix, a)] = math.exp(log_p + row[a])
                else:
                    walk((*prefix, a), log_p + row[a])

        walk((), 0.0)
        return found

    @cached_property
    def mass(self):
        """Z."""
        return math.fsum(self.language.values())

    def truth(self):
        """Response -> its probability given the grammar."""
        return {w: p / self.mass for w, p in self.language.items()}

    def next_law(self, log_c):
        """Response -> its probability as the next sample of one lane; the rest is dead ends.

        Args:
            log_c: prefix -> log c~; {} gives the law of a mask alone.
        """
        found = {}
        for w in self.language:
            log_q = 0.0
            for i, a in enumerate(w):
                log_q += self.believed(w[:i], log_c)[1][a]
            found[w] = math.exp(log_q)
        return found

    def believed(self, prefix, log_c):
        """What a row says given log c~ of some prefixes: log H, [V] log q, [V] log h."""
        log_h = np.full(self.vocab, -INF)
        for a in np.flatnonzero(self.legal(prefix)):
            log_h[a] = log_c.get((*prefix, int(a)), 0.0)
        weights = self.log_p(prefix) + log_h
        total = lse(weights)
        return total, (weights - total if total > -INF else weights), log_h


class Written(World):
    """A world in which all tokens are equally likely and the grammar is a set of token strings, end tokens left out.

    Args:
        language: what may be said.
        blind: prefixes that the mask allows though nothing completes them.
    """

    def __init__(self, seed, language, blind=(), **arguments):
        super().__init__(seed, **arguments)
        self.accepted = set(language)
        self.prefixes = {s[:i] for s in (*language, *blind) for i in range(len(s) + 1)}

    def z(self, prefix):
        return [0.0] * self.vocab

    def allows(self, prefix, token):
        return (*prefix, token) in self.prefixes

    def accepts(self, prefix):
        return prefix in self.accepted


def snapshot(processor, key):
    """prefix -> (log P of its last token, U, log c~) of all visited prefixes."""
    if not processor._ready:
        return {}
    tries = processor._tries
    trie = tries._by_key.get(bytes.fromhex(key), -1)
    found, front = {}, [((), int(tries.root(np.array([trie]))[0]))]
    while front:
        prefix, node = front.pop()
        if node < 0:
            continue
        record = tries._nodes[node]
        found[prefix] = (float(record["log_p"]), float(record["unvisited"]), float(record["log_c"]))
        child = int(record["first_child"])
        while child >= 0:
            front.append(((*prefix, int(tries._nodes[child]["token"])), child))
            child = int(tries._nodes[child]["next_sibling"])
    return found


@dataclass
class Lane:
    """One attempt as the engine sees it, and what it must believe of itself."""

    entry: int
    mode: str
    seed: int
    key: str
    prompt: int
    out: tuple[int, ...] = ()
    ended: str | None = None  # "completed", or a name of `Control`
    # kept by hand from snapshots of the trie
    log_h0: float = -INF
    log_used: float = 0.0
    log_w: float = 0.0
    log_bank: float = 0.0
    rows: int = 0
    doomed: bool = False  # the processor was told to give it up
    before: tuple = field(default=(), repr=False)

    BELIEFS = ("out", "ended", "log_h0", "log_used", "log_w", "log_bank", "rows")

    def note(self):
        self.before = tuple(getattr(self, name) for name in self.BELIEFS)

    def revert(self):
        for name, value in zip(self.BELIEFS, self.before, strict=True):
            setattr(self, name, value)


@dataclass
class Row:
    """What one reached row of an attempt said."""

    lane: Lane
    prefix: tuple[int, ...]
    log_h: float
    log_rho: float
    log_used: float
    log_q: np.ndarray
    log_h_of: np.ndarray


@dataclass
class Feed:
    """A lane's part in a call: its drafts, or None for a prefill that is not finished."""

    lane: Lane
    drafts: tuple[int, ...] | None = ()
    late: int | None = None
    """For an attempt that has ended: with asynchronous scheduling, vLLM computes one more step before it knows. Its
    first row stands this many tokens further on: 1 where a draft that was an end token was accepted."""


def known_rows(requests, width, **fields):
    """`asap.Known` of so many requests, of which nothing is known but what is given."""
    nothing = {
        "node": np.full((requests, width), -1, np.int32),
        "offsets": np.zeros(requests * width + 1, np.int64),
        "child": np.zeros(0, np.int64),
        "child_log_c": np.zeros(0),
        "of_rows": np.stack([np.full((requests, width), x) for x in (0.5, np.finfo(np.float64).min, 0.0)]),
        "of_requests": np.stack([np.full(requests, x) for x in (1.0, 0.0, 1.0)]),
        "limits": np.zeros((2, requests, width), np.bool_),
        "otherwise": np.zeros(requests, np.int64),
        "ends": np.full((requests, 1), -1),
        "rows": np.full(requests, width),
    }
    return asap.Known(**nothing | fields)


def thinned(log_h, log_used, first, log_bank, log_coin):
    """Which rows of one legal token with such a log H survive `asap.decide`, their log rho, log m behind each."""
    s, width = log_h.shape
    logits = torch.full((s * width, 8), -INF)
    logits[:, 0] = 0.0
    known = known_rows(
        s,
        width,
        of_rows=np.stack([np.full((s, width), 0.5), log_coin.numpy(), log_used.numpy()]),
        of_requests=np.stack([np.ones(s), log_bank.numpy(), first.double().numpy()]),
    )
    index, no_draft = torch.arange(s * width).view(s, width), torch.full((s, width), -1)
    alive, log_rho, banks = asap.decide(logits, index, -log_h, no_draft, torch.arange(5, 8), known)[6:]
    assert torch.equal(logits[index].argmax(-1), torch.where(alive > 0, 0, 5))
    return alive > 0, log_rho, banks


class Engine:
    """Calls a processor as `engine.facade` does. ``checked`` holds every row against enumeration.

    Args:
        rows: L.
        max_nodes: room for nodes in all tries together; None for plenty.
    """

    def __init__(
        self, world, *, rows=4, entries=64, device="cpu", processor=AsapProcessor, checked=True, max_nodes=None,
        seed=0, layout=None,
    ):  # fmt: skip
        self.world, self.rows, self.checked = world, rows, checked
        self.device = torch.device(device)
        max_bytes = 2**21 if max_nodes is None else max_nodes * 48
        options = EngineOptions.model_construct(
            **{**dict(EngineOptions()), "asap": AsapEngineOptions.model_construct(max_bytes=max_bytes, save_path=None)}
        )
        layout = layout or Layout(self.device, entries, rows, world.vocab, options)
        self.processor = processor(layout)
        self.all_noted = self.roomy = max_nodes is None
        self.rng = random.Random(f"{seed} engine")
        self.control = world.control.to(self.device)
        self.free = list(range(entries))
        self.expected = {KEY: set(), OTHER_KEY: set()}  # prefixes that must have been noted
        self.seen_log_c = {}
        self.seen_evictions = 0
        self.single_calls = True
        self.trace = []  # `Row`s

    def launch(self, mode, seed, key=KEY, prompt=7):
        """A new attempt; arguments as `strategies.asap` makes them."""
        entry = self.free.pop(0)
        world = self.world
        arguments = {
            "asap": mode,
            "align_spec_trie": key,
            "align_spec_seed": seed,
            "align_spec_length": world.length,
            "align_spec_min_tokens": world.shortest,
            "align_spec_temperature": world.temperature,
            "align_spec_stop_ids": world.ends,
        }
        self.processor.admit(entry, arguments, prompt)
        return Lane(entry, mode, seed, key, prompt)

    def report(self, lane, *, reuse=True):
        """Ends an attempt."""
        found = self.processor.reports([lane.entry])[0]
        if reuse:
            self.free.append(lane.entry)
        return found

    def drive(self, lane, draft=lambda lane: ()):
        """Steps one lane to its end."""
        while lane.ended is None:
            self.step([Feed(lane, tuple(draft(lane)))])
        return lane

    def step(self, *calls):
        """One engine step, verified in these chunks, each a list of `Feed`."""
        self.processor.flush()
        if self.checked:
            self.check_tries()
        self.single_calls &= len(calls) == 1
        for feeds in calls:
            self._call(feeds)

    # One call ---------------------------------------------------------------------------------------------------

    def _call(self, feeds):
        world = self.world
        count = [len(feed.drafts or ()) + 1 for feed in feeds]
        width = self.rows if self.checked and self.rng.random() < 0.5 else max(count)  # V2 and V1
        strangers = 2 if self.checked else 0
        lines = list(range(sum(count) + strangers))
        if self.checked:
            self.rng.shuffle(lines)
        prefixes, index, unmasked = [None] * len(lines), [], []
        kept, position, draft = [], [], []
        place = 0
        for feed, n in zip(feeds, count, strict=True):
            lane, drafts = feed.lane, feed.drafts
            own = lines[place : place + n]
            place += n
            beyond = (0,) * ((feed.late or 0) + (lane.ended not in (None, "completed")))  # a control id has its place
            for r, line in enumerate(own):
                prefixes[line] = lane.out + beyond + (drafts or ())[:r]
            index.append(own + [own[-1]] * (width - n))
            unmasked.append([world.row(prefixes[line])[1] for line in index[-1]])
            kept.append(0 if drafts is None else n)
            # A prefill that is not finished stands somewhere before the last token it knows.
            position.append(lane.prompt + len(lane.out + beyond) - (1 if drafts is not None else 3))
            draft.append([*(drafts or ()), *[-1] * (width - n + 1)])
        zeros = torch.zeros(world.vocab)
        logits = torch.stack([zeros if p is None else world.row(p)[0] for p in prefixes]).to(self.device)
        entry = np.array([feed.lane.entry for feed in feeds])
        rows = Rows(
            logits=logits,
            index=torch.tensor(index, device=self.device),
            count=torch.tensor(kept, device=self.device),
            position=torch.tensor(position, device=self.device),
            fed=lambda: torch.zeros(len(entry), dtype=torch.int64, device=self.device),
            draft=torch.tensor(draft, device=self.device),
            entry_np=entry,
            unmasked=torch.tensor(unmasked, dtype=torch.float32, device=self.device),
            control=self.control,
        )
        untouched = logits.clone()
        with self._watched() as seen:
            self.processor.apply(rows)
        tokens = logits[rows.index].argmax(-1).cpu().numpy()
        if self.checked:
            foreign = torch.tensor(lines[place:], dtype=torch.int64, device=self.device)
            assert torch.equal(logits[foreign], untouched[foreign])
            for s, feed in enumerate(feeds):
                if feed.late is not None:
                    continue
                self._check(s, feed, tokens[s], logits[rows.index[s]], untouched[rows.index[s]], seen)
            self._sweep_coins(seen)
        for s, feed in enumerate(feeds):
            if feed.drafts is not None and feed.late is None:
                self._advance(feed, tokens[s])

    def _advance(self, feed, tokens):
        lane, world = feed.lane, self.world
        if not self.checked:
            lane.note()
        for r in range(len(feed.drafts) + 1):
            token = int(tokens[r])
            if token in world.control:
                lane.ended = Control(int((world.control == token).nonzero()[0])).name
                return
            lane.out += (token,)
            if token in world.ends:
                lane.ended = "completed"
                if self.checked:
                    assert lane.out in world.language
                return
            if r == len(feed.drafts) or token != feed.drafts[r]:
                return

    @contextmanager
    def _watched(self):
        """What `decide` was given and what it said."""
        seen = {}
        if not self.checked:
            yield seen
            return
        inner = asap.decide

        def decide(logits, *arguments):
            *small, control, known = arguments
            given = logits.clone(), *map(torch.as_tensor, small), control, known
            numbers = inner(logits, *arguments)
            said = SimpleNamespace(**dict(zip(asap.NUMBERS, numbers, strict=True)))
            seen["decide"] = inner, given, said
            return numbers

        keys = (KEY, OTHER_KEY)
        seen["log_c"] = {key: {u: n[2] for u, n in snapshot(self.processor, key).items()} for key in keys}
        with mock.patch.object(asap, "decide", decide):
            yield seen

    def _check(self, s, feed, tokens, after, before, seen):
        """One lane's rows in one call, against enumeration from the trie as it stood before."""
        lane, world = feed.lane, self.world
        if feed.drafts is None:
            assert torch.equal(after, before)
            return
        _, _, said = seen["decide"]
        log_c = seen["log_c"][lane.key]
        if lane.out and not self.roomy and self.processor._place["parent"][lane.entry] < 0:
            # There was no room for the row before, so the attempt does not find what others have noted since.
            log_c = {}
        seen["view"] = log_c
        lane.note()
        n = len(feed.drafts) + 1
        for r in range(n):
            assert (after[r] == 0).sum() == 1, "a row that is not one-hot"
            assert (after[r] == -INF).sum() == world.vocab - 1
        if lane.doomed:
            assert [int(t) for t in tokens[:n]] == [int(world.control[Control.FAILED])] * n
            return
        prefix, used, reached = lane.out, lane.log_used, True
        for r in range(n):
            log_h, log_q, log_h_of = world.believed(prefix, log_c)
            log_p, legal = world.log_p(prefix), world.legal(prefix)
            known = [a for a in np.flatnonzero(legal) if (*prefix, int(a)) in log_c]
            fresh = legal.copy()
            fresh[known] = False
            self.expected[lane.key].add(prefix)
            self._close(said.log_h[s, r], log_h)
            self._close(said.log_unvisited[s, r], lse(log_p[fresh]))
            d = feed.drafts[r] if r < n - 1 else -1
            self._close(said.draft_log_p[s, r], log_p[d] if d >= 0 and legal[d] else -INF)
            first = not prefix
            rho = -INF if log_h == -INF else 0.0 if first else log_h - used
            if used > -INF:  # else the draft that led here cannot be drawn
                self._close(said.log_rho[s, r], rho)
                assert log_h <= self._rounded_up(used, log_p[legal]) + NEAR, "c~ rose"
            if first:
                lane.log_h0 = log_h
            counter = np.array([2 * len(prefix), 2 * len(prefix) + 1], dtype=np.uint64)
            u, coin = uniforms(np.array([lane.seed], dtype=np.uint64), counter)
            token, dies = -1, log_h == -INF
            if not dies:
                token = int(said.token[s, r])
                order = self._order(seen, s, r)
                cdf = dict(zip(order, np.exp(log_q[order]).cumsum(), strict=True))
                assert cdf[token] - math.exp(log_q[token]) - NEAR <= u <= cdf[token] + NEAR, (
                    "not the token of its uniform"
                )
                self._close(said.token_log_p[s, r], log_p[token])
                assert abs(float(said.token_log_h[s, r]) - log_h_of[token]) < 1e-9
            if lane.mode == "exact" and not dies and used > -INF:
                margin = lane.log_bank + rho - math.log(coin)
                dies = not bool(said.alive[s, r]) if abs(margin) < NEAR else margin < 0
            if reached:
                assert int(tokens[r]) == (int(world.control[Control.ABANDON]) if dies else token)
                lane.rows += 1
                lane.log_w += rho
                lane.log_bank = max(0.0, lane.log_bank + rho)
                lane.log_used = log_h_of[token] if not dies else -INF
                self.trace.append(Row(lane, prefix, log_h, rho, used, log_q, log_h_of))
            if d < 0 or not legal[d] or d in world.ends:
                break
            reached = reached and not dies and token == d
            prefix, used = (*prefix, d), log_c.get((*prefix, d), 0.0)
        self._sweep(s, lane, feed, seen)

    def _order(self, seen, s, r):
        """Tokens in the order in which a row draws them: visited children as listed, then the others by id."""
        known = seen["decide"][1][-1]
        i = s * known.node.shape[1] + r
        visited = known.child[known.offsets[i] : known.offsets[i + 1]].tolist()
        return [*visited, *(a for a in range(self.world.vocab) if a not in visited)]

    @staticmethod
    def _rounded_up(log_c, log_p_legal):
        """The most that a c~ may stand for: what a child leaves of a row is known to some float32 of the row's mass."""
        return np.logaddexp(log_c, math.log(1e-6) + lse(log_p_legal))

    @staticmethod
    def _close(found, wanted):
        assert float(found) == wanted or abs(float(found) - wanted) < NEAR, (float(found), wanted)

    def _sweep(self, s, lane, feed, seen):
        """The row law, by asking `decide` itself what it does at the ends of every interval.

        rho * q(a) * h_used = P(a|u) h(ua) at each row that stands behind legal drafts.
        """
        world, log_c, delta = self.world, seen["view"], 1e-6
        lane_before = dict(zip(Lane.BELIEFS, lane.before, strict=True))
        inner, (_, _, unmasked, draft, control, known), said = seen["decide"]
        prefix, used = lane_before["out"], lane_before["log_used"]
        width = known.node.shape[1]
        for r in range(len(feed.drafts) + 1):
            log_h, log_q, log_h_of = world.believed(prefix, log_c)
            if log_h > -INF:
                q = np.exp(log_q)
                of_row = slice(known.offsets[s * width + r], known.offsets[s * width + r + 1])
                order = self._order(seen, s, r)
                wide = [a for a in order if q[a] > 4 * delta]
                cdf = dict(zip(order, q[order].cumsum(), strict=True))
                u = np.array([x for a in wide for x in (cdf[a] - q[a] + delta, cdf[a] - delta)])
                k = len(u)
                m = of_row.stop - of_row.start

                lowest = np.finfo(np.float64).min
                numbers = inner(
                    logits_before(world, prefix, self.device).repeat(k, 1),
                    torch.arange(k, device=self.device)[:, None],
                    unmasked[s, r].expand(k, 1),
                    draft[s, r].expand(k, 1),
                    control,
                    known_rows(
                        k,
                        1,
                        offsets=np.arange(k + 1) * m,
                        child=np.tile(known.child[of_row], k),
                        child_log_c=np.tile(known.child_log_c[of_row], k),
                        of_rows=np.stack([u, np.full(k, lowest), np.zeros(k)])[..., None],
                        of_requests=np.stack([np.full(k, known.of_requests[0, s]), np.zeros(k), np.ones(k)]),
                        limits=known.limits[:, s, r, None, None].repeat(k, 1),
                        ends=np.tile(known.ends[s], (k, 1)),
                    ),
                )
                assert numbers[2, :, 0].tolist() == [a for a in wide for _ in range(2)]
                if prefix and used > -INF:
                    rho, p = math.exp(float(said.log_rho[s, r])), np.exp(world.log_p(prefix))
                    assert np.abs(rho * q * math.exp(used) - p * np.exp(log_h_of)).max() < 1e-6
            d = feed.drafts[r] if r < len(feed.drafts) else -1
            if d < 0 or not world.legal(prefix)[d] or d in world.ends:
                return
            prefix, used = (*prefix, d), log_c.get((*prefix, d), 0.0)

    @staticmethod
    def _sweep_coins(seen):
        """A row survives up to m rho, neither sooner nor later."""
        inner, (logits, *given, known), said = seen["decide"]
        log_bank, log_rho, banks = known.of_requests[1], said.log_rho.cpu().numpy(), said.log_bank.cpu().numpy()
        threshold = np.concatenate([log_bank[:, None], banks[:, :-1]], 1) + log_rho
        counts = np.isfinite(threshold) & (np.arange(threshold.shape[1]) < known.rows[:, None])
        for step, lives in ((-1e-9, True), (1e-9, False)):
            of_rows = known.of_rows.copy()
            of_rows[1] = threshold + step
            alive = inner(logits.clone(), *given, known._replace(of_rows=of_rows))[6].cpu().numpy()
            assert (alive[counts] == lives).all()

    # The tries --------------------------------------------------------------------------------------------------

    def check_tries(self):
        """c~ >= c, never rising between evictions, and exactly what was to be noted is known."""
        evictions = self.processor._tries.evictions
        if evictions != self.seen_evictions:
            self.seen_evictions, self.seen_log_c = evictions, {}
        for key, expected in self.expected.items():
            found = {u: node[2] for u, node in snapshot(self.processor, key).items()}
            assert found.keys() <= expected
            assert found.keys() == expected or not self.all_noted
            for u in sorted(found, key=len, reverse=True):
                least = self._rounded_up(found[u], self.world.log_p(u)[self.world.legal(u)])
                assert least >= self.world.log_c(u) - NEAR, f"c~{u} is below c"
                assert found[u] <= self.seen_log_c.get((key, u), 0.0), f"c~{u} rose"
                self.seen_log_c[key, u] = found[u]
                if self.single_calls:  # rows of one step in two calls are noted one after the other, rounded up
                    believed = self.world.believed(u, found)[0]
                    assert abs(math.exp(found[u]) - math.exp(believed)) < 1e-5, f"c~{u} is not of its children"

    def check_report(self, lane):
        """Ends a lane; its report says what was found by hand."""
        report = self.report(lane)
        self.check_tries()
        state = report["state"]
        if lane.ended == "completed":
            assert state == "completed"
            self._close(report["log_v"], lane.log_h0 + lane.log_w)
        elif lane.ended == "ABANDON":
            assert state in (("rejected", "dead_end") if lane.mode == "exact" else ("dead_end",))
            assert report["log_v"] is None
        elif lane.ended == "FAILED":
            assert state == "failed"
        if lane.ended in ("completed", "ABANDON"):
            assert report["rows"] == lane.rows
        if lane.ended in ("completed", "ABANDON") and lane.log_h0 > -INF:
            self._close(report["log_h0"], lane.log_h0)
        return report


def logits_before(world, prefix, device):
    """[1, V] the row as `engine.facade` hands it over."""
    row = world.row(prefix)[0].clone()
    row[world.control] = -INF
    return row[None].to(device)


def make_drafts(engine, lane, kind):
    """Drafts of a kind: what the trie's uniforms are about to draw, or guesses, or nonsense."""
    world, rng = engine.world, engine.rng
    n = rng.randint(0, engine.rows - 1)
    if kind == "none":
        return ()
    if kind == "right":
        log_c = {u: node[2] for u, node in snapshot(engine.processor, lane.key).items()}
        out, found = lane.out, []
        for _ in range(n):
            log_h, log_q, _ = world.believed(out, log_c)
            if log_h == -INF:
                break
            u = uniforms(np.array([lane.seed], dtype=np.uint64), np.array([2 * len(out)], dtype=np.uint64))[0]
            found.append(int(min(np.searchsorted(np.exp(log_q).cumsum(), u, side="right"), world.vocab - 1)))
            out = (*out, found[-1])
            if found[-1] in world.ends:
                break
        return tuple(found)
    if kind == "legal":
        out, found = lane.out, []
        for _ in range(n):
            legal = np.flatnonzero(world.legal(out))
            if not len(legal):
                break
            found.append(int(rng.choice(legal)))
            out = (*out, found[-1])
            if found[-1] in world.ends:
                break
        return tuple(found)
    return tuple(rng.choice([-1, *range(world.vocab)]) for _ in range(n))


def simulate(engine, *, lanes, steps, modes, drafts, take_back=0.0, abandon=0.0, chunks=1, tenants=1):
    """Attempts in random interleaving. Returns the reports of those that ended."""
    rng = engine.rng
    live, reports = [], []
    for step in range(steps):
        while len(live) < lanes and step < steps - engine.world.length:
            key = (KEY, OTHER_KEY)[rng.randrange(tenants)]
            live.append(engine.launch(rng.choice(modes), rng.randrange(2**63), key, prompt=rng.randint(3, 9)))
        calls = [[] for _ in range(chunks)]
        for lane in live:
            if lane.ended is None and rng.random() < 0.6:
                unfinished = rng.random() < 0.1
                drafted = None if unfinished else make_drafts(engine, lane, rng.choice(drafts))
                rng.choice(calls).append(Feed(lane, drafted))
        for call in calls:
            rng.shuffle(call)
        stepped = [feed.lane for call in calls for feed in call if feed.drafts is not None]
        engine.step(*[call for call in calls if call])
        for lane in stepped:
            if lane.ended is None and rng.random() < take_back:
                lane.revert()
            elif lane.ended is None and rng.random() < abandon:
                engine.processor.abandon(lane.entry)
                lane.doomed = True
                engine.all_noted = False  # its latest step is not taken in any more
        for lane in [lane for lane in live if lane.ended is not None]:
            if rng.random() < 0.7:
                live.remove(lane)
                reports.append((lane, engine.check_report(lane)))
    return reports


SEEDS = st.integers(0, 2**32)
TEMPERATURES = st.sampled_from([0.6, 1.0, 1.7])
some = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.differing_executors])


@st.composite
def worlds(draw):
    """Worlds in which the language may be anything, also empty, and the mask may lead into dead ends."""
    length = draw(st.integers(1, 5))
    return World(
        draw(SEEDS), tokens=draw(st.integers(1, 4)), ends=draw(st.integers(1, 2)), bigram=draw(st.booleans()),
        deep=draw(st.integers(0, 5)), length=length, shortest=draw(st.integers(0, 2)), temperature=draw(TEMPERATURES),
    )  # fmt: skip


class AsapLaws:
    """The laws. ``device`` is where the rows stand."""

    device = "cpu"

    def engine(self, world, **arguments):
        return Engine(world, device=self.device, **arguments)

    @some
    @given(world=worlds(), seed=SEEDS, lanes=st.integers(1, 6), drafted=st.booleans(), tenants=st.integers(1, 2))
    def test_the_row_law_holds_for_every_lane_of_any_interleaving(self, world, seed, lanes, drafted, tenants):
        kinds = ("none", "right", "legal", "nonsense") if drafted else ("none",)
        engine = self.engine(world, seed=seed)
        simulate(engine, lanes=lanes, steps=14, modes=MODES, drafts=kinds, tenants=tenants)
        engine.processor._settle()
        engine.check_tries()

    @some
    @given(world=worlds(), seed=SEEDS, chunks=st.integers(1, 3))
    def test_it_holds_for_verification_in_chunks_and_for_attempts_given_up(self, world, seed, chunks):
        engine = self.engine(world, seed=seed)
        kinds = ("none", "right", "legal", "nonsense")
        simulate(engine, lanes=5, steps=12, modes=MODES, drafts=kinds, chunks=chunks, abandon=0.1)

    @some
    @given(world=worlds(), seed=SEEDS, drafted=st.booleans())
    def test_it_holds_when_steps_are_taken_back_and_drawn_again(self, world, seed, drafted):
        engine = self.engine(world, seed=seed)
        kinds = ("none", "right", "legal") if drafted else ("none",)
        simulate(engine, lanes=4, steps=14, modes=MODES, drafts=kinds, take_back=0.3)

    @some
    @given(world=worlds(), seed=SEEDS, max_nodes=st.integers(0, 12))
    def test_it_holds_when_the_tries_have_no_room(self, world, seed, max_nodes):
        engine = self.engine(world, seed=seed, max_nodes=max_nodes)
        simulate(engine, lanes=3, steps=14, modes=MODES, drafts=("none", "legal"), tenants=2)

    @some
    @given(world=worlds(), seed=SEEDS, mode=st.sampled_from(MODES), drafted=st.booleans())
    def test_the_first_sample_of_a_fresh_trie_has_the_law_of_a_mask_alone(self, world, seed, mode, drafted):
        engine = self.engine(world, seed=seed)
        lane = engine.launch(mode, seed)
        engine.drive(lane, lambda lane: make_drafts(engine, lane, "legal") if drafted else ())
        for row in engine.trace:
            masked = np.where(world.legal(row.prefix), world.log_p(row.prefix), -INF)
            if row.log_h > -INF:
                assert np.allclose(np.exp(row.log_q), np.exp(masked - lse(masked)), atol=1e-9)
                assert row.log_used == 0.0
        if lane.ended == "completed":
            log_q = sum(row.log_q[a] for row, a in zip(engine.trace, lane.out, strict=True))
            assert math.isclose(math.exp(log_q), world.next_law({})[lane.out])

    @some
    @given(world=worlds(), seed=SEEDS, mode=st.sampled_from(MODES))
    def test_right_drafts_change_nothing_of_a_first_attempt(self, world, seed, mode):
        """On a fresh trie no prefix of the attempt has a visited child when it is drawn, so h = 1 either way."""
        plain = self.engine(world, seed=seed)
        lane = plain.drive(plain.launch(mode, seed))
        told = lane.out  # up to where it ended, so that no draft goes beyond
        for width in (2, 3, 6):
            drafted = self.engine(world, seed=seed, rows=width)
            again = drafted.launch(mode, seed)
            drafted.drive(again, lambda a, n=width - 1: told[len(a.out) : len(a.out) + n])
            assert (again.out, again.ended) == (lane.out, lane.ended)
            assert_same_result(drafted.report(again), plain.report(lane, reuse=False))
            assert_same_snapshot(snapshot(drafted.processor, KEY), snapshot(plain.processor, KEY))

    @some
    @given(world=worlds(), seed=SEEDS, mode=st.sampled_from(MODES), kind=st.sampled_from(["legal", "nonsense"]))
    def test_wrong_drafts_change_no_token_of_a_first_attempt_and_only_tighten_the_trie(self, world, seed, mode, kind):
        plain, drafted = self.engine(world, seed=seed), self.engine(world, seed=seed)
        lane, again = plain.drive(plain.launch(mode, seed)), drafted.launch(mode, seed)
        drafted.drive(again, lambda a: make_drafts(drafted, a, kind))
        assert (again.out, again.ended) == (lane.out, lane.ended)
        assert_same_result(drafted.report(again), plain.report(lane))
        known, more = snapshot(plain.processor, KEY), snapshot(drafted.processor, KEY)
        assert known.keys() <= more.keys()
        assert all(more[u][2] <= known[u][2] + 1e-6 for u in known)

    @some
    @given(world=worlds(), seed=SEEDS, junk=st.sampled_from(["none drafted", "illegal", "end"]))
    def test_drafts_that_cannot_go_on_leave_no_trace(self, world, seed, junk):
        def stuck(lane):
            if junk == "none drafted":
                return (-1, 0, 0)
            wrong = world.ends if junk == "end" else np.flatnonzero(~world.legal(lane.out)).tolist()
            return (int(wrong[-1]), 0, 0)

        plain, drafted = self.engine(world, seed=seed), self.engine(world, seed=seed)
        lane, again = plain.drive(plain.launch("exact", seed)), drafted.launch("exact", seed)
        drafted.drive(again, stuck)
        assert (again.out, again.ended) == (lane.out, lane.ended)
        assert_same_snapshot(snapshot(drafted.processor, KEY), snapshot(plain.processor, KEY))

    @some
    @given(world=worlds(), seed=SEEDS, mode=st.sampled_from(MODES), warm=st.integers(0, 4), times=st.integers(1, 3))
    def test_a_step_taken_back_draws_the_same_token_again_and_changes_no_result(self, world, seed, mode, warm, times):
        """Alone and without drafts: in between, the trie has learnt of the row, but of none of its children."""
        plain, shaken = self.engine(world, seed=seed), self.engine(world, seed=seed)
        for engine in (plain, shaken):
            for i in range(warm):
                engine.report(engine.drive(engine.launch("adaptive", seed + i)))
        lane, again = plain.drive(plain.launch(mode, seed)), shaken.launch(mode, seed)
        while again.ended is None:
            shaken.step([Feed(again)])
            for _ in range(times):
                first = again.out, again.ended
                again.revert()
                shaken.step([Feed(again)])
                assert (again.out, again.ended) == first
        assert (again.out, again.ended) == (lane.out, lane.ended)
        assert_same_result(shaken.report(again), plain.report(lane))
        assert_same_snapshot(snapshot(shaken.processor, KEY), snapshot(plain.processor, KEY))

    @some
    @given(world=worlds(), seed=SEEDS, mode=st.sampled_from(MODES))
    def test_a_step_taken_back_with_its_drafts_may_be_drawn_again_without_them(self, world, seed, mode):
        """Preemption drops a step's drafts, also where one of its later rows had thinned the attempt away."""
        engine = self.engine(world, seed=seed)
        for i in range(3):
            engine.report(engine.drive(engine.launch("adaptive", seed + i)))
        lane = engine.launch(mode, seed)
        while lane.ended is None:
            engine.step([Feed(lane, make_drafts(engine, lane, "right"))])
            lane.revert()
            engine.step([Feed(lane)])
        assert lane.ended in ("completed", "ABANDON")
        engine.check_report(lane)

    @some
    @given(world=worlds(), seed=SEEDS)
    def test_an_attempt_that_lost_more_than_one_step_ends_as_failed(self, world, seed):
        engine = self.engine(world, seed=seed)
        lane = engine.launch("exact", seed)
        for _ in range(2):
            engine.step([Feed(lane)])
            if lane.ended is not None:
                return
        lane.out, lane.doomed = (), True
        engine.expected[KEY] |= {()}
        engine.step([Feed(lane)])
        assert lane.ended == "FAILED"
        assert engine.check_report(lane)["log_v"] is None

    @some
    @given(world=worlds(), seed=SEEDS, mode=st.sampled_from(MODES), drafted=st.booleans(), late=st.integers(0, 1))
    def test_the_step_that_is_computed_behind_an_end_changes_nothing(self, world, seed, mode, drafted, late):
        """Asynchronous scheduling: vLLM drops what comes of it, and so must the trie, the weight and the state."""
        plain, asynchronous = self.engine(world, seed=seed), self.engine(world, seed=seed)
        lane, again = plain.drive(plain.launch(mode, seed)), asynchronous.drive(asynchronous.launch(mode, seed))
        beyond = late if again.ended == "completed" else 0  # no draft is a control id
        asynchronous.step([Feed(again, (0, 0) if drafted else (), late=beyond)])
        assert_same_result(asynchronous.check_report(again), plain.check_report(lane))
        assert_same_snapshot(snapshot(asynchronous.processor, KEY), snapshot(plain.processor, KEY))

    @some
    @given(world=worlds(), seed=SEEDS, mode=st.sampled_from(MODES), lengths=st.integers(1, 3))
    def test_an_entry_starts_anew_whatever_its_last_request_left_behind(self, world, seed, mode, lengths):
        """The facade gives an entry away while what its last request saw is still on its way."""
        fresh, used = self.engine(world, seed=seed), self.engine(world, seed=seed)
        lane = fresh.drive(fresh.launch(mode, seed))
        old = used.launch("exact", seed + 1, OTHER_KEY)
        for _ in range(lengths):
            if old.ended is None:
                used.step([Feed(old)])
        used.free.insert(0, old.entry)
        again = used.drive(used.launch(mode, seed))
        assert (again.out, again.ended) == (lane.out, lane.ended)
        assert_same_result(used.check_report(again), fresh.check_report(lane))
        assert_same_snapshot(snapshot(used.processor, KEY), snapshot(fresh.processor, KEY))


def assert_same_result(found, wanted):
    for name in ("state", "rows", "log_h0", "log_v", "log_bank"):
        if isinstance(wanted[name], float) and found[name] is not None:
            assert math.isclose(found[name], wanted[name], rel_tol=1e-5, abs_tol=1e-5), name
        else:
            assert found[name] == wanted[name], name


def assert_same_snapshot(found, wanted):
    assert found.keys() == wanted.keys()
    for u, numbers in wanted.items():
        for a, b in zip(found[u], numbers, strict=True):
            assert a == b or abs(math.exp(a) - math.exp(b)) < 1e-6, u
