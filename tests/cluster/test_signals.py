"""A first notice to stop is remembered, a second one ends the process at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.signals import NOTICES

WAIT_FOR_NOTICE = """
import sys, time
from pathlib import Path
from cluster.signals import StopNotice
stop = StopNotice(Path(sys.argv[1]))
print("ready", flush=True)
while not stop.requested:
    time.sleep(0.01)
print(stop.reason, flush=True)
time.sleep(float(sys.argv[2]))
print("saved", flush=True)
"""


def waiting(run: Path, save_seconds: float = 0) -> subprocess.Popen[str]:
    """A process that listens for notices, and takes a while to save once it has one."""
    command = [sys.executable, "-P", "-c", WAIT_FOR_NOTICE, str(run), str(save_seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("notice", NOTICES, ids=lambda notice: str(notice.name))
def test_the_first_signal_lets_the_process_save(tmp_path: Path, notice: signal.Signals) -> None:
    process = waiting(tmp_path)
    process.send_signal(notice)
    assert process.communicate(timeout=10)[0] == f"{notice.name}\nsaved\n"
    assert process.returncode == 0


def test_the_second_signal_ends_the_process_with_75_at_once(tmp_path: Path) -> None:
    process = waiting(tmp_path, save_seconds=60)
    process.send_signal(signal.SIGUSR1)
    assert process.stdout is not None
    assert process.stdout.readline() == "SIGUSR1\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=10)[0] == ""
    assert process.returncode == 75


def test_a_stop_file_is_a_notice(tmp_path: Path) -> None:
    process = waiting(tmp_path)
    time.sleep(0.2)
    assert process.poll() is None
    (tmp_path / "STOP").touch()
    assert process.communicate(timeout=10)[0] == "STOP file\nsaved\n"
