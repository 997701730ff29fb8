"""Batches of a rank, prepared ahead by a thread, and the position that a checkpoint stores."""

from __future__ import annotations

import queue
import resource
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.schema import Config
from trainer.data.blocks import Corpus, Tokens
from trainer.data.damage import Unavailable
from trainer.data.lanes import Cursor, Lane, Mark, Taken
from trainer.data.order import Order
from trainer.data.workers import Workers

PATIENCE_SECONDS = 1.0
CLOSE_SECONDS = 10.0
ROWS_AT_ONCE = 512
"""Rows that are prepared together, unless they make more batches than are prefetched."""
SKIPPED_AT_ONCE = 64
"""Rows of other ranks that are read past in one go."""

Cursors = dict[tuple[str, int], Cursor]
"""(corpus, lane) -> cursor."""
Marks = Mapping[tuple[str, int], Cursor | Mark]
OTHER_OPEN_FILES = 1024


@dataclass(frozen=True)
class Position:
    """How far the run has read: rows consumed by all ranks, and the cursors of lanes this rank read.

    Rank 0 also keeps the cursors that a resumed run began with, so that all ranks' positions merged
    hold every lane, and ranks tell each other nothing twice.
    """

    rows: int
    marks: Marks

    @property
    def cursors(self) -> Cursors:
        return {key: mark.cursor() for key, mark in self.marks.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return Position, (self.rows, self.cursors)

    @classmethod
    def merged(cls, positions: list[Position]) -> Position:
        """One position from all ranks': of each lane, the cursor of the rank that read furthest."""
        cursors: Cursors = {}
        for position in positions:
            for key, cursor in position.cursors.items():
                if key not in cursors or cursor.rows > cursors[key].rows:
                    cursors[key] = cursor
        return cls(positions[0].rows, cursors)

    def to_json(self) -> dict[str, Any]:
        lanes = [[corpus, lane, *cursor] for (corpus, lane), cursor in sorted(self.cursors.items())]
        return {"rows": self.rows, "lanes": lanes}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Position:
        return cls(value["rows"], {(c, lane): Cursor(*cursor) for c, lane, *cursor in value["lanes"]})


class Stretch(NamedTuple):
    """Where lanes stood when batches were prepared that are prepared together."""

    first: int
    """First row of the first batch."""
    before: dict[tuple[str, int], Cursor | Mark]
    taken: list[tuple[tuple[str, int], Taken, NDArray[np.int64]]]
    """Of lanes that were read: what from, and how many rows up to the end of each batch."""

    def position(self, batch: int, global_batch: int) -> Position:
        """Of the run, after a batch."""
        marks = dict(self.before)
        for key, taken, counts in self.taken:
            if counts[batch]:
                marks[key] = taken.mark(int(counts[batch]))
        return Position(self.first + (batch + 1) * global_batch, marks)


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one global batch."""

    rows: Tokens
    """Shape [global_batch / world_size, sequence_length + 1]."""
    _stretch: Stretch
    _index: int
    _global_batch: int

    @property
    def position(self) -> Position:
        """Where the run stands once this batch is consumed."""
        return self._stretch.position(self._index, self._global_batch)


class Loader:
    """Deals out this rank's batches in order, from a position on.

    A lane's rows are read by the rank that owns them. Where lanes or global batch are no multiple of the
    world size, some lanes serve two ranks or more; each of them reads all of such a lane.
    """

    def __init__(
        self,
        config: Config,
        corpora: dict[str, Corpus],
        *,
        rank: int,
        world_size: int,
        position: Position,
    ) -> None:
        self._order = Order(config.data, config.model.sequence_length, config.seed)
        self._config = config
        self._corpora = corpora
        self._rank = rank
        self._world_size = world_size
        self._begun_at = position.cursors
        self._marks: dict[tuple[str, int], Cursor | Mark] = dict(self._begun_at) if rank == 0 else {}
        self._lanes: dict[int, Lane] = {}
        self._dealt = [0] * (len(corpora) * config.data.lanes)
        """Rows dealt to all ranks, by stream: a corpus's index times the lanes, and the lane."""
        for (name, lane), cursor in self._begun_at.items():
            self._dealt[self._order.corpora.index(name) * config.data.lanes + lane] = cursor.rows
        self._waiting_for: Lane | None = None
        # Tokens are read faster than handed from thread to thread.
        self._workers = Workers(0 if config.data.tokenized else config.data.workers)
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(config.data.prefetch_batches)
        self._closed = threading.Event()
        _allow_open_files(len(corpora) * config.data.lanes)
        self._thread = threading.Thread(target=self._produce, args=(position.rows,), daemon=True)
        self._thread.start()

    def next_batch(self, give_up: Callable[[], bool] = lambda: False) -> Batch | None:
        """The next batch, or None if it is slow to come and `give_up` says so.

        Raises Unavailable if it does not come at all, and what the preparing threads met, ConfigError for a
        user's mistake.
        """
        until = time.monotonic() + self._config.data.retry.stall_seconds
        while True:
            try:
                item = self._queue.get(timeout=min(PATIENCE_SECONDS, self._config.data.retry.stall_seconds))
                break
            except queue.Empty:
                if give_up():
                    return None
                if time.monotonic() > until:
                    raise Unavailable(self._stall()) from None
        if isinstance(item, BaseException):
            self._queue.put(item)  # the thread has ended: a caller who asks again must not wait for ever
            raise item
        return item

    def close(self) -> None:
        """End the preparing threads; batches not yet taken are read again after a resume.

        A thread that waits for a dead store is left behind: it ends with the process.
        """
        self._closed.set()
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._thread.is_alive():
            if time.monotonic() > deadline:
                return
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(timeout=0.05)
        for lane in self._lanes.values():
            lane.close(deadline - time.monotonic())
        self._workers.close()

    def _stall(self) -> str:
        seconds = self._config.data.retry.stall_seconds
        lane = self._waiting_for
        what = f"corpus {lane.name}, lane {lane.number}, reading {lane.reading}" if lane else "no lane yet"
        return f"data.retry.stall_seconds={seconds:g}: no batch came in that time; waiting for {what}"

    def _produce(self, first: int) -> None:
        count = self._config.global_batch
        most = min(self._config.data.prefetch_batches, max(1, ROWS_AT_ONCE // (count // self._world_size)))
        batches = 1  # the first is wanted soon
        try:
            while prepared := self._prepare(first, batches):
                for batch in prepared:
                    self._queue.put(batch)
                first += batches * count
                batches = min(2 * batches, most)
        except BaseException as error:  # handed to the training thread, which raises it
            self._queue.put(error)

    def _prepare(self, first: int, batches: int) -> list[Batch]:
        """This rank's part of global batches from row `first` on; none once the loader is closed."""
        count = self._config.global_batch
        share, total = count // self._world_size, batches * count
        place = np.full(total, -1)
        for batch in range(batches):
            begin = first + batch * count
            mine = self._order.rows_of_rank(begin, count, self._rank, self._world_size)
            place[mine - first] = np.arange(batch * share, (batch + 1) * share)
        corpora, numbers = self._order.sources(first, total)
        streams = corpora * self._config.data.lanes + numbers
        by_stream = np.argsort(streams, kind="stable")
        place, streams = place[by_stream], streams[by_stream]
        borders = [0, *(np.flatnonzero(streams[1:] != streams[:-1]) + 1).tolist(), total]
        owned = np.add.reduceat(place >= 0, borders[:-1], dtype=np.int64)
        groups = list(zip(streams[borders[:-1]].tolist(), borders, borders[1:], owned.tolist(), strict=False))
        if not self._lanes:  # a lane that is behind others of its shard can take them along
            groups.sort(key=lambda group: self._begun_at.get(self._key(group[0]), Cursor()).offset)
        # All lanes are opened before one is waited for, so that they are read at the same time.
        lanes = [self._lane(stream) if own else None for stream, _, _, own in groups]
        rows = np.empty((batches * share, self._config.model.sequence_length + 1), dtype=np.int32)
        stretch, ends = Stretch(first, dict(self._marks), []), np.arange(1, batches + 1) * count
        for lane, (stream, begin, end, own) in zip(lanes, groups, strict=True):
            dealt = self._dealt[stream]
            self._dealt[stream] += end - begin
            if lane is None:
                continue
            if self._closed.is_set():
                return []
            self._waiting_for = lane
            _skip(lane, dealt)
            found, taken = lane.take(end - begin)
            if own == end - begin:
                rows[place[begin:end]] = found
            else:
                mask = place[begin:end] >= 0
                rows[place[begin:end][mask]] = found[mask]
            key = (lane.name, lane.number)
            stretch.taken.append((key, taken, np.searchsorted(by_stream[begin:end], ends)))
            self._marks[key] = lane.mark
        parts = np.split(rows, batches)
        return [Batch(part, stretch, index, count) for index, part in enumerate(parts)]

    def _key(self, stream: int) -> tuple[str, int]:
        corpus, lane = divmod(stream, self._config.data.lanes)
        return self._order.corpora[corpus], lane

    def _lane(self, stream: int) -> Lane:
        if stream not in self._lanes:
            name, number = key = self._key(stream)
            self._lanes[stream] = Lane(
                name,
                number,
                self._corpora[name],
                self._config.data,
                sequence_length=self._config.model.sequence_length,
                seed=self._config.seed,
                cursor=self._begun_at.get(key, Cursor()),
                workers=self._workers,
            )
        return self._lanes[stream]


def _skip(lane: Lane, first: int) -> None:
    """Read past rows that other ranks computed, up to row `first`."""
    while lane.rows < first:
        lane.take(min(first - lane.rows, SKIPPED_AT_ONCE))
    assert lane.rows == first, f"{lane.name}, lane {lane.number}: at row {lane.rows}, wanted {first}"


def _allow_open_files(count: int) -> None:
    """Every lane of every corpus keeps a shard open, and shells often allow no more than 1024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = max(soft, count + OTHER_OPEN_FILES)
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
