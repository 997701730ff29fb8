"""Notices to stop: signals, the STOP file, and a parent that is gone."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from cluster import exit_codes

NOTICES = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STOP_FILE_SECONDS = 1.0


class StopNotice:
    """Remembers the first notice to stop; a second signal ends the process at once.

    The training loop asks `requested` at step boundaries. A file RUN/STOP is a notice too, looked for
    at most once a second because the run directory may be on a network file system.
    """

    def __init__(self, run: Path) -> None:
        self.reason: str | None = None
        self._signalled = False
        self._stop_file = run / "STOP"
        self._looked_at = 0.0
        for number in NOTICES:
            signal.signal(number, self._notice)

    @property
    def requested(self) -> bool:
        now = time.monotonic()
        if self.reason is None and now - self._looked_at >= STOP_FILE_SECONDS:
            self._looked_at = now
            if self._stop_file.exists():
                self.reason = "STOP file"
        return self.reason is not None

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            os._exit(exit_codes.REQUEUE)
        self._signalled = True
        self.reason = self.reason or signal.Signals(number).name


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however that happens (Linux).

    The parent names itself in TRAINYARD_PARENT; if it ended before the kernel was asked, so do we.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if int(os.environ.get("TRAINYARD_PARENT", os.getppid())) != os.getppid():
            os._exit(1)
