"""Threads that read and tokenize ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Workers:
    """A few threads; with none, what is asked for is done at once.

    Daemons, unlike those of concurrent.futures: one that waits for a dead store must not keep the process
    alive.
    """

    def __init__(self, count: int) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Have it called; the future has its result or its exception."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call())
            except BaseException as error:  # raised to whoever asks for the result
                future.set_exception(error)

        if self._threads:
            self._tasks.put(run)
        else:
            run()
        return future

    def close(self) -> None:
        """Let the threads end once they have done what they were given."""
        for _ in self._threads:
            self._tasks.put(_end)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not _end:
            task()


def _end() -> None:
    """Stands for no task."""
