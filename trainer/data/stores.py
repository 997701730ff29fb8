"""Bytes of a shard, wherever it lies: an error of its store is met by trying again, told if that fails."""

from __future__ import annotations

import os
from typing import Any, Protocol

import fsspec

from configs.text import Retry
from trainer.data.listing import Shard, version_of
from trainer.data.patience import Fault, Later, patiently

REQUEST_BYTES = 2 << 20
"""What is asked of a store at a time; one request more is under way while it is used."""


class Source(Protocol):
    """Bytes by place."""

    size_bytes: int | None
    path: str | None
    """A local file that holds all of them, if there is one."""

    def read_at(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on, fewer only at the end. Raises Fault."""
        ...

    def close(self) -> None: ...


class LocalSource:
    """A file of this machine; its errors are tried again too, as a network may lie behind its path."""

    def __init__(self, path: str, shard: Shard, retry: Retry) -> None:
        self.path: str | None = path
        self._path = path
        self._shard = shard
        self._retry = retry
        self._descriptor: int | None = None
        self.size_bytes: int | None = shard.size_bytes

    def read_at(self, offset: int, count: int) -> bytes:
        return patiently(lambda: self._read(offset, count), self._retry, self.close)

    def close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def _read(self, offset: int, count: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            check_unchanged(self._shard, os.fstat(self._descriptor).st_size, None)
        data = os.pread(self._descriptor, count, offset)
        while len(data) < count and (
            more := os.pread(self._descriptor, count - len(data), offset + len(data))
        ):
            data += more
        if len(data) < count:
            check_unchanged(self._shard, os.fstat(self._descriptor).st_size, None)
        return data


class StoreSource:
    """A file of any other file system, read in large requests, each with a time-out."""

    def __init__(self, shard: Shard, retry: Retry) -> None:
        self.size_bytes = shard.size_bytes
        self.path: str | None = None
        self._shard = shard
        self._retry = retry
        self._system: tuple[Any, str] | None = None
        self._file: Any = None
        self._start = 0
        self._block = b""
        self._ahead: tuple[int, Later[tuple[Any, bytes]]] | None = None

    def read_at(self, offset: int, count: int) -> bytes:
        parts = []
        while count:
            within = offset - self._start
            if not 0 <= within < len(self._block):
                self._fetch(offset)
                within = 0
            part = self._block[within : within + count]
            if not part:
                if offset < (self._shard.size_bytes or 0):
                    check_unchanged(self._shard, offset, None)
                break
            parts.append(part)
            offset += len(part)
            count -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        self._block, self._ahead = b"", None
        self._file = None  # closing could wait for a store that hangs; fsspec's files hold nothing else

    def _fetch(self, offset: int) -> None:
        """Make the block that begins at `offset` the present one, and ask for the next if reading goes on."""
        goes_on = offset == self._start + len(self._block)
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[0] != offset:
            self._file = ahead = None  # that request goes on using the file

        def attempt() -> tuple[Any, bytes]:
            nonlocal ahead
            # Here, as every thread has file systems of its own, with connections of their own.
            self._system = self._system or fsspec.url_to_fs(self._shard.address)
            asked, ahead = ahead, None
            later = asked[1] if asked else self._later(offset)
            return later.result(self._retry.timeout_seconds)

        self._file, self._block = patiently(attempt, self._retry, self.close)
        self._start, self.size_bytes = offset, self._file.size
        following = offset + len(self._block)
        if goes_on and self._block and (self.size_bytes is None or following < self.size_bytes):
            self._ahead = (following, self._later(following))

    def _later(self, offset: int) -> Later[tuple[Any, bytes]]:
        """The bytes from `offset` on, and the file they are from.

        Only this call uses the file; one that is late keeps it, and its answer is not listened to.
        """
        file = self._file

        def ask() -> tuple[Any, bytes]:
            opened = self._opened() if file is None else file
            left = REQUEST_BYTES if opened.size is None else opened.size - offset
            wanted = max(0, min(REQUEST_BYTES, left))
            if opened.tell() != offset:
                _seek(opened, offset)
            data: bytes = opened.read(wanted) if wanted else b""
            if opened.size is not None and len(data) != wanted:
                raise OSError(f"{len(data)} bytes came instead of {wanted}")
            return opened, data

        return Later(ask)

    def _opened(self) -> Any:
        """The file, found as it was listed."""
        assert self._system is not None
        file_system, path = self._system
        file_system.invalidate_cache(path)
        file = file_system.open(path, "rb", block_size=REQUEST_BYTES, cache_type="none")
        info = getattr(file, "details", None) or {}
        if self._shard.version is not None and version_of(info) is None:
            info = file_system.info(path)
        check_unchanged(self._shard, file.size, version_of(info))
        return file


class Reader:
    """A source with a position: a file, as pyarrow and the decompressors take it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._position = 0
        self.closed = False

    def read(self, count: int = -1) -> bytes:
        """`count` bytes, fewer only at the end. Raises Fault."""
        if count < 0:
            count = self.size() - self._position
        data = self._source.read_at(self._position, count)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}
        self._position = offset + (base[whence] if whence in base else self.size())
        return self._position

    def tell(self) -> int:
        return self._position

    def size(self) -> int:
        """Bytes of the file. Raises Fault where its store does not tell."""
        if self._source.size_bytes is None:
            self._source.read_at(0, 1)
        if self._source.size_bytes is None:
            raise Fault("store", "the store does not tell the file's size, which this format needs")
        return self._source.size_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True
        self._source.close()


def check_unchanged(shard: Shard, size_bytes: int | None, version: str | None) -> None:
    """Raises Fault if a shard is not what was listed."""
    if None not in (shard.size_bytes, size_bytes) and shard.size_bytes != size_bytes:
        raise Fault("changed", f"has {size_bytes} bytes, had {shard.size_bytes} when the run began")
    if None not in (shard.version, version) and shard.version != version:
        raise Fault("changed", f"is version {version}, was {shard.version} when the run began")


def _seek(file: Any, offset: int) -> None:
    """Go to a place in a file that may only be readable from its beginning, as http without ranges is."""
    try:
        file.seek(offset)
    except ValueError:
        while (behind := offset - file.tell()) > 0 and file.read(min(behind, REQUEST_BYTES)):
            pass
        if file.tell() != offset:
            raise OSError(f"byte {offset} could not be gone to") from None
