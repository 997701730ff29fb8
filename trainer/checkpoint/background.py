"""One task at a time beside the training loop."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """A thread for one task after the other; what a task raises waits for whoever waits for it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the last task has ended with an error that nobody has been told yet."""
        return self._failure is not None and not self.busy

    def start(self, task: Callable[[], None]) -> None:
        """Begin a task; the one before must have been waited for."""
        # A daemon: a rank that ends by an error must not wait for ranks that are gone.
        self._thread = threading.Thread(target=self._run, args=(task,), name=self._name, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the task is done; raises what it raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            self._failure = error
