"""An index of a gzip file leads to the same text as reading from the beginning, or is not used."""

from __future__ import annotations

import gzip
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from configs.text import Data, Retry
from trainer.data import index, shards
from trainer.data.blocks import Place
from trainer.data.damage import Damage
from trainer.data.gzips import READ_BYTES
from trainer.data.index import Indexes, build, identity_of
from trainer.data.listing import Shard
from trainer.data.pieces import pieces
from trainer.data.shards import Reading, Span, spans
from trainer.data.stores import LocalSource, Reader

SIZE_BYTES = 22 * READ_BYTES


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "SPACING_BYTES", 1 << 17)
    monkeypatch.setattr(shards, "SMALLEST_BYTES", 1)


def text(seed: int) -> bytes:
    """5 MB of json lines that hardly compress, of which each letter depends on the seed."""
    noise = random.Random(seed)
    return b"".join(
        json.dumps({"text": f"{number} {noise.randbytes(100).hex()}"}).encode() + b"\n"
        for number in range(22_000)
    )


def write(path: Path, data: bytes, members: int = 1, level: int = 6) -> Shard:
    """A shard in some members, padded so that all have one size."""
    size = -(-len(data) // members)
    packed = b"".join(gzip.compress(data[at : at + size], level) for at in range(0, len(data), size))
    size = SIZE_BYTES if level else 2 * SIZE_BYTES
    path.write_bytes(packed.ljust(size, b"\0"))
    return Shard(f"file://{path}", size)


def indexed(shard: Shard, directory: Path) -> Indexes:
    indexes, path = Indexes(directory), shard.address.removeprefix("file://")
    assert build(indexes.place(shard), path, identity_of(shard, path))
    return indexes


class Counting(LocalSource):
    """A file that knows how much of it was read."""

    count = 0

    def read_at(self, offset: int, count: int) -> bytes:
        data = super().read_at(offset, count)
        self.count += len(data)
        return data


def rest(shard: Shard, offset: int, indexes: Indexes) -> tuple[bytes, int]:
    """The text from a place on, and the bytes that were read for it before the first piece came."""
    path = shard.address.removeprefix("file://")
    source = Counting(path, shard, Retry(attempts=1))
    found = pieces(Reader(source), ".json.gz", offset, indexes.find(shard, path))
    first = next(found)
    read = source.count
    return first + b"".join(found), read


@pytest.mark.parametrize(("members", "level"), [(1, 1), (1, 6), (3, 6), (40, 1), (300, 6)])
def test_text_from_any_place_is_the_same_as_without_an_index(
    tmp_path: Path, members: int, level: int
) -> None:
    data = text(0)
    shard = write(tmp_path / "a.json.gz", data, members, level)
    indexes = indexed(shard, tmp_path / "index")
    for offset in [1, *range(50_000, len(data), 397_001), len(data) - 1]:
        found, read = rest(shard, offset, indexes)
        assert found == data[offset:]
        assert read < 5 * READ_BYTES  # of a file of 22


def test_spans_use_the_index_of_a_large_shard(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.json.gz", text(0))
    plain, own = Reading(Retry()), Reading(Retry(), None, indexed(shard, tmp_path / "index"))
    found = units(shard, plain, Place())
    assert units(shard, own, Place()) == found
    assert units(shard, own, found[-3].place) == found[-3:]


def units(
    shard: Shard, reading: Reading, start: Place, on_damage: Callable[[Damage], None] = pytest.fail
) -> list[Span]:
    return list(
        spans(
            shard,
            "text",
            part=1,
            parts=2,
            window=50,
            start=start,
            on_damage=on_damage,
            reading=reading,
        )
    )


@pytest.mark.parametrize("level", [0, 6])  # 0 stores the text, in blocks that begin at the same places
@pytest.mark.parametrize("told", [True, False])
def test_the_index_of_another_file_is_never_believed(tmp_path: Path, told: bool, level: int) -> None:
    path = tmp_path / "a.json.gz"
    shard = write(path, text(0), level=level)
    indexes = indexed(shard, tmp_path / "index")
    before = path.stat()
    data = text(1)
    write(path, data, level=level)
    if not told:  # size and time say that it is the old one
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (indexes.find(shard, str(path)) is None) == told
    assert rest(shard, 3_000_000, indexes)[0] == data[3_000_000:]
    assert not indexes.place(shard).exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "zeros"])
def test_a_damaged_index_is_not_used(tmp_path: Path, damage: str) -> None:
    data = text(0)
    shard = write(tmp_path / "a.json.gz", data)
    indexes = indexed(shard, tmp_path / "index")
    place = indexes.place(shard)
    content = bytearray(place.read_bytes())
    head = content.index(b"\n") + 1
    if damage == "cut":
        del content[head + (len(content) - head) // 2 :]
    elif damage == "flip":
        for at in range(head + 100, len(content), 500):
            content[at] ^= 0x55
    elif damage == "empty":
        content.clear()
    else:
        content[head:] = bytes(len(content) - head)
    place.write_bytes(content)
    offset = len(data) - 100_000
    assert rest(shard, offset, indexes)[0] == data[offset:]
    assert not place.exists()


@pytest.mark.parametrize("place", ["middle", "checksum"])
def test_a_damaged_shard_gets_no_index(tmp_path: Path, place: str) -> None:
    shard = write(tmp_path / "a.json.gz", text(0))
    path = tmp_path / "a.json.gz"
    content = bytearray(path.read_bytes())
    content[1_000_000 if place == "middle" else len(content.rstrip(b"\0")) - 7] ^= 0xFF
    path.write_bytes(content)
    indexes = Indexes(tmp_path / "index")
    assert not build(indexes.place(shard), str(path), identity_of(shard, str(path)))
    assert list((tmp_path / "index").iterdir()) == []


def test_a_shard_cut_short_ends_with_an_index_as_it_does_without(tmp_path: Path) -> None:
    path = tmp_path / "a.json.gz"
    write(path, text(0))
    path.write_bytes(path.read_bytes()[:1_500_000])
    shard = Shard(f"file://{path}", 1_500_000)

    def found(indexes: Indexes, start: Place) -> tuple[list[Span], list[Damage]]:
        damages: list[Damage] = []
        return units(shard, Reading(Retry(), None, indexes), start, damages.append), damages

    expected, [damage] = found(Indexes(tmp_path / "none"), Place())
    assert damage.kind == "shard"
    assert found(indexed(shard, tmp_path / "index"), expected[80].place) == (expected[80:], [damage])


def test_indexes_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "MOST_INDEXES", 2)
    (tmp_path / "index").mkdir()
    abandoned = tmp_path / "index" / "killed.new"
    abandoned.touch()
    os.utime(abandoned, (0, 0))
    made = []
    for number in range(4):
        made.append(shard := write(tmp_path / f"{number}.json.gz", text(number)[:500_000]))
        indexes = indexed(shard, tmp_path / "index")
        os.utime(indexes.place(shard), (number, number))
    assert sorted((tmp_path / "index").iterdir()) == sorted(indexes.place(shard) for shard in made[2:])


def test_a_shard_that_is_read_for_a_while_gets_an_index_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "WORTH_SECONDS", 0.05)
    shard = write(tmp_path / "a.json.gz", text(0))
    indexes = Indexes(tmp_path / "index")
    with reading(shard, indexes):
        pass
    time.sleep(0.1)
    assert not indexes.place(shard).exists()  # done before it was worth one
    with reading(shard, indexes):
        until = time.monotonic() + 10
        while not indexes.place(shard).exists() and time.monotonic() < until:
            time.sleep(0.01)
    assert indexes.find(shard, str(tmp_path / "a.json.gz"))


def test_indexes_lie_with_the_copies_of_shards_or_in_the_run(tmp_path: Path) -> None:
    corpora = {"x": {"train": "a.json.gz"}}
    cache = {"directory": str(tmp_path / "cache")}
    in_run, in_cache = tmp_path / "run" / "index", tmp_path / "cache" / "trainyard-index"
    for options, directory in (({}, in_run), ({"cache": cache}, in_cache)):
        reading = Reading.of(Data.model_validate({"corpora": corpora} | options), tmp_path / "run")
        assert reading.indexes is not None
        assert reading.indexes.place(Shard("file:///a.json.gz", 1)).parent == directory
        assert (reading.copies is None) == (directory == in_run)


class reading:
    """A reader in the middle of a shard."""

    def __init__(self, shard: Shard, indexes: Indexes) -> None:
        self._found = spans(
            shard,
            "text",
            part=0,
            parts=1,
            window=10,
            start=Place(),
            on_damage=pytest.fail,
            reading=Reading(Retry(), None, indexes),
        )

    def __enter__(self) -> Iterator[Span]:
        next(self._found)
        return self._found

    def __exit__(self, *_: object) -> None:
        self._found.close()
