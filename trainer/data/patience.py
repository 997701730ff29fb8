"""Trying again: what a store refuses or holds back now may come a little later."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Generic, Literal, TypeVar

from configs.text import Retry

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
GONE_OR_FORBIDDEN = (401, 403, 404, 410)

T = TypeVar("T")
_chance = random.Random()
logger = logging.getLogger(__name__)


class Fault(Exception):
    """Why no more of a shard can be read."""

    def __init__(self, kind: Literal["shard", "changed", "store"], reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Later(Generic[T]):
    """A call in a thread of its own, which is left behind if it hangs."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._outcome: SimpleQueue[tuple[T | None, Exception | None]] = SimpleQueue()
        threading.Thread(target=self._run, args=(call,), name="read", daemon=True).start()

    def result(self, timeout_seconds: float) -> T:
        """What the call returns or raises; TimeoutError if that takes too long."""
        try:
            value, error = self._outcome.get(timeout=timeout_seconds)
        except Empty:
            raise TimeoutError(f"no answer in {timeout_seconds:g} s") from None
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self._outcome.put((call(), None))
        except Exception as error:
            self._outcome.put((None, error))


def patiently(call: Callable[[], T], retry: Retry, start_again: Callable[[], None] = lambda: None) -> T:
    """What `call` returns, tried again after pauses that double, with jitter.

    Raises Fault when the attempts are used up, and at once for a file that is gone or may not be read.
    """
    attempt = 0
    while True:
        try:
            return call()
        except Fault:
            raise
        except Exception as error:  # stores' own exceptions share no base class
            start_again()
            attempt += 1
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            if _is_final(error):
                raise Fault("store", reason) from error
            if attempt >= retry.attempts:
                raise Fault("store", f"attempt {attempt} of {retry.attempts}: {reason}") from error
        longest = min(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), LONGEST_PAUSE_SECONDS)
        pause_seconds = longest * _chance.uniform(0.5, 1)
        logger.warning("attempt %d of %d in %.1f s: %s", attempt + 1, retry.attempts, pause_seconds, reason)
        time.sleep(pause_seconds)


def _is_final(error: Exception) -> bool:
    """Whether a file is gone or forbidden; fsspec calls any failure of http that, and its cause tells."""
    cause = error.__cause__
    if type(cause).__module__.startswith("aiohttp") or isinstance(cause, TimeoutError):
        return getattr(cause, "status", None) in GONE_OR_FORBIDDEN
    return isinstance(error, FileNotFoundError | PermissionError)
