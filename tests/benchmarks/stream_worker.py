"""One pipeline in a process of its own: `PYTHON stream_worker.py MODULE:FUNCTION SECONDS TOKENS TASK`.

Prints a JSON object of what it measured (Measured), for SECONDS or until TOKENS are read, whichever comes
first; TOKENS = 0 is no limit. SECONDS = 0 measures the first batch only; SECONDS = -1 calls the function
once, for what it writes.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from peers.task import Task

WARM_SECONDS, WARM_BATCHES = 0.5, 8


@dataclass
class Measured:
    import_seconds: float
    """Of the pipeline's libraries."""
    imported_mib: float
    """Resident memory after that."""
    first_seconds: float
    """From then until the first batch: listing, tokenizer, opening, seeking."""
    tokens: int = 0
    """Of whole batches, after the warm-up."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of the process, its threads and its children."""
    peak_mib: float = 0.0
    """Most resident memory of the process, without its children."""


def status_mib(key: str) -> float:
    """VmRSS or VmHWM of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def cpu_seconds() -> float:
    """Used by this process and all that descend from it, the ended ones included."""
    table: dict[int, tuple[int, int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            table[int(entry.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    family = {os.getpid()}
    while grown := {pid for pid, (parent, _) in table.items() if parent in family} - family:
        family |= grown
    return sum(table[pid][1] for pid in family) / os.sysconf("SC_CLK_TCK")


def measure(batches: Iterator[Any], task: Task, seconds: float, limit: int, measured: Measured) -> None:
    """Draw batches for some seconds or tokens and count targets."""
    tokens = task.rows * task.length
    until, warm = time.perf_counter() + WARM_SECONDS, 0
    while warm < WARM_BATCHES or time.perf_counter() < until:
        next(batches)
        warm += 1
    began, cpu = time.perf_counter(), cpu_seconds()
    while time.perf_counter() - began < seconds and measured.tokens + warm * tokens < (limit or math.inf):
        next(batches)
        measured.tokens += tokens
    measured.seconds = time.perf_counter() - began
    measured.cpu_seconds = cpu_seconds() - cpu


def main() -> None:
    place, seconds, limit = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    task = Task.from_json(sys.argv[4])
    began = time.perf_counter()
    module, _, name = place.partition(":")
    function = getattr(importlib.import_module(f"peers.{module}"), name)
    imported = time.perf_counter()
    if seconds < 0:
        function(task)
        return
    measured = Measured(imported - began, status_mib("VmRSS"), 0.0)
    batches = iter(function(task))
    first = next(batches)
    measured.first_seconds = time.perf_counter() - imported
    assert first.size == task.rows * (task.length + 1), f"{place}: a batch has {first.size} tokens"
    assert first.dtype.name in ("int32", "int64"), f"{place}: tokens are {first.dtype}"
    if seconds:
        measure(batches, task, seconds, limit, measured)
    measured.peak_mib = status_mib("VmHWM")
    sys.stdout.flush()
    os.write(1, (json.dumps(asdict(measured)) + "\n").encode())
    os._exit(0)  # threads and workers of some libraries do not end by themselves


if __name__ == "__main__":
    main()
