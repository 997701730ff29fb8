"""RUN/events.jsonl: what happened to a run, one JSON object a line, written by any of its programs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def record(run: Path, event: str, **fields: Any) -> None:
    """Append one event with the time (seconds since 1970) and the attempt.

    A single O_APPEND write keeps lines of concurrent writers whole. A full disk must not end a run
    that could go on, so a failed write is told on stderr only.
    """
    attempt = int(os.environ.get("TRAINYARD_ATTEMPT", "0"))
    line = json.dumps({"time": time.time(), "event": event, "attempt": attempt} | fields) + "\n"
    try:
        descriptor = os.open(run / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        print(f"trainyard: event not written ({error.strerror}): {line}", end="", flush=True)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a .jsonl file in order; none if it does not exist; torn or damaged lines are passed over."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row
