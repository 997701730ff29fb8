"""A run is shown as plain whole lines where there is no terminal, whatever its files hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster import events
from launcher.watch import Watch, describe_event

NUMBERS = {"tokens": 1_500_000, "loss": 2.5, "tokens_per_second": 50_000.0, "mfu": 0.41}


def write(file: Path, *rows: dict[str, Any]) -> None:
    with file.open("a") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def shown(run: Path, capsys: pytest.CaptureFixture[str], from_start: bool = True) -> list[str]:
    """Lines that a watch prints, without the time of day."""
    with Watch(run, from_start):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    return [line[9:] for line in lines]


def test_steps_and_evaluations_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    perplexity = {"eval/legal/loss": 1.0, "eval/legal/perplexity": 2.718, "eval/web/perplexity": 7.5}
    write(tmp_path / "metrics.jsonl", {"step": 7} | NUMBERS, {"step": 7, "tokens": 1} | perplexity)
    assert shown(tmp_path, capsys) == [
        "step 7: 1.5M tokens  loss 2.500  50K tok/s  MFU 41.0%",
        "step 7: perplexity legal 2.72, web 7.50",
    ]


def test_an_unknown_mfu_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "metrics.jsonl", {"step": 7} | NUMBERS | {"mfu": None})
    assert shown(tmp_path, capsys) == ["step 7: 1.5M tokens  loss 2.500  50K tok/s"]


def test_an_event_is_one_line_however_long_and_none_of_it_is_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "[bold red] :smile: " + "word " * 60 + "end"
    events.record(tmp_path, "data_damage", shard="a.json.gz", document=8, reason=reason)
    assert shown(tmp_path, capsys) == [f"data_damage: shard a.json.gz, document 8, reason {reason}"]


def test_a_torn_line_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events.jsonl").write_bytes(b'{"event": "tor\n\xff\n[]\n')
    events.record(tmp_path, "requeue")
    assert shown(tmp_path, capsys) == ["requeued"]


def test_a_watch_shows_only_what_is_new_unless_asked_for_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events.record(tmp_path, "finished", step=3)
    assert shown(tmp_path, capsys, from_start=False) == []
    with Watch(tmp_path) as watch:
        events.record(tmp_path, "requeue")
        watch.tick()
    assert capsys.readouterr().err.splitlines()[0].endswith(" requeued")


def test_half_a_line_is_shown_once_it_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "events.jsonl"
    with Watch(tmp_path, from_start=True) as watch:
        file.write_text('{"time": 0, "event": "finished", ')
        watch.tick()
        assert capsys.readouterr().err == ""
        file.write_text('{"time": 0, "event": "finished", "step": 3}\n')
    assert capsys.readouterr().err.endswith(" finished at step 3\n")


def test_rows_that_a_resume_carried_over_are_not_shown_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, {"step": 1} | NUMBERS)
    with Watch(tmp_path) as watch:
        write(tmp_path / "carried", {"step": 1} | NUMBERS)
        (tmp_path / "carried").replace(file)
        watch.tick()
        write(file, {"step": 2} | NUMBERS)
        watch.tick()
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()] == ["2:"]


def test_an_event_that_nobody_described_shows_its_fields() -> None:
    event = {"time": 1.0, "event": "node_excluded", "attempt": 2, "node": "gpu-7", "reason": "ECC"}
    assert describe_event(event) == "node_excluded: node gpu-7, reason ECC"
