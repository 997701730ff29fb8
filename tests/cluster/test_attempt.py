"""Attempts are numbered without gaps or doubles, and a newer one fences off the older ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster import attempt

PROCESSES, EACH = 6, 20
BEGIN_MANY = f"""
import sys
from pathlib import Path
from cluster import attempt
for _ in range({EACH}):
    print(attempt.begin(Path(sys.argv[1])))
"""


def test_processes_that_begin_at_the_same_time_get_different_numbers(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", BEGIN_MANY, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)]
    numbers = [int(line) for process in processes for line in process.communicate()[0].split()]
    assert sorted(numbers) == list(range(1, PROCESSES * EACH + 1))
    assert attempt.current(tmp_path) == PROCESSES * EACH


def test_there_is_no_attempt_before_the_first(tmp_path: Path) -> None:
    assert attempt.current(tmp_path) == 0


def test_the_tenth_attempt_is_newer_than_the_ninth(tmp_path: Path) -> None:
    for _ in range(10):
        attempt.begin(tmp_path)
    assert attempt.current(tmp_path) == 10


def test_an_attempt_is_fenced_off_once_the_next_began(tmp_path: Path) -> None:
    first = attempt.begin(tmp_path)
    attempt.check(tmp_path, first)
    attempt.begin(tmp_path)
    with pytest.raises(attempt.Fenced, match="attempt 1 is fenced off: attempt 2 has begun"):
        attempt.check(tmp_path, first)
