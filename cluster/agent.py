"""The node agent: one per node on every backend. Starts one worker per GPU and minds them.

    python -P -m cluster.agent RUN

Worker processes are kept here rather than by torch's elastic agent, because that one closes all
workers at the first non-zero exit: a coordinated stop (exit 75 on every rank) would become a race.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cluster import attempt as attempts
from cluster import events, exit_codes
from cluster.environment import local_placement
from cluster.signals import NOTICES, die_with_parent
from configs.load import load, reason
from configs.schema import Config, ConfigError

POLL_SECONDS = 0.1
CLOSE_SECONDS = 10.0
LAST_LINE_BYTES = 1 << 16
SECOND_NOTICE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0


@dataclass
class Worker:
    rank: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def exit_code(self) -> int | None:
        """None while running; 128 + N when ended by signal N, as shells count."""
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code


class Agent:
    """Runs the workers of one node until they end with a code that has a meaning."""

    def __init__(self, run: Path, config: Config) -> None:
        self.run = run
        self.config = config
        self.attempt = attempts.begin(run)
        os.environ["TRAINYARD_ATTEMPT"] = str(self.attempt)
        self.workers: list[Worker] = []
        self.stop_reason: str | None = None
        self.stop_deadline = float("inf")
        for number in NOTICES:
            signal.signal(number, self._notice)

    def main(self) -> int:
        """Start workers, restart them after a crash within the budget, return the run's exit code."""
        step = int((attempts.newest_checkpoint(self.run) or "step-0").removeprefix("step-"))
        host = os.uname().nodename
        events.record(self.run, "attempt", step=step, agent_pid=os.getpid(), host=host)
        crashes = 0
        while True:
            before = attempts.newest_checkpoint(self.run)
            self._start()
            code = self._wait()
            if code in exit_codes.FINAL:
                if code == exit_codes.DONE and self.config.run.export:
                    self._export()
                return code
            if self._stopping():
                return exit_codes.REQUEUE
            crashes = crashes + 1 if attempts.newest_checkpoint(self.run) == before else 1
            if crashes > self.config.cluster.restarts:
                events.record(self.run, "no_progress", crashes=crashes)
                return exit_codes.NO_PROGRESS
            pause_seconds = min(2.0 ** (crashes - 1), LONGEST_PAUSE_SECONDS)
            events.record(self.run, "restart", crashes=crashes, pause_seconds=pause_seconds)
            self._pause(pause_seconds)
            if self._stopping():
                return exit_codes.REQUEUE

    def _stopping(self) -> bool:
        return self.stop_reason is not None or (self.run / "STOP").exists()

    def _pause(self, seconds: float) -> None:
        """Sleep, but no longer than until a notice to stop."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._stopping():
            time.sleep(POLL_SECONDS)

    def _start(self) -> None:
        count = self.config.gpus_per_node
        placement = local_placement()
        logs = self.run / "logs" / f"attempt-{self.attempt}"
        logs.mkdir(parents=True, exist_ok=True)
        self.workers = []
        for local_rank in range(count):
            rank = placement.node_rank * count + local_rank
            path = logs / f"rank-{rank}.log"
            with path.open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "trainer", str(self.run)],
                    env=placement.worker_environment(local_rank, count, self.attempt),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # A terminal's Ctrl-C reaches the agent only, which passes it on once.
                    start_new_session=True,
                )
            self.workers.append(Worker(rank, process, path))
        if self.stop_reason is not None:
            self._signal_workers(signal.SIGTERM)

    def _wait(self) -> int:
        """Wait for the end of all workers; a failed one takes the others with it."""
        while True:
            ended = [(worker, code) for worker in self.workers if (code := worker.exit_code) is not None]
            failed = [worker for worker, code in ended if code not in (exit_codes.DONE, exit_codes.REQUEUE)]
            if failed:
                self._close()
                return self._verdict(failed)
            if len(ended) == len(self.workers):
                return max(code for _, code in ended)
            if time.monotonic() > self.stop_deadline:
                events.record(self.run, "stop_timeout", seconds=self.config.cluster.stop_seconds)
                self._signal_workers(signal.SIGKILL)
            time.sleep(POLL_SECONDS)

    def _export(self) -> None:
        """A run that is done stays done when its export fails: `trainyard export` can be tried again."""
        command = [sys.executable, "-P", "-m", "trainer.export", str(self.run)]
        environment = os.environ | {"TRAINYARD_PARENT": str(os.getpid())}
        outcome = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        if outcome.returncode:
            reason = (outcome.stderr.strip().splitlines() or ["no message"])[-1]
            events.record(self.run, "export_failed", exit_code=outcome.returncode, reason=reason)

    def _verdict(self, failed: list[Worker]) -> int:
        """One code for the workers that failed first: a deliberate end explains the others' crashes."""
        codes = [worker.exit_code for worker in self.workers]
        for meaning in (
            exit_codes.BAD_INPUT,
            exit_codes.MISSING_FROM_ENVIRONMENT,
            exit_codes.NO_PROGRESS,
            exit_codes.UNHEALTHY_NODE,
        ):
            if meaning in codes:
                return meaning
        for worker in failed:
            events.record(
                self.run,
                "crash",
                rank=worker.rank,
                exit_code=worker.exit_code,
                log=str(worker.log),
                last_line=_last_line(worker.log),
            )
        code = failed[0].exit_code
        assert code is not None
        return code

    def _close(self) -> None:
        """End workers whose peer has failed: they wait for it in a collective."""
        deadline = time.monotonic() + CLOSE_SECONDS
        self._signal_workers(signal.SIGTERM)
        while time.monotonic() < deadline:
            if all(worker.exit_code is not None for worker in self.workers):
                return
            time.sleep(POLL_SECONDS)
        self._signal_workers(signal.SIGKILL)
        for worker in self.workers:
            worker.process.wait()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self.stop_reason is None:
            self.stop_reason = signal.Signals(number).name
            self.stop_deadline = time.monotonic() + self.config.cluster.stop_seconds
            events.record(self.run, "signal", signal=self.stop_reason)
        else:  # a worker inside a collective operation cannot hear a second notice
            self.stop_deadline = time.monotonic() + SECOND_NOTICE_SECONDS
        self._signal_workers(signal.SIGTERM)

    def _signal_workers(self, number: signal.Signals) -> None:
        for worker in self.workers:
            if worker.exit_code is None:
                worker.process.send_signal(number)


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_LINE_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else ""


def main() -> int:
    run = Path(sys.argv[1])
    die_with_parent()
    try:
        config = load(run / "config.yaml")
    except ConfigError as error:
        print(f"trainyard: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    try:
        return Agent(run, config).main()
    except OSError as error:
        code = exit_codes.MISSING_FROM_ENVIRONMENT
        print(f"trainyard: {reason(error)}", file=sys.stderr)
        events.record(run, "failed", exit_code=code, message=reason(error))
        return code


if __name__ == "__main__":
    sys.exit(main())
