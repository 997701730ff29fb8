"""One pass over a shard for all parts of it that are read at about the same time.

A shard that is cut into parts for many lanes would otherwise be decompressed once for each of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Hashable
from typing import Any

HELD_BYTES = 16 << 20
"""How far readers of one pass may be apart. Who falls behind by more begins a pass of its own."""

Bulk = tuple[Any, int]
"""Documents as they lie in a file, and their extent in what a Place counts."""


class Behind(Exception):
    """What a reader wants next is no longer held."""


class Passes:
    """The passes that are under way. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[Hashable, list[_Pass]] = {}

    def read(
        self, key: Hashable, offset: int, reach: int, begin: Callable[[int], Generator[Bulk]]
    ) -> Generator[Bulk]:
        """What `begin(offset)` gives, from a pass that is near if there is one. Raises what `begin` raises.

        key: readers with the same one want the same; offsets of all of them lie between two bulks.
        reach: how far behind the offset a pass may be to be near.
        """
        while True:
            shared = self._join(key, offset, reach, begin)
            try:
                while (bulk := shared.at(offset)) is not None:
                    offset += bulk[1]
                    yield bulk
                return
            except Behind:
                continue
            finally:
                self._leave(key, shared)

    def _join(self, key: Hashable, offset: int, reach: int, begin: Callable[[int], Generator[Bulk]]) -> _Pass:
        with self._lock:
            running = self._running.setdefault(key, [])
            shared = next((one for one in running if one.is_near(offset, reach)), None)
            if shared is None:
                shared = _Pass(begin(offset), offset)
                running.append(shared)
            shared.readers += 1
            return shared

    def _leave(self, key: Hashable, shared: _Pass) -> None:
        with self._lock:
            shared.readers -= 1
            if shared.readers:
                return
            running = self._running[key]
            running.remove(shared)
            if not running:
                del self._running[key]
        shared.close()


class _Pass:
    """Bulks of one pass: those that were read last, and the next one."""

    def __init__(self, bulks: Generator[Bulk], offset: int) -> None:
        self.readers = 0
        self._bulks = bulks
        self._pulling = threading.Lock()
        self._lock = threading.Lock()
        self._held: dict[int, tuple[Bulk, int]] = {}
        """By offset, in their order: a bulk and its size in bytes."""
        self._held_bytes = 0
        self._begin = self._end = offset
        self._ended = False
        self._error: Exception | None = None

    def is_near(self, offset: int, reach: int) -> bool:
        """Whether the bulk at an offset is held, or will soon be read."""
        with self._lock:
            return self._begin <= offset <= self._end + reach

    def at(self, offset: int) -> Bulk | None:
        """The bulk at an offset, None at the end. Raises Behind, and what the pass itself came upon there."""
        while True:
            with self._lock:
                if offset in self._held:
                    return self._held[offset][0]
                if offset < self._begin:
                    raise Behind
                if self._ended:
                    if self._error is not None:
                        raise self._error
                    return None
                end = self._end
            with self._pulling:
                if end == self._end:
                    self._pull()

    def close(self) -> None:
        self._bulks.close()
        self._error = None  # whose traceback leads here, and to all that its readers hold

    def _pull(self) -> None:
        """Read one bulk more, and let go of the oldest if they are too many."""
        try:
            bulk = next(self._bulks, None)
        except Exception as error:  # every reader that comes so far must meet it
            with self._lock:
                self._ended, self._error = True, error.with_traceback(None)
            return
        with self._lock:
            if bulk is None:
                self._ended = True
                return
            documents, extent = bulk
            size = extent if isinstance(documents, list) else documents.nbytes
            self._held[self._end] = bulk, size
            self._held_bytes += size
            self._end += extent
            while self._held_bytes > HELD_BYTES and len(self._held) > 1:
                oldest = next(iter(self._held))
                (_, extent), size = self._held.pop(oldest)
                self._held_bytes -= size
                self._begin = oldest + extent
