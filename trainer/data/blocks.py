"""What lanes read: corpora that hand out blocks of documents as tokens."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


class Ragged(NamedTuple):
    """Tokens of several documents, end to end."""

    ids: NDArray[np.int32] | NDArray[np.uint16] | NDArray[np.uint32]
    """Shape [tokens]; every document that is not empty ends with the end-of-document token."""
    starts: NDArray[np.int64]
    """Shape [documents + 1]; document i is ids[starts[i] : starts[i + 1]]."""


class Place(NamedTuple):
    """Where a block of a unit begins."""

    block: int = 0
    offset: int = 0
    """What to seek to: bytes of uncompressed text, or rows of a table, before the block's first document."""


@dataclass(frozen=True)
class Block:
    """`shuffle_window` consecutive document numbers of a unit."""

    place: Place
    documents: Sequence[int]
    """Which of the numbers 0 .. shuffle_window - 1 have a document, ascending."""
    encode: Callable[[Sequence[int]], Ragged]
    """Tokens of some of these documents, in the order asked for."""


class Corpus(Protocol):
    """Documents of one corpus, cut into shards.

    A unit is part `part` of `parts` of a shard: its documents part, part + parts, part + 2 parts, ...; its
    block b holds those with numbers b * shuffle_window to (b + 1) * shuffle_window - 1 in the unit. Damaged
    and absent documents keep their number.
    """

    addresses: Sequence[str]
    """Where the shards lie, for messages."""
    documents_per_encode: int
    """How many documents are best encoded at once."""

    def blocks(self, shard: int, part: int, parts: int, start: Place) -> Generator[Block]:
        """Blocks of a unit from a place on, in order; blocks without any document may be left out."""
        ...
