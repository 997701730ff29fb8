"""Batches of a rank, prepared ahead by a thread, and the position that a checkpoint stores."""

from __future__ import annotations

import queue
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import Config
from trainer.data.damage import DamageReport
from trainer.data.lanes import Cursor, Lane
from trainer.data.order import Order
from trainer.data.shards import Shard
from trainer.data.tokenizer import DocumentTokenizer, Tokens

PATIENCE_SECONDS = 1.0
CLOSE_SECONDS = 10.0

Cursors = dict[tuple[str, int], Cursor]
"""(corpus, lane) -> cursor."""
OTHER_OPEN_FILES = 1024


@dataclass(frozen=True)
class Position:
    """How far the run has read: rows consumed by all ranks, and the cursors of lanes this rank read.

    Rank 0 also keeps the cursors that a resumed run began with, so that all ranks' positions merged
    hold every lane, and ranks tell each other nothing twice.
    """

    rows: int
    cursors: Cursors

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
    """Deals out this rank's batches in order, from a position on."""

    def __init__(
        self,
        config: Config,
        shards: dict[str, list[Shard]],
        tokenizer: DocumentTokenizer,
        *,
        run: Path,
        rank: int,
        world_size: int,
        position: Position,
    ) -> None:
        weights = {name: config.data.corpora[name].weight for name in shards}
        self._order = Order(weights, config.data.lanes, config.seed)
        self._config = config
        self._shards = shards
        self._tokenizer = tokenizer
        self._rank = rank
        self._world_size = world_size
        self._report = DamageReport(run, config.data.on_corrupt, rank)
        self._begun_at = position.cursors
        self._cursors: Cursors = dict(position.cursors) if rank == 0 else {}
        self._lanes: dict[tuple[str, int], Lane] = {}
        self._rows_dealt = {key: cursor.rows for key, cursor in position.cursors.items()}
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(config.data.prefetch_batches)
        self._closed = threading.Event()
        _allow_open_files(len(shards) * config.data.lanes)
        self._thread = threading.Thread(target=self._produce, args=(position.rows,), daemon=True)
        self._thread.start()

    def next_batch(self, give_up: Callable[[], bool] = lambda: False) -> Batch | None:
        """The next batch, or None if it is slow to come and `give_up` says so.

        Raises what the preparing thread met, ConfigError for a user's mistake.
        """
        while True:
            try:
                item = self._queue.get(timeout=PATIENCE_SECONDS)
                break
            except queue.Empty:
                if give_up():
                    return None
        if isinstance(item, BaseException):
            self._queue.put(item)  # the thread has ended: a caller who asks again must not wait for ever
            raise item
        return item

    def close(self) -> None:
        """End the preparing thread; batches not yet taken are read again after a resume.

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
            lane.close()

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
        mine = self._order.rows_of_rank(first, count, self._rank, self._world_size)
        rows = np.empty((len(mine), self._config.model.sequence_length + 1), dtype=np.int32)
        filled, wanted = 0, set(mine.tolist())
        corpora, lanes = self._order.sources(first, count)
        for row, corpus, lane in zip(
            range(first, first + count), corpora.tolist(), lanes.tolist(), strict=True
        ):
            key = (self._order.mixture.corpora[corpus], lane)
            index = self._rows_dealt.get(key, 0)
            self._rows_dealt[key] = index + 1
            if row in wanted:
                if self._closed.is_set():
                    return None
                rows[filled] = self._row(key, index)
                filled += 1
        return Batch(rows, Position(first + count, dict(self._cursors)))

    def _row(self, key: tuple[str, int], index: int) -> Tokens:
        """Row number `index` of a lane; rows that other ranks computed are read past."""
        lane = self._lanes.get(key) or self._open(key)
        for _ in range(index - lane.cursor.rows):
            lane.next_row()
        row = lane.next_row()
        assert lane.cursor.rows == index + 1, f"{key}: read {lane.cursor.rows - 1} rows, dealt {index}"
        self._cursors[key] = lane.cursor
        return row

    def _open(self, key: tuple[str, int]) -> Lane:
        name, number = key
        data = self._config.data
        self._lanes[key] = Lane(
            name,
            self._shards[name],
            data.corpora[name].text_field,
            self._tokenizer,
            lane=number,
            lanes=data.lanes,
            sequence_length=self._config.model.sequence_length,
            shuffle_window=data.shuffle_window,
            seed=self._config.seed,
            on_damage=self._report,
            cursor=self._begun_at.get(key, Cursor()),
        )
        return self._lanes[key]


def _allow_open_files(count: int) -> None:
    """Every lane of every corpus keeps a shard open, and shells often allow no more than 1024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = max(soft, count + OTHER_OPEN_FILES)
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
