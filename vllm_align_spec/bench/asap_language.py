"""A finite language under a model, by enumeration: what samplers are held against."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class Language:
    """Strings of bits, one token a bit, and the model's rows after each prefix of theirs.

    Args:
        strings: the language.
        rows: prefix -> log P of the next token, [V], over the whole vocabulary.
        bits: token ids of "0" and "1".
        end: token id of the end.
    """

    def __init__(self, strings: Sequence[str], rows: Mapping[str, Floats], bits: tuple[int, int], end: int) -> None:
        self.strings = list(strings)
        self._at = {string: i for i, string in enumerate(self.strings)}
        prefixes = {string[:i] for string in self.strings for i in range(len(string) + 1)}
        # prefix -> (what it becomes, log P of that); a legal end becomes None
        self._next: dict[str, list[tuple[str | None, float]]] = {}
        for u in prefixes:
            legal: list[tuple[str | None, float]] = [
                (u + bit, float(rows[u][bits[int(bit)]])) for bit in "01" if u + bit in prefixes
            ]
            self._next[u] = legal + ([(None, float(rows[u][end]))] if u in self._at else [])
        log_p = np.array([self._log_p(string) for string in self.strings])
        self.log_mass = float(np.logaddexp.reduce(log_p))
        self.law: Floats = np.exp(log_p - self.log_mass)
        """Truth: the model's law given the language."""
        self.log_p: Floats = log_p

    def _log_p(self, string: str) -> float:
        steps = [*(string[: i + 1] for i in range(len(string))), None]
        return sum(dict(self._next[string[:i]])[step] for i, step in enumerate(steps))

    def next_law(self, visited: Collection[str]) -> Floats:
        """Law of ASAp's next sample when these prefixes have nodes; without any, that of a mask alone."""
        bound: dict[str, float] = {}
        for u in sorted(visited, key=len, reverse=True):
            bound[u] = math.fsum(math.exp(p) * (bound.get(v, 1.0) if v is not None else 1.0) for v, p in self._next[u])
        law = np.zeros(len(self.strings))

        def walk(u: str, q: float) -> None:
            weights = [math.exp(p) * (bound.get(v, 1.0) if v is not None else 1.0) for v, p in self._next[u]]
            for (v, _), weight in zip(self._next[u], weights, strict=True):
                share = q * weight / math.fsum(weights)
                if v is None:
                    law[self._at[u]] = share
                else:
                    walk(v, share)

        walk("", 1.0)
        return law

    def counts(self, found: Sequence[str], weights: Sequence[float] | None = None) -> Floats:
        """Share of each string among samples.

        Raises:
            KeyError: one is not of the language.
        """
        counts = np.zeros(len(self.strings))
        np.add.at(counts, [self._at[string] for string in found], 1.0 if weights is None else np.asarray(weights))
        shares: Floats = counts / counts.sum()
        return shares

    def distance(self, law: Floats) -> float:
        """Total variation to the truth."""
        return float(0.5 * np.abs(law - self.law).sum())

    def noise(self, size: int, draws: int = 4000) -> Floats:
        """Total variation to the truth of as many samples of the truth itself, many times over."""
        law = self.law / self.law.sum()
        counts = np.random.default_rng(0).multinomial(size, law, size=draws)
        return np.asarray(0.5 * np.abs(counts / size - law).sum(1))


def prefixes(strings: Collection[str]) -> set[str]:
    """Every prefix of the strings, themselves included."""
    return {string[:i] for string in strings for i in range(len(string) + 1)}
