"""events.jsonl keeps every whole line, whoever writes it and whatever happens to another line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster import events

WRITERS, EACH = 4, 150
WRITE_MANY = f"""
import sys
from pathlib import Path
from cluster import events
for number in range({EACH}):
    events.record(Path(sys.argv[1]), "written", writer=int(sys.argv[2]), number=number, text="x" * 3000)
"""


def test_lines_of_concurrent_writers_stay_whole_and_in_each_writers_order(tmp_path: Path) -> None:
    commands = [[sys.executable, "-P", "-c", WRITE_MANY, tmp_path, str(writer)] for writer in range(WRITERS)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait() for process in processes] == [0] * WRITERS
    rows = list(events.read(tmp_path / "events.jsonl"))
    for writer in range(WRITERS):
        assert [row["number"] for row in rows if row["writer"] == writer] == list(range(EACH))
    assert {len(row["text"]) for row in rows} == {3000}


def test_an_event_has_its_time_and_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_ATTEMPT", "7")
    events.record(tmp_path, "checkpoint", step=3)
    (row,) = events.read(tmp_path / "events.jsonl")
    assert row.pop("time") > 1.7e9
    assert row == {"event": "checkpoint", "attempt": 7, "step": 3}


@pytest.mark.parametrize(
    "torn", ['{"event": "tor', '{"event": "torn"', "\x00\x00\x00", "é\udcff", "[1, 2]", "7"]
)
def test_a_torn_line_costs_no_other(tmp_path: Path, torn: str) -> None:
    events.record(tmp_path, "before")
    with (tmp_path / "events.jsonl").open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(torn)
    events.record(tmp_path, "after")
    assert [row["event"] for row in events.read(tmp_path / "events.jsonl")] == ["before", "after"]


def test_a_file_that_is_not_there_holds_no_events(tmp_path: Path) -> None:
    assert list(events.read(tmp_path / "events.jsonl")) == []


def test_a_full_disk_is_told_on_stderr_and_ends_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    events.record(tmp_path, "checkpoint", step=3)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("trainyard: event not written (No space left on device): ")
    assert '"step": 3' in err


def test_a_full_disk_that_holds_the_log_too_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-P", "-c", WRITE_MANY, tmp_path, "0"]
        assert subprocess.run(command, stdout=full, stderr=full).returncode == 0
