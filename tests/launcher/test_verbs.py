"""What each verb prints and returns, for people on a terminal and for programs that read JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from runs import STEPS, Runs, contents
from support import metrics

from configs.load import load


def test_help_names_every_verb(runs: Runs) -> None:
    outcome = runs.trainyard("--help")
    assert outcome.returncode == 0
    for verb in ("plan", "train", "launch", "runs", "logs", "cancel", "resume", "report", "sample", "export"):
        assert f"\n    {verb} " in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "trian: no such verb; did you mean train?"),
        (["train", "--fast"], "unrecognized arguments: --fast"),
        (["plan", "--cfg", "all"], "argument --cfg: invalid choice: 'all' (choose from 'job')"),
        (["train", "--config-dir", "absent"], "--config-dir=absent: no such directory"),
        (["logs"], "the following arguments are required: RUN"),
        (["logs", "absent"], "absent: no such run; allowed: "),
        (["logs", "first", "--rank", "7"], "--rank=7: no log of this rank in "),
        (["report", "frist"], "frist: no such run; did you mean first?"),
        (["cancel", "first"], "first: this run is not being trained"),
        (["resume", "x" * 300], "no such run"),
        (["plan", "--figure", "absent/plan.png"], "--figure=absent/plan.png: "),
        (["plan", "--figure", "plan.doc"], "--figure=plan.doc: "),
        (["plan", "plan.deadline_days=1e-9", "hardware=h100-sxm-80gb"], "above the peak of "),
        (["train", "precision.compute=fp8"], "precision.compute=fp8: can be planned but not trained yet"),
        (["plan", "--verify", "sharding=zero2"], "sharding.strategy=zero2: "),
        (["export", "first", "--step", "7"], "has no step-00000007 in "),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(runs: Runs, arguments: list[str], line: str) -> None:
    outcome = runs.trainyard(*arguments)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    (only,) = outcome.stderr.splitlines()
    assert only.startswith("trainyard: ")
    assert line in only


def test_runs_are_listed_as_one_json_object(runs: Runs) -> None:
    outcome = runs.trainyard("runs", "--json")
    assert outcome.stderr == ""
    listing = json.loads(outcome.stdout)
    row = next(row for row in listing["runs"] if row["directory"] == str(runs.finished))
    assert row == {
        "name": "first",
        "directory": str(runs.finished),
        "state": "done",
        "step": STEPS,
        "steps": STEPS,
        "loss": metrics(runs.finished)[-1]["loss"],
        "reason": None,
    }


def test_a_plan_is_one_json_object(runs: Runs) -> None:
    outcome = runs.trainyard("plan", "--json", "model=llama-7b", "hardware=h100-sxm-80gb")
    assert outcome.stderr == ""
    assert json.loads(outcome.stdout)["model"]["name"] == "llama-7b"


def test_a_plan_is_explained_and_drawn(runs: Runs, tmp_path: Path) -> None:
    outcome = runs.trainyard("plan", "--explain", "--figure", str(tmp_path / "plan.svg"))
    assert outcome.returncode == 0
    assert "time.step_seconds" in outcome.stdout
    assert (tmp_path / "plan.svg").stat().st_size > 10_000


def test_a_plan_is_verified_against_a_trace_as_one_json_object(runs: Runs) -> None:
    small = ("model=llama-60m", "model.layers=2", "sharding=auto", "micro_batch=1", "global_batch=4")
    outcome = runs.trainyard("plan", "--verify", "--json", *small)
    assert outcome.returncode == 0
    assert 0.9 < json.loads(outcome.stdout)["ratio"] < 1.1


def test_a_composed_configuration_is_printed_as_yaml_that_loads_again(runs: Runs, tmp_path: Path) -> None:
    outcome = runs.trainyard("plan", "--cfg", "job", "model=llama-7b", "optimizer.lr=1e-5")
    (tmp_path / "config.yaml").write_text(outcome.stdout)
    assert load(tmp_path / "config.yaml").optimizer.lr == yaml.safe_load(outcome.stdout)["optimizer"]["lr"]


def test_the_table_of_runs_shows_state_and_progress(runs: Runs) -> None:
    lines = runs.trainyard("runs").stdout.splitlines()
    assert lines[0].split() == ["run", "state", "step", "loss", "reason", "directory"]
    assert ["first", "done", f"{STEPS}/{STEPS}"] in [line.split()[:3] for line in lines]


def test_logs_show_the_whole_run_or_one_ranks_file(runs: Runs) -> None:
    whole = runs.trainyard("logs", "first").stderr
    assert f"finished at step {STEPS}\n" in whole
    assert "\x1b" not in whole
    rank = runs.trainyard("logs", str(runs.finished), "--rank", "0").stdout
    assert (
        rank.splitlines()
        == ((runs.finished / "logs" / "attempt-1" / "rank-0.log").read_text().splitlines()[-100:])
    )


def test_a_report_is_written_and_its_path_printed(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(runs.finished, run, symlinks=True)
    (run / "report.html").unlink()
    outcome = runs.trainyard("report", str(run))
    assert outcome.stdout == f"{run / 'report.html'}\n"
    assert (run / "report.html").read_text().startswith("<!doctype html>")


def test_an_earlier_step_is_exported_beside_the_runs_own_export(runs: Runs, tmp_path: Path) -> None:
    before = contents(runs.finished / "export")
    target = tmp_path / "step-20"
    outcome = runs.trainyard("export", "first", "--step", "20", "--to", str(target))
    assert (outcome.returncode, outcome.stdout) == (0, f"{target}\n")
    assert (target / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert contents(runs.finished / "export") == before


def test_a_sample_goes_on_with_the_prompt(runs: Runs) -> None:
    outcome = runs.trainyard("sample", "first", "--prompt", "Document 7 speaks", "--tokens", "5")
    assert outcome.returncode == 0
    assert outcome.stdout.startswith("Document 7 speaks")


def test_a_run_that_was_not_exported_cannot_be_sampled(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "frozen").mkdir()
    outcome = runs.trainyard("sample", str(tmp_path))
    assert outcome.stderr == (
        f"trainyard: {tmp_path}/export: not exported yet; `trainyard export {tmp_path}` does it\n"
    )
