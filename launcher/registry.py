"""The runs that were launched from here, and what state each is in."""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cluster import events, exit_codes
from configs.load import unknown
from configs.schema import ConfigError

STATES = {
    exit_codes.DONE: "done",
    exit_codes.BAD_INPUT: "failed",
    exit_codes.MISSING_FROM_ENVIRONMENT: "failed",
    exit_codes.REQUEUE: "stopped",
}


@dataclass(frozen=True)
class Entry:
    """One launched run."""

    name: str
    directory: Path


def registry_file() -> Path:
    """One JSON object a line: $XDG_STATE_HOME/trainyard/runs.jsonl."""
    try:
        state_home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    except RuntimeError:
        raise ConfigError("XDG_STATE_HOME: not set, and there is no home directory to keep runs in") from None
    return state_home / "trainyard" / "runs.jsonl"


def add(name: str, run: Path, backend: str) -> None:
    """Remember a launched run."""
    file = registry_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    row = {"name": name, "directory": str(run), "backend": backend, "time": time.time()}
    with file.open("a") as lines:
        lines.write(json.dumps(row) + "\n")


def entries() -> list[Entry]:
    """Runs whose directory still exists, oldest first."""
    found: dict[str, str] = {}
    for row in events.read(registry_file()):
        match row:
            case {"directory": str(directory), "name": str(name)}:
                found[directory] = name
    return [Entry(name, Path(directory)) for directory, name in found.items() if _holds_run(Path(directory))]


def find(text: str) -> Path:
    """Run directory for a path or a name; of runs with the same name the newest.

    Raises ConfigError with the nearest name if there is none.
    """
    if _holds_run(Path(text)):
        return Path(text).resolve()
    known = {entry.name: entry.directory for entry in entries()}
    if text not in known:
        raise ConfigError(unknown(text, text, known).replace("no such key", "no such run"))
    return known[text]


def _holds_run(directory: Path) -> bool:
    return all(os.path.exists(directory / name) for name in ("config.yaml", "frozen"))


def hold(run: Path) -> IO[str]:
    """Take the run for this process, and those that inherit the file, until all have closed it.

    Raises ConfigError if another process minds the run.
    """
    file = (run / "lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"{run}: this run is being trained already") from None
    return file


def is_minded(run: Path) -> bool:
    """Whether a process minds the run now."""
    try:
        with (run / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def status(run: Path) -> dict[str, Any]:
    """state (starting, training, stopping, done, stopped, failed, lost), step, steps, loss and reason."""
    result: dict[str, Any] = {"state": "starting", "step": 0, "steps": None, "loss": None, "reason": None}
    for row in events.read(run / "events.jsonl"):
        match row["event"]:
            case "attempt":
                result |= {"state": "starting", "reason": None}
            case "training":
                result |= {"state": "training", "steps": row["steps"]}
            case "signal":
                result["state"] = "stopping"
            case "failed":
                result["reason"] = row["message"]
            case "crash":
                result["reason"] = f"rank {row['rank']} ended with {row['exit_code']}: {row['last_line']}"
            case "no_progress":
                reason = f"no new checkpoint in {row['crashes']} tries"
                result["reason"] = "; ".join(filter(None, [reason, result["reason"]]))
            case "ended":
                result["state"] = STATES.get(row["exit_code"], "failed")
    for row in events.read(run / "metrics.jsonl"):
        result |= {"step": row["step"]} | ({"loss": row["loss"]} if "loss" in row else {})
    if result["state"] in ("starting", "training", "stopping") and not is_minded(run):
        result["state"] = "lost"
    return result
