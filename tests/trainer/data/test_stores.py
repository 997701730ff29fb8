"""Requests of a store that overlap do not get into each other's way."""

from __future__ import annotations

import io
import threading
from contextlib import closing
from typing import Any

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem

from configs.text import Retry
from trainer.data import stores
from trainer.data.listing import Shard


class OneAtATime(io.BytesIO):
    """A store's file that two requests must not use together; the second request takes until it may end."""

    reads = 0
    may_end = threading.Event()

    def __init__(self) -> None:
        super().__init__(bytes(range(100)) * 10)
        self.size = 1000
        self._in_use = threading.Lock()

    def read(self, count: int | None = -1) -> bytes:
        OneAtATime.reads += 1
        assert self._in_use.acquire(blocking=False)
        try:
            if OneAtATime.reads == 2:
                self.may_end.wait(10)
            return super().read(count)
        finally:
            self._in_use.release()


class Store(AbstractFileSystem):  # type: ignore[misc]
    def open(self, path: str, *_: Any, **__: Any) -> OneAtATime:
        return OneAtATime()


def test_a_jump_leaves_the_request_that_is_under_way_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "REQUEST_BYTES", 100)
    fsspec.register_implementation("jumps", Store, clobber=True)
    with closing(stores.StoreSource(Shard("jumps://a", 1000), Retry(attempts=1))) as source:
        assert source.read_at(0, 10) == bytes(range(10))
        assert source.read_at(520, 10) == bytes(range(20, 30))
        OneAtATime.may_end.set()
