"""RUN/events.jsonl: what happened to a run, one JSON object a line, written by any of its programs."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def record(run: Path, event: str, **fields: Any) -> None:
    """Append one event with the time (seconds since 1970) and the attempt.

    A single O_APPEND write keeps lines of concurrent writers whole. A full disk must not end a run
    that could go on, so a failed write is told on stderr only; a line that it left torn is closed first.
    """
    attempt = int(os.environ.get("TRAINYARD_ATTEMPT", "0"))
    line = json.dumps({"time": time.time(), "event": event, "attempt": attempt} | fields) + "\n"
    try:
        descriptor = os.open(run / "events.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size_bytes = os.fstat(descriptor).st_size
            torn = size_bytes > 0 and os.pread(descriptor, 1, size_bytes - 1) != b"\n"
            os.write(descriptor, (b"\n" if torn else b"") + line.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        with contextlib.suppress(OSError):  # stderr may be a file on the same disk
            reason = f"event not written ({error.strerror})"
            print(f"trainyard: {reason}: {line}", end="", file=sys.stderr, flush=True)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a .jsonl file in order; none if it does not exist; torn or damaged lines are passed over."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return
    yield from parse(text)


def parse(text: bytes) -> Iterator[dict[str, Any]]:
    """Objects in the text of a .jsonl file; torn or damaged lines are passed over."""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row
