"""Runs on this machine: starts the node agent, and starts it again when a run asks to be requeued."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO

from cluster import attempt as attempts
from cluster import events, exit_codes
from configs.load import load, reason
from launcher.report import write_report

POLL_SECONDS = 0.2


def agent_command(run: Path) -> list[str]:
    """What runs on the node. -P keeps the current directory out of the import path."""
    return [sys.executable, "-P", "-m", "cluster.agent", str(run)]


def supervisor_command(run: Path) -> list[str]:
    """What minds a detached run."""
    return [sys.executable, "-P", "-m", "launcher.backends.local", str(run)]


def submit(run: Path, held: IO[str]) -> int:
    """Start a detached supervisor for a run that the caller holds; returns its process id at once."""
    logs = run / "logs"
    logs.mkdir(exist_ok=True)
    with (logs / "supervisor.log").open("ab") as log:
        # The supervisor inherits the lock, so there is no moment without an owner.
        process = subprocess.Popen(
            supervisor_command(run),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[held.fileno()],
        )
    return process.pid


def supervise(run: Path, tick: Callable[[], None]) -> int:
    """Mind a run to its end, as a scheduler would, and return its exit code. The caller holds the run.

    A run that stops with a checkpoint (75) is started again unless the user asked for the stop:
    by a signal to this process, each of which is passed on, or by a STOP file. `tick` is called several
    times a second.
    """
    try:
        code = _Supervisor(run).run(tick)
    except OSError as error:
        code = exit_codes.MISSING_FROM_ENVIRONMENT
        events.record(run, "failed", exit_code=code, message=reason(error))
    events.record(run, "ended", exit_code=code)
    try:
        write_report(run)
    except OSError as error:
        events.record(run, "report_failed", reason=reason(error))
    return code


class _Supervisor:
    def __init__(self, run: Path) -> None:
        self._run = run
        self._notices = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks
                signal.signal(number, self._notice)

    def run(self, tick: Callable[[], None]) -> int:
        restarts = load(self._run / "config.yaml").cluster.restarts
        lost_agents = 0  # in a row, without a new checkpoint
        while True:
            if self._notices:
                return exit_codes.REQUEUE
            before = attempts.newest_checkpoint(self._run)
            code = self._attempt(tick)
            if self._notices or (self._run / "STOP").exists():
                # An agent that was told to stop before it listened dies of the signal.
                return code if code in exit_codes.FINAL else exit_codes.REQUEUE
            if code not in exit_codes.FINAL:
                lost_agents = lost_agents + 1 if attempts.newest_checkpoint(self._run) == before else 1
                events.record(self._run, "agent_lost", exit_code=code)
            if code in exit_codes.FINAL - {exit_codes.REQUEUE} or lost_agents > restarts:
                return code
            events.record(self._run, "requeue", exit_code=code)

    def _attempt(self, tick: Callable[[], None]) -> int:
        logs = self._run / "logs" / f"attempt-{attempts.current(self._run) + 1}"
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / "agent.log").open("ab") as log:
            agent = subprocess.Popen(
                agent_command(self._run),
                env=os.environ
                | {
                    "PYTHONPATH": str(self._run / "frozen" / "code"),
                    "TRAINYARD_PARENT": str(os.getpid()),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        passed_on = 0
        while agent.poll() is None:
            if passed_on < self._notices:
                passed_on += 1
                agent.terminate()
            # What shows the run must not end it; rich, too, exits when nobody reads its output any more.
            with contextlib.suppress(Exception, SystemExit):
                tick()
            time.sleep(POLL_SECONDS)
        return agent.returncode

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._notices += 1


def main() -> int:
    return supervise(Path(sys.argv[1]), lambda: None)


if __name__ == "__main__":
    sys.exit(main())
