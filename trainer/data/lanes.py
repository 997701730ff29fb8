"""One lane of one corpus: an endless sequence of rows that any position can be resumed from.

A corpus of S shards is cut into units, a unit being a shard or, where shards are few, every n-th
document of one. Each epoch permutes the units and deals them to the V lanes. Inside a unit, blocks
of `shuffle_window` document numbers are permuted. Permutations come from a counter-based generator keyed by
(seed, corpus, epoch, ...), so no shuffle buffer has to be saved.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, wait
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.schema import ConfigError
from configs.text import Data
from trainer.data.blocks import Block, Corpus, Place, Tokens
from trainer.data.packing import best_fit
from trainer.data.workers import Workers

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
    offset: int = 0
    """What to seek to for the block, see Place."""
    item: int = 0
    """Position in the permuted block, whether its documents could be read or not; with best_fit, row of the
    packed block."""
    token: int = 0
    """Offset in the document; 0 with best_fit."""

    def cursor(self) -> Cursor:
        """Itself, as it is worked out already; see Mark."""
        return self


class Chunk(NamedTuple):
    """Documents in the lane's order, end to end, or packed rows."""

    at: Cursor
    """Of the block."""
    tokens: NDArray[np.int32] | NDArray[np.uint16] | NDArray[np.uint32]
    """Shape [tokens]; rows of best_fit are end to end as well."""
    starts: NDArray[np.int64]
    """First token of every item, ascending."""
    items: NDArray[np.int64]
    """Their positions in the block."""
    begin: int = 0
    """Tokens that the rows before a resume have used up."""


class Mark(NamedTuple):
    """A cursor that is only worked out where it is needed, which is seldom."""

    chunk: Chunk
    token: int
    """Of the next row, in the chunk."""
    rows: int

    @property
    def epoch(self) -> int:
        return self.chunk.at.epoch

    def cursor(self) -> Cursor:
        chunk = self.chunk
        if self.token == len(chunk.tokens):  # only packed rows end where a block does
            return chunk.at._replace(rows=self.rows, item=int(chunk.items[-1]) + 1)
        index = int(np.searchsorted(chunk.starts, self.token, side="right")) - 1
        item, token = int(chunk.items[index]), self.token - int(chunk.starts[index])
        return chunk.at._replace(rows=self.rows, item=item, token=token)


def permutation(length: int, *key: object) -> NDArray[np.int64]:
    """A permutation of range(length) that depends on nothing but its key.

    Sorts raw Philox output, whose stream is fixed by its definition (Salmon et al. 2011), unlike
    the shuffles of numpy's Generator, which may change between versions.
    """
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()
    bits = np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64))
    return np.argsort(np.atleast_1d(bits.random_raw(length)), kind="stable")


_shard_order = lru_cache(maxsize=64)(permutation)  # the same for all lanes of a corpus


def _is_behind(token: int, chunk: Chunk, packed: bool) -> bool:
    """Whether a row that begins at a token begins behind a chunk.

    The end of packed rows is still theirs, since what follows may not have been read; rows that are cut begin
    with a token that has been.
    """
    return token > len(chunk.tokens) if packed else token >= len(chunk.tokens)


class Taken(NamedTuple):
    """What rows were taken from."""

    chunks: tuple[Chunk, ...]
    offset: int
    """Of the first of them, in the first chunk."""
    stride: int
    """Tokens from row to row."""
    rows: int
    """Number of the first of them."""
    packed: bool

    def mark(self, count: int) -> Mark:
        """Where the lane stood after `count` of them."""
        token, index = self.offset + count * self.stride, 0
        while _is_behind(token, self.chunks[index], self.packed):
            token -= len(self.chunks[index].tokens)
            index += 1
        return Mark(self.chunks[index], token, self.rows + count)


class Lane:
    """Rows of one lane of one corpus, from a cursor on."""

    def __init__(
        self,
        name: str,
        number: int,
        corpus: Corpus,
        data: Data,
        *,
        sequence_length: int,
        seed: int,
        cursor: Cursor,
        workers: Workers,
    ) -> None:
        self.name = name
        self.number = number
        self.rows = cursor.rows
        """Number of the next row."""
        self.reading = ""
        """Shard that is being read, for messages."""
        self._corpus = corpus
        self._lanes = data.lanes
        self._window = data.shuffle_window
        self._packed = data.packing == "best_fit"
        self._row_tokens = sequence_length + 1
        # Rows that are cut overlap by one token, so that every token is a target once; packed ones do not.
        self._stride = self._row_tokens if self._packed else sequence_length
        self._seed = seed
        self._slices = slices(len(corpus.addresses), data.lanes)
        self._chunks = self._read(cursor)
        self._workers = workers
        self._ahead: Future[Chunk] = workers.submit(self._chunks.__next__)
        self._begun_at = cursor
        self._held: deque[Chunk] = deque()
        self._held_tokens = 0
        self._offset = 0
        """Of the next row, in the first chunk that is held."""

    @property
    def mark(self) -> Mark | Cursor:
        """Where the next row begins."""
        return Mark(self._held[0], self._offset, self.rows) if self._held else self._begun_at

    def take(self, count: int) -> tuple[Tokens, Taken]:
        """The next rows, shape [count, sequence_length + 1], to be copied, and what they are from."""
        needed = (count - 1) * self._stride + self._row_tokens
        while self._held_tokens - self._offset < needed:
            chunk = self._ahead.result()
            self._ahead = self._workers.submit(self._chunks.__next__)
            if not self._held:
                self._offset = chunk.begin
            self._held.append(chunk)
            self._held_tokens += len(chunk.tokens)
        tokens, first = self._held[0].tokens, self._offset
        if len(tokens) - first < needed:
            tokens = np.concatenate([tokens[first:], *(chunk.tokens for chunk in list(self._held)[1:])])
            first = 0
        size, shape = tokens.itemsize, (count, self._row_tokens)
        rows: Tokens = np.ndarray(shape, tokens.dtype, tokens.data, first * size, (self._stride * size, size))
        taken = Taken(tuple(self._held), self._offset, self._stride, self.rows, self._packed)
        self.rows += count
        self._offset += count * self._stride
        while _is_behind(self._offset, self._held[0], self._packed):
            done = len(self._held.popleft().tokens)
            self._offset -= done
            self._held_tokens -= done
        return rows, taken

    def close(self, patience_seconds: float) -> None:
        """Close the shard that is being read, unless the store does not answer in time."""
        if not self._ahead.cancel():
            wait([self._ahead], max(0.0, patience_seconds))
        if self._ahead.done():
            self._chunks.close()

    def _read(self, cursor: Cursor) -> Generator[Chunk, None, None]:
        """The lane's documents from a cursor on, endless."""
        start, epoch, barren_epochs = cursor, cursor.epoch, 0
        while barren_epochs < BARREN_EPOCHS:
            barren_epochs += 1
            for unit, (shard, part) in enumerate(self._units(epoch)):
                if unit < start.unit:
                    continue
                self.reading = self._corpus.addresses[shard]
                place = Place(start.block, start.offset)
                for block in self._corpus.blocks(shard, part, self._slices, place):
                    key = (self._seed, self.name, epoch, shard, part, block.place.block)
                    here = start if block.place.block == start.block else Cursor()
                    for chunk in self._pack(block, Cursor(0, epoch, unit, *block.place), here, key):
                        barren_epochs = 0
                        yield chunk
                start = Cursor()
            epoch += 1
        raise ConfigError(
            f"data.lanes={self._lanes}: corpus {self.name} has too few readable documents, "
            f"lane {self.number} got none; use fewer lanes or more text"
        )

    def _pack(self, block: Block, at: Cursor, start: Cursor, key: tuple[object, ...]) -> Iterator[Chunk]:
        """A block's documents or packed rows, permuted, those before `start` left out."""
        order = permutation(self._window, *key)
        present = np.zeros(self._window, dtype=bool)
        present[block.documents] = True
        items = np.flatnonzero(present[order])
        if self._packed:
            rows = best_fit(block.encode(order[items].tolist()), self._row_tokens)
            rows = rows[permutation(len(rows), *key, "rows")][start.item :]
            if len(rows):
                starts = np.arange(len(rows)) * self._row_tokens
                numbers = np.arange(start.item, start.item + len(rows))
                yield Chunk(at, rows.ravel(), starts, numbers, start.token)
            return
        items = items[items >= start.item]
        for first in range(0, len(items), self._corpus.documents_per_encode):
            some = items[first : first + self._corpus.documents_per_encode]
            tokens, starts = block.encode(order[some].tolist())
            if len(tokens):
                begin = start.token if first == 0 and some[0] == start.item else 0
                yield Chunk(at, tokens, starts[:-1], some, begin)

    def _units(self, epoch: int) -> list[tuple[int, int]]:
        """(shard, part) pairs of this lane in an epoch.

        The parts of a shard are dealt one after the other, so that lanes read it at the same time.
        """
        shards = _shard_order(len(self._corpus.addresses), self._seed, self.name, epoch)
        units = []
        for unit in range(self.number, len(shards) * self._slices, self._lanes):
            place, part = divmod(unit, self._slices)
            parts = permutation(self._slices, self._seed, self.name, epoch, int(shards[place]))
            units.append((int(shards[place]), int(parts[part])))
        return units


def slices(shards: int, lanes: int) -> int:
    """Parts that each shard is cut into. Each part reads all of its shard, so no more than balance needs."""
    equal, balanced = lanes // math.gcd(shards, lanes), BALANCED_UNITS_PER_LANE * lanes / shards
    return min(equal, math.ceil(balanced))
