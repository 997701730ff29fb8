"""The numbers of a run: what it reached, how long it took, and how that compares to the plan."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from launcher.report.records import Columns, Records, dig, number, read


def summary(run: Path) -> dict[str, Any]:
    """The numbers of the run in directory `run`, ready for JSON; see `summarize`."""
    return summarize(read(run))


def summarize(records: Records) -> dict[str, Any]:
    """The numbers of a run; None where one is not known.

    state: "finished" if the newest attempt finished, else "unfinished".
    final_loss, tokens, steps: as last logged, where finite. step_seconds, tokens_per_second, mfu: medians.
    memory_gib: the peak. nonfinite_losses: logged steps whose loss is NaN or infinite.
    wall_seconds: from the first event to the last, queueing and repeated work included; at least to
    the last logged step, where that is later.
    productive_seconds: time in steps whose result was kept (steps repeated after a resume count once).
    goodput: productive_seconds / wall_seconds.
    data_share: share of productive_seconds spent waiting for data.
    perplexity: per corpus the first and the last evaluation and the relative change between them;
    after and change are None with one evaluation.
    plan_vs_actual: per quantity plan, actual and ratio = actual / plan.
    """
    training = records.training
    productive_seconds = _step_time(training, "step_seconds")
    data_seconds = _step_time(training, "data_seconds")
    started, ended = _span(records)
    wall_seconds = ended - started if ended > started else None
    actual: dict[str, float | int | None] = {
        "tokens": _whole(_last(training["tokens"])),
        "steps": _whole(_last(training["step"])),
        "step_seconds": _median(training["step_seconds"]),
        "tokens_per_second": _median(training["tokens_per_second"]),
        "mfu": _median(training["mfu"]),
        "memory_gib": max(_finite(training["memory_gib"]), default=None),
        "seconds": wall_seconds,
    }
    return {
        "name": records.name,
        "state": "finished" if _finished(records) else "unfinished",
        "attempts": len({event.get("attempt") for event in attempts(records)}),
        "started_unix_seconds": known(started),
        "ended_unix_seconds": known(ended),
        "final_loss": _last(training["loss"]),
        "nonfinite_losses": sum(not math.isfinite(loss) for loss in training["loss"]),
        **{key: value for key, value in actual.items() if key != "seconds"},
        "wall_seconds": wall_seconds,
        "productive_seconds": productive_seconds,
        "goodput": _ratio(productive_seconds, wall_seconds),
        "data_share": _ratio(data_seconds, productive_seconds),
        "perplexity": {corpus: _change(series) for corpus, series in records.evaluations.items()},
        "plan_vs_actual": {
            key: {"plan": plan, "actual": actual[key], "ratio": _ratio(actual[key], plan)}
            for key, plan in _planned(records.plan).items()
        },
    }


def attempts(records: Records) -> list[dict[str, Any]]:
    """Events that began an attempt, one per attempt although every node may record it."""
    first: dict[str, dict[str, Any]] = {}
    for event in records.events:
        if event.get("event") == "attempt":
            first.setdefault(str(event.get("attempt")), event)
    return list(first.values())


def interruptions(records: Records) -> list[tuple[float, str]]:
    """Where the run was taken up again: tokens trained by then, and a label.

    An event's own "step" says where; without it, the newest checkpoint before the event does.
    """
    begun = {id(event) for event in attempts(records)}
    found: dict[float, str] = {}
    checkpoint_step = 0.0
    for event in records.events:
        kind, step = event.get("event"), number(event.get("step"))
        if kind == "checkpoint" and math.isfinite(step):
            checkpoint_step = step
        elif kind == "restart" or id(event) in begun:
            label = f"attempt {event.get('attempt')}" if kind == "attempt" else "restart"
            found[tokens_at(records.training, step if math.isfinite(step) else checkpoint_step)] = label
    return sorted((tokens, label) for tokens, label in found.items() if tokens > 0)


def tokens_at(training: Columns, step: float) -> float:
    """Tokens trained after `step` steps, interpolated between logged steps."""
    steps, tokens = training["step"], training["tokens"]
    right = bisect_left(steps, step)
    if right == len(steps):
        return tokens[-1] if steps else 0.0
    below_step, below_tokens = (steps[right - 1], tokens[right - 1]) if right else (0.0, 0.0)
    if steps[right] == below_step:
        return below_tokens
    share = (step - below_step) / (steps[right] - below_step)
    return below_tokens + share * (tokens[right] - below_tokens)


def known(value: float) -> float | None:
    """None for what JSON cannot hold."""
    return value if math.isfinite(value) else None


def _step_time(training: Columns, measure: str, after_step: float = 0.0) -> float | None:
    """Sum of `measure` over the kept steps after `after_step`.

    A row speaks for all steps since the row before it.
    """
    total, previous = 0.0, after_step
    for step, seconds in zip(training["step"], training[measure], strict=True):
        if step > after_step:
            total += seconds * (step - previous) if math.isfinite(seconds) else 0.0
            previous = step
    return total if training["step"] else None


def _span(records: Records) -> tuple[float, float]:
    """First and last moment of the run, unix seconds; NaN where no event tells."""
    if not records.events:
        return math.nan, math.nan
    started, ended = (number(records.events[index]["time"]) for index in (0, -1))
    begun = attempts(records)
    # Logged steps carry no time. While a run is going, its newest steps are later than its last event.
    if begun and not _finished(records):
        from_step = 0.0 if len(begun) == 1 else number(begun[-1].get("step"))
        if math.isfinite(from_step):
            since = _step_time(records.training, "step_seconds", from_step)
            ended = max(ended, number(begun[-1]["time"]) + (since or 0.0))
    return started, ended


def _finished(records: Records) -> bool:
    newest = max((number(event["time"]) for event in attempts(records)), default=-math.inf)
    return any(
        event.get("event") == "finished" and number(event["time"]) >= newest for event in records.events
    )


def _change(series: Columns) -> dict[str, float | int | None]:
    steps, values = series["step"], series["perplexity"]
    once = len(steps) == 1
    before = known(values[0])
    after = None if once else known(values[-1])
    ratio = _ratio(after, before)
    return {
        "before_step": _whole(steps[0]),
        "before": before,
        "after_step": None if once else _whole(steps[-1]),
        "after": after,
        "change": None if ratio is None else ratio - 1,
    }


def _planned(plan: dict[str, Any]) -> dict[str, float | None]:
    memory_gib = dig(plan, "memory", "reserved_gib")
    if memory_gib is None:
        memory_gib = dig(plan, "memory", "active_gib")
    values = {
        "tokens": dig(plan, "budget", "tokens"),
        "steps": dig(plan, "budget", "steps"),
        "step_seconds": dig(plan, "time", "step_seconds"),
        "tokens_per_second": dig(plan, "time", "tokens_per_second"),
        "mfu": dig(plan, "time", "mfu"),
        "memory_gib": memory_gib,
        "seconds": dig(plan, "time", "seconds"),
    }
    return {key: known(number(value)) for key, value in values.items()}


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _last(values: Iterable[float]) -> float | None:
    return next(reversed(_finite(values)), None)


def _median(values: Iterable[float]) -> float | None:
    finite = _finite(values)
    return statistics.median(finite) if finite else None
