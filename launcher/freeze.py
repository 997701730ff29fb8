"""The run directory: everything a job needs, fixed before it is submitted."""

from __future__ import annotations

import glob
import json
import os
import shutil
import subprocess
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml

from configs.schema import Config, ConfigError

PACKAGES = ("configs", "cluster", "trainer")
ROOT = Path(__file__).resolve().parent.parent


def freeze(config: Config, plan: dict[str, Any]) -> Path:
    """Fill the run directory: config.yaml, plan.json and frozen/ with code, versions and git state.

    The code is a copy of what is on disk, uncommitted changes included, so edits made while a job
    queues change nothing. config.yaml comes last: a directory that has one is complete.
    Raises ConfigError if the directory holds a run already or cannot be written.
    """
    config = with_defaults(config)
    run = run_directory(config)
    check_unused(run)
    if config.budget.kind != "epochs":  # the trainer counts the tokens of an epoch exactly
        config = fixed_budget(config, plan)
    try:
        frozen = run / "frozen"
        frozen.mkdir(parents=True, exist_ok=True)
        for package in PACKAGES:
            shutil.copytree(
                ROOT / package,
                frozen / "code" / package,
                ignore=shutil.ignore_patterns("__pycache__"),
                dirs_exist_ok=True,
            )
        versions = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()})
        (frozen / "packages.txt").write_text("\n".join(versions) + "\n")
        (frozen / "git.json").write_text(json.dumps(_git_state(), indent=1))
        (run / "plan.json").write_text(json.dumps(plan, indent=1))
        temporary = run / ".config.yaml"
        temporary.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))
        temporary.replace(run / "config.yaml")
    except shutil.Error as error:
        raise ConfigError(f"run.directory={run}: cannot be written: {error.args[0][0][2]}") from None
    except OSError as error:
        raise ConfigError(f"run.directory={run}: cannot be written: {error.strerror}") from None
    return run


def fixed_budget(config: Config, plan: dict[str, Any]) -> Config:
    """The configuration with the tokens that its plan came to as its budget."""
    amounts = dict.fromkeys(("flops", "gpu_hours", "usd", "days"))
    fixed = {"kind": "tokens", "tokens": plan["budget"]["tokens"], **amounts}
    return config.model_copy(update={"budget": config.budget.model_copy(update=fixed)})


def run_directory(config: Config) -> Path:
    """Where a configuration with its defaults filled in keeps its run."""
    assert config.run.directory is not None
    return Path(config.run.directory)


def create(run: Path) -> None:
    """Make the run directory. Raises ConfigError if that is not possible."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.directory={run}: cannot be written: {error.strerror}") from None


def check_unused(run: Path) -> None:
    """Raise ConfigError if the directory holds a run."""
    if os.path.exists(run / "config.yaml"):
        raise ConfigError(
            f"run.directory={run}: holds a run; `trainyard resume {run}` continues it, "
            "another run.directory starts a new one"
        )


def with_defaults(config: Config) -> Config:
    """Name and directory of the run filled in: MODEL-DATE-TIME and runs/NAME."""
    config = config.model_copy(deep=True)
    config.run.name = config.run.name or f"{config.model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    config.run.directory = config.run.directory or str(Path.cwd() / "runs" / config.run.name)
    for key in ("directory", "durable"):
        if (value := getattr(config.checkpoint, key)) and "://" not in value:
            setattr(config.checkpoint, key, str(Path(value).expanduser().absolute()))
    return config


def check_local_paths(config: Config) -> None:
    """Raise ConfigError for files of this machine that do not exist, before anything is created."""
    for name, corpus in config.data.corpora.items():
        for split in ("train", "validation"):
            for pattern in getattr(corpus, split) or []:
                path = pattern.removeprefix("@")
                files = [path] if os.path.isfile(path) else filter(os.path.isfile, glob.glob(path))
                if "://" not in path and not any(files):
                    raise ConfigError(f"data.corpora.{name}.{split}={pattern}: no such file")
    for key in ("path", "tokenizer"):
        value = getattr(config.model, key)
        if value is not None and value.startswith(("/", ".", "~")) and not Path(value).is_dir():
            raise ConfigError(f"model.{key}={value}: no such directory")


def _git_state() -> dict[str, Any] | None:
    """Commit, branch and changed files of the code's repository; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip("\n")

    try:
        if Path(git("rev-parse", "--show-toplevel")) != ROOT:  # installed inside somebody's repository
            return None
        return {
            "commit": git("rev-parse", "HEAD"),
            "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "changed": git("status", "--porcelain").splitlines(),
        }
    except (OSError, subprocess.CalledProcessError):
        return None
