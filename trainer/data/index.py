"""Points in large gzip files from which they can be read on, kept beside the run.

A gzip file can only be read from its beginning, unless one knows where a block begins and which 32 KiB of
text precede it. Such points are found in the background, for files that have been read for a while, and
serve those who resume in the middle.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import logging
import os
import struct
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import indexed_gzip

from trainer.data.gzips import Point, gunzipped_from
from trainer.data.listing import Shard
from trainer.data.patience import Fault
from trainer.data.stores import Reader

SMALLEST_BYTES = 64 << 20
"""Smaller files are quickly read from their beginning."""
WORTH_SECONDS = 30.0
"""Time from which on a file that is being read gets an index; those soon done never need one."""
SPACING_BYTES = 4 << 20
"""Text between points."""
WINDOW_BYTES = 1 << 15
MOST_INDEXES = 128
"""How many a directory keeps, of about 3 MB each."""
ABANDONED_SECONDS = 3600
HEAD = struct.Struct("<7sQQIII")
POINT = struct.Struct("<QQB?")

logger = logging.getLogger(__name__)


class Index:
    """The points of one file. Wrong text would be the worst outcome, so an index must prove itself."""

    def __init__(self, path: Path, head: dict[str, Any], windows_at: int) -> None:
        self._path = path
        self._points = [Point(*point) for point in head["points"]]
        self._windows = head["windows"]
        self._windows_at = windows_at

    def enter(self, reader: Reader, offset: int) -> tuple[int, Iterator[bytes]] | None:
        """The last point before byte `offset` of the text, and the pieces from there on.

        Reads from the point before that one, and compares the text that comes with the index. None, and the
        reader at its beginning, if it is another text, or before the second point.
        """
        last = bisect.bisect_right(self._points, offset, key=lambda point: point.text) - 1
        try:
            if last >= 1 and (entered := self._proven(reader, last)):
                return entered
        except (Fault, OSError, zlib.error, IndexError) as error:
            if isinstance(error, Fault) and error.kind != "shard":
                raise
        if last >= 1:
            self._path.unlink(missing_ok=True)
        reader.seek(0)
        return None

    def _proven(self, reader: Reader, last: int) -> tuple[int, Iterator[bytes]] | None:
        before, point = self._points[last - 1 : last + 1]
        with self._path.open("rb") as file:
            windows = [self._window(file, number) for number in (last - 1, last)]
        found = gunzipped_from(reader, before, windows[0])
        missing, tail = point.text - before.text, b""
        for piece in found:
            tail = (tail + piece[:missing])[-WINDOW_BYTES:]
            if missing <= len(piece):
                if tail[-len(windows[1]) :] != windows[1]:
                    return None
                return point.text, _again(piece[missing:], found)
            missing -= len(piece)
        return None

    def _window(self, file: Any, number: int) -> bytes:
        begin, end = self._windows[number : number + 2]
        file.seek(self._windows_at + begin)
        return zlib.decompress(file.read(end - begin))


class Indexes:
    """The indexes in a directory, and the thread that adds to them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._wanted: dict[Path, tuple[float, list[Any], str]] = {}
        self._readers: dict[Path, int] = {}
        self._thread: threading.Thread | None = None

    def find(self, shard: Shard, file: str) -> Index | None:
        """The index of a shard, whose bytes lie in `file`."""
        path = self.place(shard)
        try:
            identity = identity_of(shard, file)
            with path.open("rb") as opened:
                head = json.loads(opened.readline())
                if head["identity"] != identity:
                    raise ValueError("of another file")
                os.utime(path)
                return Index(path, head, opened.tell())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None

    @contextlib.contextmanager
    def wanted(self, shard: Shard, file: str) -> Iterator[None]:
        """While a shard is read: an index of it is built if it is large and that takes long enough."""
        path = self.place(shard)
        try:
            identity = identity_of(shard, file)
        except OSError:  # gone; whoever reads it will tell
            yield
            return
        with self._lock:
            self._readers[path] = self._readers.get(path, 0) + 1
            self._wanted.setdefault(path, (time.monotonic() + WORTH_SECONDS, identity, file))
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="index", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._readers[path] -= 1
                if not self._readers[path]:
                    del self._readers[path]
                    self._wanted.pop(path, None)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while True:
            with self._lock:
                if not self._wanted:
                    self._thread = None
                    return
                path = min(self._wanted, key=lambda path: self._wanted[path][0])
                due, identity, file = self._wanted[path]
                if due <= time.monotonic():
                    self._wanted[path] = (float("inf"), identity, file)  # once; readers are still counted
            if due == float("inf"):
                time.sleep(1)
            elif due > time.monotonic():
                time.sleep(min(1, due - time.monotonic()))
            elif not path.exists():
                build(path, file, identity)

    def place(self, shard: Shard) -> Path:
        """Where the index of a shard lies, if it has one."""
        name = hashlib.blake2b(shard.address.encode(), digest_size=16).hexdigest()
        return self._directory / f"{name}.points"


def identity_of(shard: Shard, file: str) -> list[Any]:
    """What an index says of the file that it belongs to."""
    found = os.stat(file)
    return [shard.address, shard.version, found.st_size, found.st_mtime_ns]


def build(path: Path, file: str, identity: list[Any]) -> bool:
    """Write the index of a gzip file, unless another process does or the file is damaged."""
    written, lock = path.with_suffix(f".{uuid.uuid4().hex}.new"), path.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("ab") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                written.write_bytes(_packed(file, identity))
                written.replace(path)
            finally:
                written.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
        _prune(path.parent)
    except OSError as error:  # a full disk, another builder, a damaged file: all can do without
        logger.info("no index of %s: %s", file, error)
        return False
    return True


def _packed(file: str, identity: list[Any]) -> bytes:
    """What an index consists of: a line of JSON, then the windows, which it tells the places of."""
    points, windows = _scan(file)
    packed = [zlib.compress(window, 1) for window in windows]
    ends = [0, *itertools.accumulate(map(len, packed))]
    head = {"identity": identity, "points": points, "windows": ends}
    return json.dumps(head).encode() + b"\n" + b"".join(packed)


def _scan(file: str) -> tuple[list[Point], list[bytes]]:
    """Points of a gzip file and the text before each, read from indexed_gzip's export."""
    points: list[Point] = []
    windows: list[bytes] = []
    exported = io.BytesIO()
    with indexed_gzip.IndexedGzipFile(file, spacing=SPACING_BYTES, window_size=WINDOW_BYTES) as opened:
        opened.build_full_index()
        opened.export_index(fileobj=exported)
        data = memoryview(exported.getbuffer())
        _, _, _, _, window_bytes, count = HEAD.unpack_from(data)
        at = HEAD.size + count * POINT.size
        for number in range(count):
            compressed, text, bits, has_window = POINT.unpack_from(data, HEAD.size + number * POINT.size)
            begin, at = at, at + (window_bytes if has_window else 0)
            if points and text - points[-1].text < SPACING_BYTES // 2:
                continue  # of a file of small members, each of which begins with a point
            points.append(Point(compressed, text, bits))
            if has_window:
                windows.append(bytes(data[begin:at]))
            else:  # the first block of a member needs no text before it, but the proof does
                opened.seek(max(0, text - WINDOW_BYTES))
                windows.append(opened.read(min(text, WINDOW_BYTES)))
    return points, windows


def _prune(directory: Path) -> None:
    """Remove the indexes that were used longest ago, and what builders left that were killed."""
    for path in directory.glob("*.new"):
        if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
            path.unlink(missing_ok=True)
    kept = sorted(directory.glob("*.points"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in kept[MOST_INDEXES:]:
        path.unlink(missing_ok=True)


def _again(piece: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield piece
    yield from rest
