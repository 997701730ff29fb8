"""Which corpus and lane the i-th row of a run comes from, and which rank computes it."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


class Mixture:
    """Deals rows to corpora in closed form, so that proportions hold in every stretch of the run.

    With share w of the first corpus, row i is its own when floor((i + 1) w) > floor(i w); the rows
    left over are dealt to the other corpora in the same way. In any K rows the first corpus is
    within one row of its share, the k-th within k. Corpora stand in order of falling weight.
    """

    def __init__(self, weights: dict[str, float]) -> None:
        exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
        self.corpora = sorted(exact, key=lambda name: (-exact[name], name))
        rest = sum(exact.values(), Fraction(0))
        self._shares: list[Fraction] = []
        for name in self.corpora[:-1]:
            self._shares.append(exact[name] / rest)
            rest -= exact[name]

    def corpus(self, first: int, count: int) -> NDArray[np.int64]:
        """Indices into `corpora` of the corpora that `count` rows from row `first` on come from."""
        chosen = np.full(count, len(self._shares))
        left = np.arange(count)
        for index, share in enumerate(self._shares):
            before, remainder = divmod(first * share.numerator, share.denominator)
            # Weights with many digits make fractions beyond 64 bits; Python's integers take over.
            fits = share.denominator * (len(left) + 2) < 2**63
            steps = np.arange(len(left) + 1, dtype=np.int64 if fits else object)
            own = np.diff((remainder + steps * share.numerator) // share.denominator).astype(bool)
            chosen[left[own]] = index
            left = left[~own]
            first -= before
        return chosen


class Order:
    """Row i of the run is the next row of lane (i + turn(i div V)) mod V of its corpus.

    With one corpus the turn is 0 and row i is position i div V of lane i mod V. With several, a
    weight such as 0.5 would give every corpus half of the lanes for ever and leave its documents in
    the other half unread; a pseudo-random turn per V rows lets each lane meet every corpus.
    """

    def __init__(self, weights: dict[str, float], lanes: int, seed: int) -> None:
        self.mixture = Mixture(weights)
        self.lanes = lanes
        self._seed = seed

    def sources(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Corpus index and lane, both [count], of the rows from `first` on; the run begins with row 0."""
        return self.mixture.corpus(first, count), self._lanes(first, count)

    def rows_of_rank(self, first: int, count: int, rank: int, world_size: int) -> NDArray[np.int64]:
        """The rows among `count` from `first` on that a rank computes, ascending; world_size divides count.

        Rows of a lane stay with a rank from batch to batch wherever lanes and batch are multiples
        of the world size, so that a rank reads only its own lanes.
        """
        by_rank = np.argsort(self._lanes(first, count) % world_size, kind="stable")
        share = count // world_size
        return first + np.sort(by_rank[rank * share : (rank + 1) * share])

    def _lanes(self, first: int, count: int) -> NDArray[np.int64]:
        rows = np.arange(first, first + count)
        stripes = rows // self.lanes
        turns = np.array([self._turn(stripe) for stripe in range(stripes[0], stripes[-1] + 1)])
        lanes: NDArray[np.int64] = (rows + turns[stripes - stripes[0]]) % self.lanes
        return lanes

    def _turn(self, stripe: int) -> int:
        if len(self.mixture.corpora) == 1:
            return 0
        digest = hashlib.blake2b(f"{self._seed}/{stripe}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.lanes
