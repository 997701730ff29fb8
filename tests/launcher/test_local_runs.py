"""Runs on this machine, with real processes: launched, stopped, requeued, cancelled, lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import STEPS, Runs, alive, children, happened, wait_until
from support import event_names, metrics

from configs.compose import compose
from launcher import registry

FOREVER = 1_000_000


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in metrics(run)]


def test_a_launched_run_outlives_its_session_survives_a_requeue_and_loses_nothing(
    runs: Runs, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-P", "-m", "launcher", "launch", *runs.overrides(STEPS)]
    launch = subprocess.Popen(
        [*command, f"run.directory={run}"],
        cwd=runs.root,
        env=runs.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert launch.stdout is not None
    said = launch.stdout.read()
    _, status, used = os.wait4(launch.pid, 0)
    launch.returncode = os.waitstatus_to_exitcode(status)
    assert (launch.returncode, said.splitlines()[0].split()[1]) == (0, "launched,")
    assert not happened(run, "training"), "launch waited for the run"
    assert used.ru_utime + used.ru_stime < 3
    with pytest.raises(ProcessLookupError):  # nothing of the run belongs to the session that ended
        os.killpg(launch.pid, signal.SIGHUP)

    wait_until(lambda: len(metrics(run)) >= 4)
    os.kill(happened(run, "attempt")[0]["agent_pid"], signal.SIGTERM)
    wait_until(lambda: happened(run, "ended") and not registry.is_minded(run))
    passed_over = ("checkpoint", "training", "tokenizer_engine")
    names = [name for name in event_names(run) if name not in passed_over]
    assert names == ["attempt", "signal", "stopped", "requeue", "attempt", "finished", "ended"]
    assert 4 <= happened(run, "stopped")[0]["step"] < STEPS
    assert happened(run, "ended")[0]["exit_code"] == 0
    assert losses(run) == losses(runs.finished)
    assert (run / "report.html").is_file()


def test_a_run_in_progress_refuses_a_second_trainer_and_can_be_cancelled(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    runs.launch(run, FOREVER)
    for verb in (["resume", str(run)], ["resume", "--detach", str(run)]):
        refused = runs.trainyard(*verb)
        assert (refused.returncode, refused.stderr) == (
            2,
            f"trainyard: {run}: this run is being trained already\n",
        )
    assert runs.listed(run)["state"] == "training"

    follower = runs.start("logs", "-f", str(run))
    assert runs.trainyard("cancel", str(run)).returncode == 0
    said, _ = follower.communicate(timeout=60)
    assert follower.returncode == 0
    assert f"trainyard: {run}: stopped at step" in said.splitlines()[-1]
    assert [row["reason"] for row in happened(run, "stopped")] == ["STOP file"]
    assert event_names(run)[-3:] == ["checkpoint", "stopped", "ended"]
    assert runs.listed(run)["state"] == "stopped"
    assert runs.trainyard("cancel", str(run)).stderr == f"trainyard: {run}: this run is not being trained\n"


def test_a_run_whose_minder_is_killed_is_lost_leaves_no_process_and_can_be_resumed(
    runs: Runs, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    runs.launch(run, FOREVER)
    agent = happened(run, "attempt")[0]["agent_pid"]
    minder = int(Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1])
    processes = [agent, *children(agent)]
    assert len(processes) == 2
    os.kill(minder, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, processes)), seconds=10)
    assert runs.listed(run)["state"] == "lost"

    assert runs.trainyard("resume", "--detach", str(run)).returncode == 0
    wait_until(lambda: len(happened(run, "training")) == 2)
    assert runs.trainyard("cancel", str(run)).returncode == 0
    wait_until(lambda: happened(run, "ended") and not registry.is_minded(run))


@pytest.mark.parametrize("notice", [signal.SIGINT, signal.SIGHUP], ids=lambda notice: str(notice.name))
def test_a_terminal_that_interrupts_or_closes_saves_the_run(
    runs: Runs, tmp_path: Path, notice: signal.Signals
) -> None:
    run = tmp_path / "run"
    process = runs.start("train", *runs.overrides(FOREVER), f"run.directory={run}")
    wait_until(lambda: metrics(run))
    process.send_signal(notice)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert event_names(run)[-4:] == ["signal", "checkpoint", "stopped", "ended"]
    assert said.splitlines()[-1].endswith(f"`trainyard resume {run}` continues it")


def test_a_stop_before_the_agent_listens_is_a_stop_and_no_failure(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = runs.start("train", *runs.overrides(FOREVER), f"run.directory={run}")
    wait_until(lambda: (run / "logs" / "attempt-1" / "agent.log").exists())
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert runs.listed(run)["state"] == "stopped"


def test_a_run_goes_on_when_nobody_reads_its_output_any_more(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = runs.start("train", *runs.overrides(4), f"run.directory={run}")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert event_names(run)[-2:] == ["finished", "ended"]


def test_a_dry_run_prints_the_command_that_would_be_started_and_creates_nothing(
    runs: Runs, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    outcome = runs.trainyard("launch", "--dry-run", *runs.overrides(), f"run.directory={run}")
    assert outcome.stdout == f"{sys.executable} -P -m launcher.backends.local {run}\n"
    assert not run.exists()


def test_more_machines_than_this_one_are_refused(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = runs.trainyard("train", *runs.overrides(), "nodes=2", f"run.directory={run}")
    assert (outcome.returncode, outcome.stderr) == (
        2,
        "trainyard: nodes=2: cluster=local is one machine, give nodes=1\n",
    )
    assert not run.exists()


def test_an_agent_that_dies_again_and_again_is_given_up(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs.finished, run, symlinks=True)
    (run / "frozen" / "code" / "cluster" / "agent.py").write_text("raise SystemExit(9)\n")
    outcome = runs.trainyard("resume", str(run))
    assert outcome.returncode == 9
    restarts = compose([]).cluster.restarts
    assert event_names(run).count("agent_lost") == restarts + 1
    assert registry.status(run)["state"] == "failed"
