"""Attempts of a run: each scheduling takes the next number, and older ones are fenced off.

A node that was lost may come back with its processes alive. Whoever is about to make a checkpoint
visible asks `check` first, so a zombie cannot replace what a later attempt wrote.
"""

from __future__ import annotations

from pathlib import Path


class Fenced(RuntimeError):
    """A newer attempt of this run has begun; this one must not write any more."""


def begin(run: Path) -> int:
    """Take the next attempt number, 1 for the first. mkdir is atomic on every file system."""
    directory = run / "attempts"
    directory.mkdir(exist_ok=True)
    while True:
        number = current(run) + 1
        try:
            (directory / str(number)).mkdir()
        except FileExistsError:
            continue
        return number


def current(run: Path) -> int:
    """The newest attempt, 0 before the first."""
    directory = run / "attempts"
    return max((int(entry.name) for entry in directory.glob("[0-9]*")), default=0)


def newest_checkpoint(run: Path) -> str | None:
    """Name of the checkpoint that RUN/checkpoints/latest points to, None before the first."""
    latest = run / "checkpoints" / "latest"
    return latest.readlink().name if latest.is_symlink() else None


def check(run: Path, attempt: int) -> None:
    """Raise Fenced if a newer attempt than this one has begun."""
    if (newest := current(run)) > attempt:
        raise Fenced(f"attempt {attempt} is fenced off: attempt {newest} has begun")
