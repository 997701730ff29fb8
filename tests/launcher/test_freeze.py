"""A job runs what was frozen when it was submitted, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from runs import Runs, contents

from configs.compose import compose
from configs.load import load
from configs.schema import ConfigError
from launcher.freeze import PACKAGES, ROOT, freeze
from launcher.plan.plan import make_plan


def sources(root: Path) -> dict[str, bytes]:
    return {
        name: content
        for package in PACKAGES
        for name, content in contents(root / package).items()
        if "__pycache__" not in name
    }


def test_the_copy_is_the_code_on_disk_byte_for_byte(tmp_path: Path) -> None:
    config = compose([f"run.directory={tmp_path / 'run'}"])
    frozen = freeze(config, make_plan(config)) / "frozen"
    assert sources(frozen / "code") == sources(ROOT)


def test_package_versions_and_the_state_of_the_repository_are_kept(tmp_path: Path) -> None:
    config = compose([f"run.directory={tmp_path / 'run'}"])
    frozen = freeze(config, make_plan(config)) / "frozen"
    assert any(line.startswith("torch==") for line in (frozen / "packages.txt").read_text().splitlines())
    state = json.loads((frozen / "git.json").read_text())
    assert state is None or set(state) == {"commit", "branch", "changed"}


def test_a_resumed_run_uses_its_copy_and_no_other_code(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs.finished, run, symlinks=True)
    (run / "frozen" / "code" / "trainer" / "__init__.py").write_text("print('loaded from', __file__)\n")
    assert runs.trainyard("resume", str(run)).returncode == 0
    lines = (run / "logs" / "attempt-2" / "rank-0.log").read_text().splitlines()
    assert lines[0] == f"loaded from {run}/frozen/code/trainer/__init__.py"


def test_a_directory_that_holds_a_run_is_refused_and_left_as_it_is(runs: Runs) -> None:
    before = contents(runs.finished)
    outcome = runs.trainyard("train", *runs.overrides(), "seed=7")
    assert outcome.returncode == 2
    assert outcome.stderr == (
        f"trainyard: run.directory={runs.finished}: holds a run; `trainyard resume {runs.finished}` "
        "continues it, another run.directory starts a new one\n"
    )
    assert contents(runs.finished) == before


def test_a_directory_that_cannot_be_copied_into_is_one_line_with_the_reason(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = compose([f"run.directory={run}"])
    (run / "frozen" / "code" / "trainer").mkdir(parents=True)
    (run / "frozen" / "code" / "trainer" / "data").touch()
    with pytest.raises(ConfigError, match=f"^run.directory={run}: cannot be written: .*exists") as raised:
        freeze(config, make_plan(config))
    assert len(str(raised.value)) < 300
    assert not (run / "config.yaml").exists()


def test_a_run_without_a_name_is_named_after_model_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose(["model=llama-7b"])
    run = freeze(config, make_plan(config))
    assert run.parent == Path(os.path.realpath(tmp_path)) / "runs"
    assert run.name.startswith("llama-7b-20")
    assert load(run / "config.yaml").run.name == run.name
