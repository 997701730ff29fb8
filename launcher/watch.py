"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere.

Reads the run directory only, so it shows a run of any backend, from any machine that sees the files.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster import events
from launcher.words import short

PLAIN_SECONDS = 5.0


class Watch:
    """Follows metrics.jsonl and events.jsonl; call `tick` now and then, and use it as a context."""

    def __init__(self, run: Path, from_start: bool = False) -> None:
        self._events = Tail(run / "events.jsonl", from_start)
        self._metrics = Tail(run / "metrics.jsonl", from_start)
        self._console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
        self._last_plain = 0.0
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(escape(run.name), total=None, numbers="")

    def __enter__(self) -> Watch:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.tick()
        self._progress.stop()

    def tick(self) -> None:
        """Show what has been written since the last call."""
        for event in self._events.new_rows():
            if not isinstance(event.get("event"), str):
                continue
            if event["event"] == "training":
                self._progress.update(self._task, total=event["steps"], completed=event["step"])
            if line := describe_event(event):
                clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
                self._console.print(f"[dim]{clock}[/dim] {escape(line)}")
        for row in self._metrics.new_rows():
            self._show(row)

    def _show(self, row: dict[str, Any]) -> None:
        clock = f"[dim]{time.strftime('%H:%M:%S')}[/dim]"
        if "loss" not in row:
            self._console.print(f"{clock} step {row['step']}: {escape(describe_evaluation(row))}")
            return
        numbers = describe_step(row)
        self._progress.update(self._task, completed=row["step"], numbers=numbers)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_plain >= PLAIN_SECONDS:
            self._last_plain = now
            self._console.print(f"{clock} step {row['step']}: {numbers}")


class Tail:
    """New whole lines of a growing .jsonl file. Lines that a resume carried over are not new."""

    def __init__(self, path: Path, from_start: bool) -> None:
        self._path = path
        self._file_number: int | None = None
        self._offset = 0
        if not from_start:
            self.new_rows()

    def new_rows(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file_number = os.fstat(file.fileno()).st_ino
            replaced = self._file_number not in (None, file_number)
            file.seek(0 if replaced else self._offset)
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._offset = file.tell() - len(text) + len(whole)
        self._file_number = file_number
        return [] if replaced else list(events.parse(whole))


def describe_step(row: dict[str, Any]) -> str:
    mfu = "" if row["mfu"] is None else f"  MFU {row['mfu']:.1%}"
    tokens, speed = short(row["tokens"], 3), short(row["tokens_per_second"], 3)
    return f"{tokens} tokens  loss {row['loss']:.3f}  {speed} tok/s{mfu}"


def describe_evaluation(row: dict[str, Any]) -> str:
    found = [(key.split("/")[1], value) for key, value in row.items() if key.endswith("/perplexity")]
    return "perplexity " + ", ".join(f"{name} {value:.2f}" for name, value in found)


def describe_event(event: dict[str, Any]) -> str | None:
    """One line for a person, None for events that tell nothing by themselves."""
    match event["event"]:
        case "attempt":
            return f"attempt {event['attempt']} on {event['host']}, agent process {event['agent_pid']}"
        case "training":
            return f"training from step {event['step']} to {event['steps']} on {event['world_size']} ranks"
        case "checkpoint":
            return f"checkpoint of step {event['step']} saved in {event['seconds']:.2f} s"
        case "signal":
            return f"{event['signal']} received: saving at the next step boundary"
        case "stopped":
            return f"stopped at step {event['step']} ({event['reason']})"
        case "requeue":
            return "requeued"
        case "finished":
            return f"finished at step {event['step']}"
        case "exported":
            return f"exported to {event['path']}"
        case "ended" | "failed":
            return None
        case name:
            rest = {key: value for key, value in event.items() if key not in ("time", "event", "attempt")}
            return f"{name}: " + ", ".join(f"{key} {value}" for key, value in rest.items())
