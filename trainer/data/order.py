"""Which corpus and lane the i-th row of a run comes from, and which rank computes it."""

from __future__ import annotations

import hashlib
from fractions import Fraction


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

    def corpus(self, row: int) -> int:
        """Index into `corpora` of the corpus that a row of the run comes from."""
        for index, share in enumerate(self._shares):
            before = row * share.numerator // share.denominator
            if (row + 1) * share.numerator // share.denominator > before:
                return index
            row -= before
        return len(self._shares)


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

    def source(self, row: int) -> tuple[int, int]:
        """(corpus index, lane) of row `row`, counted from the start of the run."""
        return self.mixture.corpus(row), (row + self._turn(row // self.lanes)) % self.lanes

    def rows_of_rank(self, first: int, count: int, rank: int, world_size: int) -> list[int]:
        """The rows among `count` from `first` on that a rank computes; world_size divides count.

        Rows of a lane stay with a rank from batch to batch wherever lanes and batch are multiples
        of the world size, so that a rank reads only its own lanes.
        """
        rows = sorted(range(first, first + count), key=lambda row: (self.source(row)[1] % world_size, row))
        share = count // world_size
        return sorted(rows[rank * share : (rank + 1) * share])

    def _turn(self, stripe: int) -> int:
        if len(self.mixture.corpora) == 1:
            return 0
        digest = hashlib.blake2b(f"{self._seed}/{stripe}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.lanes
