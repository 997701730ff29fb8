"""What a run directory holds, read leniently: a report is wanted most of a run that broke."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MEASURES = (
    "step",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "step_seconds",
    "data_seconds",
    "mfu",
    "memory_gib",
)

# Arrays rather than rows of dicts: a run of a million logged steps then takes 80 MB, not a gigabyte.
Columns = dict[str, "array[float]"]


@dataclass(frozen=True)
class Records:
    """Contents of one run directory.

    training: one column per measure, NaN where a value is absent, null or no number.
    evaluations: corpus name -> columns step, tokens, perplexity.
    events: objects with a finite "time", oldest first.
    damaged_lines: lines of metrics.jsonl and events.jsonl that could not be read.

    Steps rise strictly in every set of columns. A row whose step does not rise comes from a resumed
    run that repeats steps; it replaces what was logged from that step on.
    """

    run: Path
    config_text: str
    config: dict[str, Any]
    plan: dict[str, Any]
    training: Columns
    evaluations: dict[str, Columns]
    events: list[dict[str, Any]]
    damaged_lines: int

    @property
    def name(self) -> str:
        """The run's name; without one, its directory's."""
        return str(dig(self.config, "run", "name") or self.run.resolve().name)


def read(run: Path) -> Records:
    """Read `run`; files that are absent or damaged count as empty.

    Raises FileNotFoundError if `run` is no directory.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no run directory")
    training = _columns(MEASURES)
    evaluations: dict[str, Columns] = {}
    events: list[dict[str, Any]] = []
    damaged_lines = 0

    for row in _lines(run / "metrics.jsonl"):
        step = number(row.get("step")) if row else math.nan
        if row is None or not math.isfinite(step):
            damaged_lines += 1
            continue
        for key, value in row.items():
            if key.startswith("eval/") and key.endswith("/perplexity"):
                corpus = key.removeprefix("eval/").removesuffix("/perplexity")
                series = evaluations.setdefault(corpus, _columns(("step", "tokens", "perplexity")))
                _append(series, {"step": step, "tokens": row.get("tokens"), "perplexity": value})
        if "loss" in row:
            _append(training, row)

    for event in _lines(run / "events.jsonl"):
        if event is None or not math.isfinite(number(event.get("time"))):
            damaged_lines += 1
        else:
            events.append(event)
    events.sort(key=lambda event: number(event["time"]))

    config_text = _text(run / "config.yaml")
    return Records(
        run=run,
        config_text=config_text,
        config=_mapping(config_text, yaml.safe_load),
        plan=_mapping(_text(run / "plan.json"), json.loads),
        training=training,
        evaluations=evaluations,
        events=events,
        damaged_lines=damaged_lines,
    )


def number(value: Any) -> float:
    """`value` as a float; NaN if it is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def dig(mapping: Any, *keys: str) -> Any:
    """The value under nested `keys`; None if any level is absent or no mapping."""
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, dict) else None
    return mapping


def _columns(names: tuple[str, ...]) -> Columns:
    return {name: array("d") for name in names}


def _append(columns: Columns, row: dict[str, Any]) -> None:
    while columns["step"] and columns["step"][-1] >= row["step"]:
        for column in columns.values():
            column.pop()
    for name, column in columns.items():
        column.append(number(row.get(name)))


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Objects of a JSON Lines file; None for a line that holds none."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    value = None
                yield value if isinstance(value, dict) else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _mapping(text: str, parse: Any) -> dict[str, Any]:
    try:
        value = parse(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        value = None
    return value if isinstance(value, dict) else {}
