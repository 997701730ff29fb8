"""Runs in progress, as the tests of the launcher see them: from outside, through files and processes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import Site, metrics

from cluster import events

STEPS = 60


class Runs(Site):
    """A user's directory in which runs are started; the packages lying about there are decoys."""

    @property
    def environment(self) -> dict[str, str]:
        """One thread a worker: threads of so small a model only wait for one another."""
        return super().environment | {"OMP_NUM_THREADS": "1"}

    @property
    def finished(self) -> Path:
        return self.root / "run"

    def launch(self, run: Path, steps: int) -> None:
        """Launch a run and wait until it trains."""
        outcome = self.trainyard("launch", *self.overrides(steps), f"run.directory={run}")
        assert outcome.returncode == 0, outcome.stderr
        wait_until(lambda: metrics(run))

    def listed(self, run: Path) -> dict[str, Any]:
        """What `trainyard runs --json` says of a run."""
        listing = json.loads(self.trainyard("runs", "--json").stdout)["runs"]
        (row,) = [row for row in listing if row["directory"] == str(run)]
        return dict(row)


def happened(run: Path, name: str) -> list[dict[str, Any]]:
    """Events of a run by name."""
    return [row for row in events.read(run / "events.jsonl") if row["event"] == name]


def wait_until(condition: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a directory with what it holds."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}
