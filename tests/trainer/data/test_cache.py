"""Copies of remote shards: the same text, within bounds, whatever happens to their writers and the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cluster import events
from configs.schema import ConfigError
from configs.text import Cache, Retry
from trainer.data import cache as copying
from trainer.data import stores
from trainer.data.cache import Copies
from trainer.data.listing import Shard
from trainer.data.patience import Fault
from trainer.data.stores import Source

SIZE_BYTES = 1_000_000
REQUEST_BYTES = 100_000


@cache
def content(number: int) -> bytes:
    return b"".join(b"%d %d\n" % (number, line) for line in range(SIZE_BYTES // 7))[:SIZE_BYTES]


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Four shards in a store of this process, read in small requests."""
    monkeypatch.setattr(stores, "REQUEST_BYTES", REQUEST_BYTES)
    monkeypatch.setattr(copying, "REQUEST_BYTES", REQUEST_BYTES)
    store = fsspec.filesystem("memory")
    for number in range(4):
        store.pipe_file(f"/cache/{number}.jsonl", content(number))
    yield store
    store.rm("/cache", recursive=True)


def shard(number: int) -> Shard:
    return Shard(f"memory://cache/{number}.jsonl", SIZE_BYTES)


def copies(tmp_path: Path, most_bytes: int = 10 * SIZE_BYTES) -> Copies:
    options = Cache(directory=str(tmp_path / "cache"), gib=most_bytes / (1 << 30))
    return Copies(options, Retry(attempts=1), tmp_path)


def read(source: Source, step: int = 70_000) -> bytes:
    with closing(source):
        return b"".join(source.read_at(at, step) for at in range(0, SIZE_BYTES + step, step))


def kept(tmp_path: Path) -> list[Path]:
    """Whole copies, once nothing is being written any more."""
    directory = tmp_path / "cache" / "trainyard-shards"
    until = time.monotonic() + 10
    while list(directory.glob("*.part")) and time.monotonic() < until:
        time.sleep(0.01)
    return sorted(directory.iterdir())


def told(tmp_path: Path) -> list[dict[str, Any]]:
    return [event for event in events.read(tmp_path / "events.jsonl") if event["event"] == "cache_full"]


def test_what_was_read_once_is_read_from_the_copy(tmp_path: Path, store: Any) -> None:
    first = copies(tmp_path)
    assert read(first.open(shard(0))) == content(0)
    [copy] = kept(tmp_path)
    assert copy.read_bytes() == content(0)
    store.rm("/cache/0.jsonl")
    source = copies(tmp_path).open(shard(0))
    assert source.path == str(copy)
    assert read(source) == content(0)
    assert told(tmp_path) == []


def test_what_lies_far_ahead_of_a_growing_copy_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "NEAR_BYTES", 0)
    directory = tmp_path / "cache" / "trainyard-shards"
    with closing(copies(tmp_path).open(shard(0))):
        pass
    [copy] = kept(tmp_path)
    part = directory / f"{copy.name}.{SIZE_BYTES}.part"
    copy.rename(part)
    os.truncate(part, 300_000)
    with part.open("r+b") as writer:  # another process, which never gets on
        fcntl.flock(writer, fcntl.LOCK_EX)
        assert read(copies(tmp_path).open(shard(0))) == content(0)


def test_a_copy_of_another_version_is_another_copy(tmp_path: Path) -> None:
    own = copies(tmp_path)
    read(own.open(shard(0)))
    before = kept(tmp_path)
    with closing(own.open(shard(0)._replace(version="2"))) as source:
        assert source.path is None
    assert len(kept(tmp_path)) == len(before) + 1


def test_a_copy_of_another_size_is_made_anew(tmp_path: Path) -> None:
    own = copies(tmp_path)
    read(own.open(shard(0)))
    [copy] = kept(tmp_path)
    os.truncate(copy, 300_000)
    assert read(own.open(shard(0))) == content(0)
    assert kept(tmp_path) == [copy]
    assert copy.read_bytes() == content(0)


def test_copies_read_longest_ago_make_room(tmp_path: Path) -> None:
    own = copies(tmp_path, 2 * SIZE_BYTES + 1000)
    for number in (0, 1, 0, 2):
        assert read(own.open(shard(number))) == content(number)
        kept(tmp_path)
    assert sorted(path.read_bytes()[:2] for path in kept(tmp_path)) == [b"0 ", b"2 "]
    assert told(tmp_path) == []


def test_files_that_are_no_copies_are_left_alone(tmp_path: Path) -> None:
    own = copies(tmp_path, SIZE_BYTES)
    theirs = [tmp_path / "cache" / name for name in ("shards/a.jsonl", "trainyard-shards/a")]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content(3))
    for number in (0, 1):
        assert read(own.open(shard(number))) == content(number)
        kept(tmp_path)
    assert [path.read_bytes() for path in theirs] == [content(3)] * 2
    assert told(tmp_path) == []


def test_copies_that_are_done_while_room_is_made_trouble_nobody(tmp_path: Path, store: Any) -> None:
    own = copies(tmp_path)
    listed = [Shard(f"memory://cache/small/{number}.jsonl", 7) for number in range(300)]
    for each in listed:
        store.pipe_file(each.address.removeprefix("memory:/"), b"content")

    def read_every_eighth(first: int) -> None:
        for each in listed[first::8]:
            with closing(own.open(each)) as source:
                source.read_at(0, 7)

    threads = [threading.Thread(target=read_every_eighth, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(kept(tmp_path)) == 300
    assert told(tmp_path) == []


def test_a_copy_that_is_read_is_not_removed(tmp_path: Path) -> None:
    own, other = copies(tmp_path, SIZE_BYTES), copies(tmp_path, SIZE_BYTES)
    read(own.open(shard(0)))
    [copy] = kept(tmp_path)
    with closing(own.open(shard(0))) as source:
        source.read_at(0, 10)
        assert read(other.open(shard(1))) == content(1)
        assert kept(tmp_path) == [copy]
    assert [event["shard"] for event in told(tmp_path)] == [shard(1).address]
    read(other.open(shard(1)))
    assert [path.read_bytes()[:2] for path in kept(tmp_path)] == [b"1 "]


def test_a_full_disk_leaves_the_store_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def full(descriptor: int, data: Any) -> int:
        if os.fstat(descriptor).st_size > 300_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    own = copies(tmp_path)
    monkeypatch.setattr(copying, "REST_SECONDS", 0.0)
    monkeypatch.setattr(os, "write", full)
    for number in range(3):
        assert read(own.open(shard(number))) == content(number)
        assert kept(tmp_path) == []
    monkeypatch.undo()
    [event] = told(tmp_path)
    assert "No space left" in event["reason"]


def test_a_store_that_fails_fails_the_reader_and_leaves_nothing(tmp_path: Path, store: Any) -> None:
    store.rm("/cache/0.jsonl")
    with pytest.raises(Fault) as caught:
        read(copies(tmp_path).open(shard(0)))
    assert caught.value.kind == "store"
    assert kept(tmp_path) == []
    assert told(tmp_path) == []


def test_a_directory_that_cannot_be_used_names_its_key(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(ConfigError, match=rf"data\.cache\.directory={tmp_path}/cache: "):
        copies(tmp_path)


WRITER = """
import sys, time
from pathlib import Path
import fsspec
sys.path[:0] = {path!r}
from trainer.data import cache, stores
import tests.trainer.data.test_cache as own
cache.REQUEST_BYTES = stores.REQUEST_BYTES = own.REQUEST_BYTES
fsspec.filesystem("memory").pipe_file("/cache/0.jsonl", own.content(0))
read_at = stores.StoreSource.read_at
def slowly(self, offset, count):
    if offset >= {stops_at}:
        print("there", flush=True)
        time.sleep({pause})
    return read_at(self, offset, count)
stores.StoreSource.read_at = slowly
source = own.copies(Path({directory!r})).open(own.shard(0))
source.read_at(0, own.SIZE_BYTES)
print("done", flush=True)
"""


def another(tmp_path: Path, stops_at: int, pause: float) -> subprocess.Popen[str]:
    """A process that copies shard 0, and pauses at a place."""
    code = WRITER.format(path=sys.path, stops_at=stops_at, pause=pause, directory=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    return process


def test_a_writer_that_is_killed_leaves_a_part_that_the_next_one_replaces(tmp_path: Path) -> None:
    writer = another(tmp_path, stops_at=500_000, pause=60)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    [part] = (tmp_path / "cache" / "trainyard-shards").iterdir()
    assert part.stat().st_size == 500_000
    assert read(copies(tmp_path).open(shard(0))) == content(0)
    [copy] = kept(tmp_path)
    assert copy.read_bytes() == content(0)


def test_readers_follow_a_writer_of_another_process(tmp_path: Path, store: Any) -> None:
    store.rm("/cache/0.jsonl")  # so that the text can only come from the other process
    writer = another(tmp_path, stops_at=900_000, pause=0.3)
    assert read(copies(tmp_path).open(shard(0))) == content(0)
    writer.communicate()


def test_readers_go_on_at_the_store_when_a_writer_is_killed(tmp_path: Path) -> None:
    writer = another(tmp_path, stops_at=500_000, pause=60)
    with closing(copies(tmp_path).open(shard(0))) as source:
        assert source.read_at(0, 400_000) == content(0)[:400_000]
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert source.read_at(400_000, SIZE_BYTES) == content(0)[400_000:]
