"""One lane of one corpus: an endless sequence of rows that any position can be resumed from.

A corpus of S shards is cut into units, a unit being a shard or, where shards are few, every n-th
document of one. Each epoch permutes the units and deals them to the V lanes. Inside a unit, blocks
of `shuffle_window` document numbers are permuted. Permutations come from a counter-based generator keyed by
(seed, corpus, epoch, ...), so no shuffle buffer has to be saved. Documents are concatenated, each
ended by the end-of-document token, and cut into rows of sequence_length + 1 tokens that overlap by
one, so that every token is a target once.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.schema import ConfigError
from trainer.data.damage import Damage
from trainer.data.shards import Shard, documents
from trainer.data.tokenizer import DOCUMENTS_PER_ENCODE, DocumentTokenizer, Tokens

BALANCED_UNITS_PER_LANE = 16
"""With so many units per lane, lanes differ by no more than 1/16 and shards need no finer cut."""
BARREN_EPOCHS = 16
"""Epochs in a row in which damage may leave a lane without a document."""


class Cursor(NamedTuple):
    """Where the next row of a lane begins. Everything that has to be saved of a lane."""

    rows: int = 0
    """Rows emitted since the run began."""
    epoch: int = 0
    unit: int = 0
    """Position among the lane's units of this epoch."""
    block: int = 0
    document: int = 0
    """Position in the permuted block, whether its documents could be read or not."""
    token: int = 0
    """Offset in the document."""


def permutation(length: int, *key: object) -> NDArray[np.int64]:
    """A permutation of range(length) that depends on nothing but its key.

    Sorts raw Philox output, whose stream is fixed by its definition (Salmon et al. 2011), unlike
    the shuffles of numpy's Generator, which may change between versions.
    """
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()
    bits = np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64))
    return np.argsort(np.atleast_1d(bits.random_raw(length)), kind="stable")


_unit_order = lru_cache(maxsize=64)(permutation)  # the same for all lanes of a corpus, and long with many


class Lane:
    """Rows of one lane of one corpus, from a cursor on."""

    def __init__(
        self,
        corpus: str,
        shards: list[Shard],
        text_field: str,
        tokenizer: DocumentTokenizer,
        *,
        lane: int,
        lanes: int,
        sequence_length: int,
        shuffle_window: int,
        seed: int,
        on_damage: Callable[[Damage], None],
        cursor: Cursor,
    ) -> None:
        self.cursor = cursor
        self._corpus = corpus
        self._shards = shards
        self._text_field = text_field
        self._tokenizer = tokenizer
        self._lane = lane
        self._lanes = lanes
        self._row_tokens = sequence_length + 1
        self._window = shuffle_window
        self._seed = seed
        self._on_damage = on_damage
        self._damages = 0
        # Each slice of a shard reads all of it, so shards are cut no finer than balance needs.
        equal, balanced = lanes // math.gcd(len(shards), lanes), BALANCED_UNITS_PER_LANE * lanes / len(shards)
        self._slices = min(equal, math.ceil(balanced))
        self._source = self._documents(cursor)
        self._pending: deque[tuple[Cursor, Tokens]] = deque()

    def next_row(self) -> Tokens:
        """The next row, shape [sequence_length + 1]; moves the cursor behind it."""
        row = np.empty(self._row_tokens, dtype=np.int32)
        filled = index = 0
        while True:
            if index == len(self._pending):
                self._pending.append(next(self._source))
            start, tokens = self._pending[index]
            taken = tokens[start.token : start.token + self._row_tokens - filled]
            row[filled : filled + len(taken)] = taken
            filled += len(taken)
            if filled == self._row_tokens:
                break
            index += 1
        for _ in range(index):
            self._pending.popleft()
        last = start.token + len(taken) - 1
        self._pending[0] = (start._replace(token=last), tokens)
        self.cursor = start._replace(token=last, rows=self.cursor.rows + 1)
        return row

    def close(self) -> None:
        """Close the shard that is being read."""
        self._source.close()

    def _documents(self, cursor: Cursor) -> Generator[tuple[Cursor, Tokens], None, None]:
        """Position and tokens of each document in the lane's order, endless."""
        start = cursor._replace(rows=0, token=0)
        epoch, from_unit, from_block = start[1:4]
        barren_epochs = 0
        while True:
            empty, damages = from_unit == 0, self._damages
            for unit, (shard, part) in enumerate(self._units(epoch)):
                if unit < from_unit:
                    continue
                for block, texts in self._blocks(shard, part, from_block):
                    order = permutation(self._window, self._seed, self._corpus, epoch, shard, part, block)
                    ordered = [
                        (here, texts[number])
                        for document, number in enumerate(order.tolist())
                        if number in texts and (here := Cursor(0, epoch, unit, block, document)) >= start
                    ]
                    for first in range(0, len(ordered), DOCUMENTS_PER_ENCODE):
                        places, chosen = zip(*ordered[first : first + DOCUMENTS_PER_ENCODE], strict=True)
                        for here, tokens in zip(places, self._tokenizer.encode(chosen), strict=True):
                            if len(tokens):
                                empty = False
                                yield here._replace(token=cursor.token) if here == start else here, tokens
                from_block = 0
            barren_epochs = barren_epochs + 1 if empty else 0
            if empty and (damages == self._damages or barren_epochs == BARREN_EPOCHS):
                raise ConfigError(
                    f"data.lanes={self._lanes}: corpus {self._corpus} has too few readable documents, "
                    f"lane {self._lane} got none; use fewer lanes or more text"
                )
            epoch, from_unit = epoch + 1, 0

    def _units(self, epoch: int) -> list[tuple[int, int]]:
        """(shard, slice) pairs of this lane in an epoch."""
        count = len(self._shards) * self._slices
        order = _unit_order(count, self._seed, self._corpus, epoch)
        return [divmod(int(order[unit]), self._slices) for unit in range(self._lane, count, self._lanes)]

    def _blocks(self, shard: int, part: int, from_block: int) -> Iterator[tuple[int, dict[int, str]]]:
        """Number of each of a unit's blocks, and its texts by their place in `shuffle_window` numbers."""
        span = self._window * self._slices
        block, texts = from_block, dict[int, str]()
        found = documents(
            self._shards[shard], self._text_field, self._damaged, part + from_block * span, self._slices
        )
        for number, text in found:
            if number // span != block:
                if texts:
                    yield block, texts
                block, texts = number // span, {}
            texts[number % span // self._slices] = text
        if texts:
            yield block, texts

    def _damaged(self, damage: Damage) -> None:
        self._damages += 1
        self._on_damage(damage)
