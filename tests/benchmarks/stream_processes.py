"""Runs pipelines of tests/benchmarks/peers, each in a process of its own, and collects what they measure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from peers.task import Pipeline, Task

WORKER = Path(__file__).with_name("stream_worker.py")
PATIENCE_SECONDS = 300


class Failed(RuntimeError):
    """A pipeline ended without a measurement."""


@dataclass(frozen=True)
class Pythons:
    """Interpreters that may have other people's libraries."""

    paths: list[str]

    def of(self, pipeline: Pipeline) -> str | None:
        """The first that has what a pipeline needs; ours if it needs nothing."""
        if not pipeline.needs:
            return sys.executable
        find = "import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))"
        for path in [sys.executable, *self.paths]:
            if subprocess.run([path, "-c", find, *pipeline.needs.split(",")], check=False).returncode == 0:
                return path
        return None


def run(
    python: str, pipeline: Pipeline, task: Task, seconds: float, tokens: int = 0, function: str = ""
) -> dict[str, Any]:
    """What stream_worker.py measures of a pipeline, or of another function of its module. Raises Failed."""
    task = replace(task, options=task.options | pipeline.options)
    command = [python, str(WORKER), function or pipeline.function, str(seconds), str(tokens), task.to_json()]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with TemporaryFile() as output, TemporaryFile() as errors:  # workers left behind would hold pipes open
        process = subprocess.Popen(
            command, stdout=output, stderr=errors, env=environment, start_new_session=True
        )
        try:
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failed(f"{pipeline.label}: no end in {PATIENCE_SECONDS} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        lines, complaints = (_lines(file) for file in (output, errors))
    if process.returncode or (seconds >= 0 and not lines):
        raise Failed(f"{pipeline.label}: {(complaints or ['no message'])[-1]}")
    measured: dict[str, Any] = json.loads(lines[-1]) if seconds >= 0 else {}
    return measured


def _lines(file: IO[bytes]) -> list[str]:
    file.seek(0)
    return file.read().decode(errors="replace").strip().splitlines()


def prepare(python: str, pipeline: Pipeline, task: Task) -> None:
    """Write what a pipeline reads, unless an earlier call has."""
    if not pipeline.prepare:
        return
    done = Path(task.work, f"{pipeline.prepare.replace(':', '.')}.done")
    if not done.exists():
        run(python, pipeline, task, -1, function=pipeline.prepare)
        done.touch()
