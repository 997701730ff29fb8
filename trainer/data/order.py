"""Which corpus and lane the i-th row of a run comes from, and which rank computes it."""

from __future__ import annotations

import hashlib
import heapq
import math
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from configs.schema import ConfigError, Data

PARTS = 65_536
"""Most rows after which a mixture repeats, so the smallest share of a corpus is one row of these."""
_DECIMAL = Context(prec=50)  # powers that are the same on every machine, which those of floats are not


class Mixture:
    """Deals rows to corpora with exact proportions: in the first n rows a corpus has its share of n, to
    within 1 - 1 / (2 K - 2) rows, K being the number of corpora with a share.

    So in any stretch of the run it is within two rows of its share, with two corpora within one. Within one
    for three or more has no solution for most shares (balanced words; Fraenkel's conjecture). Shares are
    `counts` rows in each period of sum(counts).
    """

    def __init__(self, counts: tuple[int, ...]) -> None:
        self.counts = counts
        self.period = sum(counts)
        self._dealt = _assignment(counts)

    def corpus(self, first: int, count: int) -> NDArray[np.int64]:
        """Indices into `counts` of the corpora that `count` rows from row `first` on come from."""
        begin = first % self.period
        periods = -(-(begin + count) // self.period)
        return np.tile(self._dealt, periods)[begin : begin + count].astype(np.int64)

    def rows(self, rows: int) -> NDArray[np.int64]:
        """How many of the first `rows` rows each corpus has."""
        periods, rest = divmod(rows, self.period)
        counted: NDArray[np.int64] = periods * np.array(self.counts)
        counted += np.bincount(self._dealt[:rest], minlength=len(self.counts))
        return counted


class Order:
    """Row i of the run is the next row of lane (i + turn(i div V)) mod V of its corpus.

    With one corpus the turn is 0 and row i is position i div V of lane i mod V. With several, a
    weight such as 0.5 would give every corpus half of the lanes for ever and leave its documents in
    the other half unread; a pseudo-random turn per V rows lets each lane meet every corpus.

    A stage that ends at n tokens has all rows that begin before, a row being `sequence_length` tokens: row
    ceil(n / sequence_length) is the first of the next stage, whose mixture begins anew there.
    """

    def __init__(self, data: Data, sequence_length: int, seed: int) -> None:
        """Raises ConfigError for a weight that is too small beside the others."""
        self.lanes = data.lanes
        self.corpora = sorted(name for name, corpus in data.corpora.items() if corpus.train)
        """Names of all corpora with train shards; those that rest in every stage never have a row."""
        self._key = np.frombuffer(hashlib.blake2b(f"turns/{seed}".encode(), digest_size=8).digest(), "<u8")
        own = {name: data.corpora[name].weight for name in self.corpora}
        stages = {f"data.stages[{n}].weights.%s": stage.weights for n, stage in enumerate(data.stages)}
        self._mixtures = [
            Mixture(shares([weights.get(name, 0.0) for name in self.corpora], data.temperature, keys))
            for key, weights in (stages or {"data.corpora.%s.weight": own}).items()
            for keys in [[key % name for name in self.corpora]]
        ]
        self._begins = [0]
        """First row of each stage."""
        for stage in data.stages[:-1]:
            assert stage.until_tokens is not None
            self._begins.append(-(-stage.until_tokens // sequence_length))

    def sources(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Index into `corpora` and lane, both [count], of the rows from `first` on, counted from 0."""
        dealt = [mixture.corpus(begin, rows) for mixture, begin, rows in self._parts(first, count)]
        return np.concatenate([np.empty(0, np.int64), *dealt]), self._lanes(first, count)

    def rows_of(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` rows of the run come from each corpus."""
        dealt = np.zeros(len(self.corpora), np.int64)
        for mixture, _, count in self._parts(0, rows):
            dealt += mixture.rows(count)
        return dict(zip(self.corpora, dealt.tolist(), strict=True))

    def rows_of_rank(self, first: int, count: int, rank: int, world_size: int) -> NDArray[np.int64]:
        """The rows among `count` from `first` on that a rank computes, ascending; world_size divides count.

        A rank reads all of a lane that it has a row of. Of V lanes and W ranks it reads, for good, no more
        than V / gcd(V, W): its own V / W and nothing that others compute where W divides V. Where V
        divides `count`, it reads no more than V / W rounded up, and one.
        """
        lanes = self._lanes(first, count)
        groups = math.gcd(self.lanes, world_size)  # each has as many lanes, ranks, and rows of every batch
        by_rank = np.argsort(lanes % groups * self.lanes + lanes, kind="stable")
        share = count // world_size
        return first + np.sort(by_rank[rank * share : (rank + 1) * share])

    def _parts(self, first: int, count: int) -> list[tuple[Mixture, int, int]]:
        """Rows from `first` on as runs of (mixture, first row in its stage, rows)."""
        parts = []
        ends = [*self._begins, first + count]
        for mixture, (begin, end) in zip(self._mixtures, pairwise(ends), strict=True):
            start = max(first, begin)
            rows = min(first + count, end) - start
            if rows > 0:
                parts.append((mixture, start - begin, rows))
        return parts

    def _lanes(self, first: int, count: int) -> NDArray[np.int64]:
        skipped = first % self.lanes
        stripes = -(-(skipped + count) // self.lanes)
        lanes = np.arange(self.lanes) + self._turns(first // self.lanes, stripes)[:, None]
        lanes %= self.lanes
        return lanes.ravel()[skipped : skipped + count]

    def _turns(self, first: int, count: int) -> NDArray[np.int64]:
        """Turns of stripes: SplitMix64 (Steele, Lea and Flood 2014) from a hash of the seed on, modulo V."""
        if len(self.corpora) == 1:
            return np.zeros(count, np.int64)
        state = np.arange(first + 1, first + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state += self._key
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
        return (state % np.uint64(self.lanes)).astype(np.int64)


def shares(weights: list[float], temperature: float, keys: list[str]) -> tuple[int, ...]:
    """Rows of each corpus in a period of at most PARTS rows, in lowest terms.

    Exact where the weights' common denominator allows it; else rounded to PARTS by largest remainder, which
    moves a share by less than 1 / PARTS. Raises ConfigError, by keys, for a share that is less than that.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    if temperature != 1:
        largest = _decimal(max(exact))
        power = _DECIMAL.divide(Decimal(1), Decimal(str(temperature)))
        exact = [
            Fraction(_DECIMAL.power(_DECIMAL.divide(_decimal(weight), largest), power)) if weight else weight
            for weight in exact
        ]
    total = sum(exact, Fraction(0))
    parts = [weight / total for weight in exact]
    for key, weight, share in zip(keys, weights, parts, strict=True):
        if weight and share < Fraction(1, PARTS):
            raise ConfigError(
                f"{key}={weight:g}: is {float(share):.2g} of the rows, must be at least 1/{PARTS}"
            )
    period = math.lcm(*(share.denominator for share in parts))
    if period <= PARTS:
        return tuple(int(share * period) for share in parts)
    counts = [math.floor(share * PARTS) for share in parts]
    by_remainder = sorted(range(len(counts)), key=lambda index: (counts[index] - parts[index] * PARTS, index))
    for index in by_remainder[: PARTS - sum(counts)]:
        counts[index] += 1
    common = math.gcd(*counts)
    return tuple(count // common for count in counts)


def _decimal(value: Fraction) -> Decimal:
    return _DECIMAL.divide(Decimal(value.numerator), Decimal(value.denominator))


@lru_cache(maxsize=64)
def _assignment(counts: tuple[int, ...]) -> NDArray[np.uint16]:
    """Corpora of the rows of one period: the chairman assignment (Tijdeman 1980), shape [sum(counts)].

    With D rows in a period, a of them a corpus's own and c = 1 / (2 K - 2), its j-th row comes no earlier
    than row ceil((j - 1 + c) D / a) and no later than row floor((j - c) D / a) + 1, counted from 1. Dealing
    each row to the corpus with the earliest deadline keeps all of them.
    """
    active = [corpus for corpus, own in enumerate(counts) if own]
    period = sum(counts)
    if len(active) == 1:
        return np.full(period, active[0], np.uint16)
    unit = 2 * len(active) - 2
    releases, deadlines = [], []
    for corpus in active:
        last = np.arange(1, counts[corpus] + 1) * unit  # j / c
        releases.append(-(-(last - unit + 1) * period // (unit * counts[corpus])))
        deadline = (last - 1) * period // (unit * counts[corpus]) + 1
        deadlines.append(deadline * len(counts) + corpus)
    release, jobs = np.concatenate(releases), np.concatenate(deadlines)
    order = np.argsort(release, kind="stable")
    waiting: list[int] = []
    dealt = []
    released = iter(zip(release[order].tolist(), jobs[order].tolist(), strict=True))
    upcoming = next(released, None)
    for row in range(1, period + 1):
        while upcoming is not None and upcoming[0] <= row:
            heapq.heappush(waiting, upcoming[1])
            upcoming = next(released, None)
        dealt.append(heapq.heappop(waiting) % len(counts))
    table = np.array(dealt, np.uint16)
    table.flags.writeable = False
    return table
