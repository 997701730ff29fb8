"""What state a run is in follows from its files and from whether a process minds it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import events
from configs.schema import ConfigError
from launcher import registry

TRAINING = [("attempt", {}), ("training", {"step": 0, "steps": 9})]
CRASH = ("crash", {"rank": 1, "exit_code": 137, "last_line": "Killed"})
HOLD = """
import sys, time
from pathlib import Path
from launcher import registry
held = registry.hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").touch()
    return tmp_path


def happen(run: Path, happened: list[tuple[str, dict[str, Any]]]) -> None:
    for name, fields in happened:
        events.record(run, name, **fields)


@pytest.mark.parametrize(
    ("happened", "minded", "unminded"),
    [
        ([], "starting", "lost"),
        (TRAINING[:1], "starting", "lost"),
        (TRAINING, "training", "lost"),
        ([*TRAINING, ("signal", {"signal": "SIGTERM"})], "stopping", "lost"),
        ([*TRAINING, ("signal", {"signal": "SIGTERM"}), ("requeue", {}), *TRAINING], "training", "lost"),
        ([*TRAINING, ("ended", {"exit_code": 0})], "done", "done"),
        ([*TRAINING, ("ended", {"exit_code": 75})], "stopped", "stopped"),
        ([*TRAINING, ("ended", {"exit_code": 2})], "failed", "failed"),
        ([*TRAINING, ("ended", {"exit_code": 3})], "failed", "failed"),
        ([*TRAINING, ("ended", {"exit_code": 77})], "failed", "failed"),
        ([*TRAINING, ("ended", {"exit_code": 1})], "failed", "failed"),
        ([*TRAINING, ("ended", {"exit_code": 75}), *TRAINING], "training", "lost"),
    ],
)
def test_the_state_follows_from_the_last_events_and_the_lock(
    run: Path, happened: list[tuple[str, dict[str, Any]]], minded: str, unminded: str
) -> None:
    happen(run, happened)
    with registry.hold(run):
        assert registry.status(run)["state"] == minded
    assert registry.status(run)["state"] == unminded


@pytest.mark.parametrize(
    ("happened", "reason"),
    [
        ([("failed", {"message": "no such file"})], "no such file"),
        ([CRASH], "rank 1 ended with 137: Killed"),
        (
            [CRASH, ("no_progress", {"crashes": 4})],
            "no new checkpoint in 4 tries; rank 1 ended with 137: Killed",
        ),
        ([CRASH, ("attempt", {})], None),
    ],
)
def test_a_reason_is_told_until_the_next_attempt(
    run: Path, happened: list[tuple[str, dict[str, Any]]], reason: str | None
) -> None:
    happen(run, [*TRAINING, *happened])
    assert registry.status(run)["reason"] == reason


def test_the_newest_step_and_loss_are_told_and_evaluations_have_none(run: Path) -> None:
    happen(run, TRAINING)
    rows = ['{"step": 4, "loss": 2.5}', '{"step": 5, "eval/legal/loss": 1.0}', '{"step": 6, "lo']
    (run / "metrics.jsonl").write_text("\n".join(rows))
    status = registry.status(run)
    assert (status["step"], status["steps"], status["loss"]) == (5, 9, 2.5)


def test_a_run_is_held_by_one_process_until_that_ends_however_it_ends(run: Path) -> None:
    command = [sys.executable, "-P", "-c", HOLD, str(run)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert registry.is_minded(run)
    with pytest.raises(ConfigError, match=f"^{run}: this run is being trained already$"):
        registry.hold(run)
    holder.kill()
    holder.communicate()
    assert not registry.is_minded(run)


def test_asking_whether_a_run_is_minded_writes_nothing(run: Path) -> None:
    registry.status(run)
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_runs_are_found_by_directory_and_by_name_the_newest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for directory in ("old", "new", "gone"):
        (tmp_path / directory).mkdir()
        if directory != "gone":
            (tmp_path / directory / "config.yaml").touch()
            (tmp_path / directory / "frozen").mkdir()
        registry.add("legal-7b", tmp_path / directory, "local")
    assert registry.find("legal-7b") == tmp_path / "new"
    assert registry.find(str(tmp_path / "old")) == tmp_path / "old"
    assert [entry.directory.name for entry in registry.entries()] == ["old", "new"]
    with pytest.raises(ConfigError, match=r"^legal-8b: no such run; did you mean legal-7b\?$"):
        registry.find("legal-8b")
    with pytest.raises(ConfigError, match="no such run"):
        registry.find("x" * 300)
