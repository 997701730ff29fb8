"""Batches of a rank, prepared ahead by a thread, and the position that a checkpoint stores."""

from __future__ import annotations

import queue
import resource
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.schema import Config
from trainer.data.blocks import Corpus, Tokens
from trainer.data.damage import Unavailable
from trainer.data.lanes import Cursor, Lane, Mark
from trainer.data.order import Order
from trainer.data.workers import Workers

PATIENCE_SECONDS = 1.0
CLOSE_SECONDS = 10.0
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


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one global batch."""

    rows: Tokens
    """Shape [global_batch / world_size, sequence_length + 1]."""
    position: Position
    """Where the run stands once this batch is consumed."""


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
        self._workers = Workers(config.data.workers)
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
        try:
            while batch := self._prepare(first):
                self._queue.put(batch)
                first += self._config.global_batch
        except BaseException as error:  # handed to the training thread, which raises it
            self._queue.put(error)

    def _prepare(self, first: int) -> Batch | None:
        """This rank's part of the global batch from row `first` on; None once the loader is closed."""
        count = self._config.global_batch
        mine = self._order.rows_of_rank(first, count, self._rank, self._world_size) - first
        place = np.full(count, -1)
        place[mine] = np.arange(len(mine))
        corpora, numbers = self._order.sources(first, count)
        streams = corpora * self._config.data.lanes + numbers
        by_stream = np.argsort(streams, kind="stable")
        place, streams = place[by_stream], streams[by_stream]
        borders = [0, *(np.flatnonzero(streams[1:] != streams[:-1]) + 1).tolist(), count]
        owned = np.add.reduceat(place >= 0, borders[:-1], dtype=np.int64)
        groups = list(zip(streams[borders[:-1]].tolist(), borders, borders[1:], owned.tolist(), strict=False))
        if not self._lanes:  # a lane that is behind others of its shard can take them along
            groups.sort(key=lambda group: self._begun_at.get(self._key(group[0]), Cursor()).offset)
        # All lanes are opened before one is waited for, so that they are read at the same time.
        lanes = [self._lane(stream) if own else None for stream, _, _, own in groups]
        rows = np.empty((len(mine), self._config.model.sequence_length + 1), dtype=np.int32)
        for lane, (stream, begin, end, own) in zip(lanes, groups, strict=True):
            dealt = self._dealt[stream]
            self._dealt[stream] += end - begin
            if lane is None:
                continue
            if self._closed.is_set():
                return None
            self._waiting_for = lane
            _skip(lane, dealt)
            if own == end - begin:
                rows[place[begin:end]] = lane.take(own)
            else:
                places = place[begin:end]
                mask = places >= 0
                rows[places[mask]] = lane.take(end - begin)[mask]
            self._marks[lane.name, lane.number] = lane.mark
        return Batch(rows, Position(first + count, dict(self._marks)))

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
