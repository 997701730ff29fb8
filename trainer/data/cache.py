"""Copies of remote shards on this machine, bounded, and shared by its processes.

A copy is a file named after address, size and version of its shard. While it is written it has the ending
.part, grows from its beginning, and is locked by its writer (flock); readers follow it, or go to the store
for what is far ahead of it. A writer that is killed loses its lock, and the next one removes its part.
Readers hold a shared lock on whole copies, so that eviction passes them by.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cluster import events
from configs.schema import ConfigError
from configs.text import Cache, Retry
from trainer.data.listing import Shard
from trainer.data.patience import Fault
from trainer.data.stores import REQUEST_BYTES, Source, StoreSource

NEAR_BYTES = 4 * REQUEST_BYTES
"""What is further ahead of a growing copy is read from the store instead of waited for."""
POLL_SECONDS = 0.02
REST_SECONDS = 600.0
"""Time without new copies after one could not be written."""
GIB = 1 << 30
NAME = re.compile(r"[0-9a-f]{32}(?:\.(\d+)\.part)?")
"""What copies are called; nothing else in their directory is touched."""


class Copies:
    """The copies in a directory, as one process sees them."""

    def __init__(self, cache: Cache, retry: Retry, run: Path) -> None:
        assert cache.directory is not None
        self._directory = Path(cache.directory) / "trainyard-shards"
        self._most_bytes = int(cache.gib * GIB)
        self._retry = retry
        self._run = run
        self._told = False
        self._rests_until = 0.0
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data.cache.directory={cache.directory}: {error.strerror}") from None

    def open(self, shard: Shard) -> Source:
        """A shard's copy, which begins now if there is none, or the store if there is no room for it."""
        store = StoreSource(shard, self._retry)
        if shard.size_bytes is None:
            return store
        name = hashlib.blake2b(repr(tuple(shard)).encode(), digest_size=16).hexdigest()
        whole = self._directory / name
        part = self._directory / f"{name}.{shard.size_bytes}.part"
        try:
            for path in (whole, part):
                with contextlib.suppress(FileNotFoundError):
                    if (found := _Copy(path, shard, store)).usable():
                        return found
                    found.close()
            if time.monotonic() < self._rests_until:
                return store
            with self._locked():
                with contextlib.suppress(FileNotFoundError):
                    if whole.stat().st_size == shard.size_bytes:
                        return store  # done this moment; the next reader finds it
                    whole.unlink()
                if _is_held(part) or not self._make_room(shard.size_bytes, shard.address):
                    return store
                descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            writer = threading.Thread(
                target=self._write, args=(shard, descriptor, part, whole), name="copy", daemon=True
            )
            writer.start()
            with contextlib.suppress(FileNotFoundError):
                return _Copy(part, shard, store)
            return store  # it is done, or failed, already
        except OSError as error:
            self._rest(shard.address, f"{type(error).__name__}: {error}", REST_SECONDS)
            return store

    def _write(self, shard: Shard, descriptor: int, part: Path, whole: Path) -> None:
        source = StoreSource(shard, self._retry)
        assert shard.size_bytes is not None
        done = 0
        try:
            while done < shard.size_bytes:
                data = memoryview(source.read_at(done, REQUEST_BYTES))
                done += len(data)
                while data:
                    data = data[os.write(descriptor, data) :]
            os.fsync(descriptor)
            with self._locked():
                part.rename(whole)
        except (Fault, OSError) as error:
            part.unlink(missing_ok=True)
            if isinstance(error, OSError):  # readers meet a fault of the store themselves
                self._rest(shard.address, f"{type(error).__name__}: {error}", REST_SECONDS)
        finally:
            source.close()
            os.close(descriptor)

    def _make_room(self, size_bytes: int, address: str) -> bool:
        """Remove what nobody writes, then whole copies that nobody reads, those read longest ago first."""
        used, copies = 0, []
        for path in self._directory.iterdir():
            name = NAME.fullmatch(path.name)
            if name is None:
                continue
            if name[1] is None:
                found = path.stat()
                copies.append((found.st_atime_ns, found.st_size, path))
                used += found.st_size
            elif _is_held(path):
                used += int(name[1])
            else:
                path.unlink(missing_ok=True)  # a writer that fails removes its own
        for _, freed, path in sorted(copies):
            if used + size_bytes <= self._most_bytes or size_bytes > self._most_bytes:
                break
            if not _is_held(path):
                path.unlink()
                used -= freed
        if used + size_bytes > self._most_bytes:
            self._rest(address, f"data.cache.gib={self._most_bytes / GIB:g} leaves no room for it", 0)
            return False
        return True

    def _rest(self, address: str, reason: str, seconds: float) -> None:
        """Go on without copies for a while; told once."""
        self._rests_until = time.monotonic() + seconds
        if not self._told:
            self._told = True
            events.record(self._run, "cache_full", shard=address, reason=reason)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """What adds and removes copies happens in one process at a time."""
        descriptor = os.open(f"{self._directory}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class _Copy:
    """A whole or growing copy; what it lacks comes from the store."""

    def __init__(self, path: Path, shard: Shard, store: StoreSource) -> None:
        assert shard.size_bytes is not None
        self.size_bytes: int | None = shard.size_bytes
        self.path = None if path.suffix else str(path)
        self._total = shard.size_bytes
        self._store = store
        self._held = self._dead = False
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._hold()
        with contextlib.suppress(OSError):
            modified = os.fstat(self._descriptor).st_mtime_ns
            os.utime(self._descriptor, ns=(time.time_ns(), modified))

    def usable(self) -> bool:
        return not self._dead

    def read_at(self, offset: int, count: int) -> bytes:
        end = min(offset + count, self._total)
        while not self._dead:
            there = os.fstat(self._descriptor).st_size
            if there >= self._total and not self._held:
                self._hold()
            if there >= end:
                try:
                    return os.pread(self._descriptor, end - offset, offset) if end > offset else b""
                except OSError:  # the disk fails; the store has the text as well
                    self._dead = True
            elif end - there > NEAR_BYTES:
                break
            elif not self._hold():
                time.sleep(POLL_SECONDS)
        return self._store.read_at(offset, count)

    def close(self) -> None:
        self._store.close()
        os.close(self._descriptor)

    def _hold(self) -> bool:
        """Keep a whole copy from eviction; False while it is being written."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._held = True
        self._dead = os.fstat(self._descriptor).st_size != self._total
        return True


def _is_held(path: Path) -> bool:
    """Whether a process writes or reads a file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
