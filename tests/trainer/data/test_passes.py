"""Readers of a shard's parts share one pass over it, and get what they would have got alone."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Generator

import pytest

from trainer.data import passes
from trainer.data.passes import Bulk, Passes

BULKS = 50
EXTENT = 10
REACH = 100


class Shard:
    """Counts the passes over it."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.begun: list[int] = []
        self.closed = 0
        self._fails_at = fails_at

    def begin(self, offset: int) -> Generator[Bulk]:
        self.begun.append(offset)
        try:
            for number in range(offset // EXTENT, BULKS):
                if number == self._fails_at:
                    raise OSError("store away")
                yield [number], EXTENT
        finally:
            self.closed += 1


def numbers(bulks: Generator[Bulk], count: int = BULKS) -> list[int]:
    return [next(bulks)[0][0] for _ in range(count)]


@pytest.fixture(autouse=True)
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten bulks are held."""
    monkeypatch.setattr(passes, "HELD_BYTES", 10 * EXTENT)


def test_readers_that_keep_together_share_a_pass() -> None:
    shard, shared = Shard(), Passes()
    readers = [shared.read("a", 0, REACH, shard.begin) for _ in range(3)]
    found = [[next(reader)[0][0] for reader in readers] for _ in range(BULKS)]
    assert found == [[number] * 3 for number in range(BULKS)]
    assert shard.begun == [0]


def test_a_reader_that_falls_behind_goes_on_alone() -> None:
    shard, shared = Shard(), Passes()
    fast, slow = (shared.read("a", 0, REACH, shard.begin) for _ in range(2))
    assert numbers(slow, 5) == [0, 1, 2, 3, 4]
    assert numbers(fast) == list(range(BULKS))
    assert numbers(slow, BULKS - 5) == list(range(5, BULKS))
    assert shard.begun == [0, 50]


def test_a_reader_joins_a_pass_that_is_near() -> None:
    shard, shared = Shard(), Passes()
    first = shared.read("a", 100, REACH, shard.begin)
    numbers(first, 5)
    assert numbers(shared.read("a", 120, REACH, shard.begin), 3) == [12, 13, 14]
    assert numbers(shared.read("a", 200, REACH, shard.begin), 3) == [20, 21, 22]
    assert shard.begun == [100]
    assert numbers(shared.read("a", 90, REACH, shard.begin), 3) == [9, 10, 11]
    assert numbers(shared.read("a", 450, REACH, shard.begin), 3) == [45, 46, 47]
    assert shard.begun == [100, 90, 450]


def test_other_keys_have_other_passes() -> None:
    shard, shared = Shard(), Passes()
    for key in ("a", "b"):
        assert numbers(shared.read(key, 0, REACH, shard.begin)) == list(range(BULKS))
    assert shard.begun == [0, 0]


def test_a_pass_is_closed_when_its_last_reader_leaves() -> None:
    shard, shared = Shard(), Passes()
    readers = [shared.read("a", 0, REACH, shard.begin) for _ in range(2)]
    for reader in readers:
        next(reader)
    readers[0].close()
    assert shard.closed == 0
    readers[1].close()
    assert (shard.closed, shared._running) == (1, {})


def test_every_reader_meets_an_error_at_its_place() -> None:
    shard, shared = Shard(fails_at=7), Passes()
    for reader in [shared.read("a", 0, REACH, shard.begin) for _ in range(2)]:
        assert numbers(reader, 7) == list(range(7))
        with pytest.raises(OSError, match="store away"):
            next(reader)


def test_an_error_that_was_met_keeps_nothing_of_the_pass() -> None:
    gc.disable()
    try:
        shard, shared = Shard(fails_at=7), Passes()
        reader = shared.read("a", 0, REACH, shard.begin)
        numbers(reader, 6)
        [[one]] = shared._running.values()
        left = weakref.ref(one)
        del one
        with pytest.raises(OSError, match="store away"):
            numbers(reader)
        assert left() is None
    finally:
        gc.enable()


def test_threads_may_read_a_pass_at_the_same_time() -> None:
    shard, shared = Shard(), Passes()
    found: list[list[int]] = []
    threads = [
        threading.Thread(
            target=lambda: found.append([b[0][0] for b in shared.read("a", 0, REACH, shard.begin)])
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [list(range(BULKS))] * 8
