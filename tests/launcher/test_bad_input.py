"""Bad input as a user meets it: an exit code with a meaning, one line that helps, and nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import STEPS, Runs, contents, happened
from support import SEQUENCE_LENGTH, event_names, metrics, sentences, write_shard

from launcher import registry

SAVED_EVERY_STEPS = 2
DISK_KIB = 1500
"""Holds the code of a run and two of its checkpoints, but not three."""


def told(outcome: subprocess.CompletedProcess[str], run: Path) -> list[str]:
    """Lines on stderr of a program that printed no traceback anywhere, its logs included."""
    logs = [log.read_text() for log in run.glob("logs/**/*.log")]
    assert not any("Traceback" in text for text in (outcome.stdout, outcome.stderr, *logs))
    return outcome.stderr.splitlines()


def ends(outcome: subprocess.CompletedProcess[str], run: Path, code: int, reason: str) -> None:
    """A run that started and failed says why in its last line, and remembers it."""
    assert outcome.returncode == code
    last = told(outcome, run)[-1]
    assert last.startswith(f"trainyard: {run}: failed at step ")
    assert reason in last
    assert reason in registry.status(run)["reason"]
    assert "restart" not in event_names(run)


def damage(run: Path) -> list[dict[str, Any]]:
    return happened(run, "data_damage")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("optimizer.lrr=1", "optimizer.lrr: no such key; did you mean optimizer.lr?"),
        ("data.corpora.legal.train=/no/such/*.gz", "data.corpora.legal.train=/no/such/*.gz: no such file"),
        ("global_batch=7", "global_batch=7: must be a multiple of micro_batch x nodes x gpus_per_node = 2, "),
        ("model=llama-7bb", "model=llama-7bb: no such preset; did you mean llama-7b?"),
        ("model.tokenizer=/no/such", "model.tokenizer=/no/such: no such directory"),
        ("run.directory=/proc/run", "run.directory=/proc/run: cannot be written: "),
        ("run.directory=/dev/null/run", "run.directory=/dev/null/run: cannot be written: Not a directory"),
        (f"run.directory=/tmp/{'x' * 300}", "cannot be written: File name too long"),
        ("micro_batch=20000000 global_batch=20000000", "micro_batch=20000000: needs "),
    ],
)
def test_a_mistake_is_refused_in_one_line_before_anything_is_created(
    runs: Runs, run: Path, wrong: str, line: str
) -> None:
    before = contents(runs.root)
    outcome = runs.trainyard("train", *runs.overrides(), f"run.directory={run}", *wrong.split())
    assert outcome.returncode == 2
    (only,) = told(outcome, run)
    assert only.startswith("trainyard: ")
    assert line in only
    assert outcome.stdout == ""
    assert not run.exists()
    assert contents(runs.root) == before


@pytest.mark.parametrize("verb", ["plan", "launch"])
def test_other_verbs_refuse_a_mistake_in_the_same_words(runs: Runs, run: Path, verb: str) -> None:
    outcome = runs.trainyard(verb, "optimizer.lrr=1", f"run.directory={run}")
    assert outcome.returncode == 2
    assert told(outcome, run) == ["trainyard: optimizer.lrr: no such key; did you mean optimizer.lr?"]


def test_a_registry_that_cannot_be_written_is_one_line(runs: Runs, run: Path) -> None:
    command = [sys.executable, "-P", "-m", "launcher", "launch", *runs.overrides(), f"run.directory={run}"]
    environment = runs.environment | {"XDG_STATE_HOME": "/dev/null"}
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 3
    assert told(outcome, run) == ["trainyard: /dev/null/trainyard: Not a directory"]


def test_an_empty_shard_among_others_is_passed_over_with_an_event(runs: Runs, run: Path) -> None:
    text = run.parent / "text"
    write_shard(text / "a.json.gz", sentences(200))
    (text / "b.json.gz").touch()
    own = f"data.corpora.legal.train={text}/*"
    outcome = runs.trainyard("train", *runs.overrides(2), own, f"run.directory={run}")
    assert (outcome.returncode, len(metrics(run))) == (0, 2)
    assert [(row["shard"], row["reason"]) for row in damage(run)] == [
        (f"file://{text}/b.json.gz", "empty file")
    ]
    assert any("b.json.gz" in line for line in told(outcome, run))


def test_nothing_but_empty_shards_is_refused(runs: Runs, run: Path) -> None:
    text = run.parent / "text"
    text.mkdir()
    (text / "a.json.gz").touch()
    own = f"data.corpora.legal.train={text}/*"
    outcome = runs.trainyard("train", *runs.overrides(2), own, f"run.directory={run}")
    ends(outcome, run, 2, f"data.corpora.legal.train={text}/*: all 1 files are empty")


def cut_short(directory: Path) -> Path:
    """A shard of which a few documents can still be read, and a whole one."""
    write_shard(directory / "b.json.gz", sentences(200, 1000))
    whole = write_shard(directory / "a.json.gz", sentences(200)).read_bytes()
    (directory / "a.json.gz").write_bytes(whole[: len(whole) // 8])
    return directory


def test_a_truncated_shard_costs_its_end_and_an_event_names_the_place(runs: Runs, run: Path) -> None:
    text = cut_short(run.parent / "text")
    own = f"data.corpora.legal.train={text}/*"
    outcome = runs.trainyard("train", *runs.overrides(2), own, f"run.directory={run}")
    assert (outcome.returncode, len(metrics(run))) == (0, 2)
    row = damage(run)[0]
    assert row["shard"] == f"file://{text}/a.json.gz"
    assert row["rest_lost"]
    assert 0 < row["document"] < 100
    assert any(f"a.json.gz, document {row['document']}, " in line for line in told(outcome, run))


def test_a_truncated_shard_ends_a_run_that_asked_for_it(runs: Runs, run: Path) -> None:
    text = cut_short(run.parent / "text")
    own = [f"data.corpora.legal.train={text}/*", "data.faults.shard=fail"]
    outcome = runs.trainyard("train", *runs.overrides(50), *own, f"run.directory={run}")
    ends(outcome, run, 2, f"data.faults.shard=fail: file://{text}/a.json.gz, document ")


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(runs: Runs, run: Path) -> None:
    small = [*runs.overrides(), "model.vocabulary=200", f"run.directory={run}"]
    ends(runs.trainyard("train", *small), run, 2, "model.vocabulary=200: the tokenizer has 320 ids")


def test_a_checkpoint_of_another_model_is_refused_and_left_as_it_is(runs: Runs, run: Path) -> None:
    shutil.copytree(runs.finished / "checkpoints", run / "checkpoints", symlinks=True)
    before = contents(run / "checkpoints")
    wider = [*runs.overrides(), "model.ffn=96", f"run.directory={run}"]
    outcome = runs.trainyard("train", *wider)
    newest = run / "checkpoints" / f"step-{STEPS:08d}"
    ends(outcome, run, 2, f"{newest}: a checkpoint of another model: ")
    assert contents(run / "checkpoints") == before
    assert os.readlink(run / "checkpoints" / "latest") == newest.name


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of DISK_KIB, which only root can make."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "tmpfs", disk]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("A FULL DISK WAS NOT TESTED: that needs root and the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_ends_the_run_with_its_checkpoints_and_a_resume_finishes_it(
    runs: Runs, small_disk: Path
) -> None:
    run, fill = small_disk / "run", small_disk / "fill"
    saving = [f"checkpoint.every_steps={SAVED_EVERY_STEPS}", "checkpoint.keep_last=9"]
    overrides = [*runs.overrides(8), *saving, f"run.directory={run}"]
    outcome = runs.trainyard("train", *overrides)
    ends(outcome, run, 3, f"{run}/checkpoints: no space left, a checkpoint needs ")
    checkpoints = run / "checkpoints"
    kept = [f"step-{saved['step']:08d}" for saved in happened(run, "checkpoint")]
    assert kept
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", *kept]
    assert os.readlink(checkpoints / "latest") == kept[-1]
    before = contents(checkpoints)

    with fill.open("wb") as file, pytest.raises(OSError, match="No space left"):
        file.write(b"x" * 1024 * DISK_KIB)
    outcome = runs.trainyard("resume", str(run))
    assert outcome.returncode == 3
    assert told(outcome, run)[-1].startswith(f"trainyard: {run}: failed at step ")
    assert contents(checkpoints) == before

    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert runs.trainyard("resume", str(run)).returncode == 0
    assert [row["step"] for row in metrics(run)] == list(range(1, 9))
    assert metrics(run)[-1]["tokens"] == 8 * 8 * SEQUENCE_LENGTH


def test_a_disk_too_small_for_the_code_is_one_line(runs: Runs, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=100k", small_disk], check=True)
    run = small_disk / "run"
    outcome = runs.trainyard("train", *runs.overrides(), f"run.directory={run}")
    assert outcome.returncode == 2
    (only,) = told(outcome, run)
    assert only.startswith(f"trainyard: run.directory={run}: cannot be written: ")
    assert "No space left on device" in only
    assert not (run / "config.yaml").exists()
