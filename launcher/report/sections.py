"""The parts of the report that are words and tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from typing import Any

from launcher.report.html import details, note, section, table
from launcher.report.records import Records, dig, number
from launcher.report.totals import known
from launcher.words import UNKNOWN, duration, fixed, moment, percent, short

Totals = dict[str, Any]
MOST_EVENTS = 200
LONGEST_DETAIL = 500


def header(records: Records, totals: Totals) -> str:
    """Which run this is, what was trained on what, and when."""
    plan = records.plan
    model = dig(records.config, "model", "path") or dig(records.config, "model", "name")
    parameters = known(number(dig(plan, "model", "parameters")))
    facts = [
        model or dig(plan, "model", "name"),
        f"{short(parameters)} parameters" if parameters else None,
        f"{short(totals['tokens'])} tokens" if totals["tokens"] else None,
        _workers(plan),
        *(dig(plan, "world", key) for key in ("sharding", "precision")),
    ]
    attempts = totals["attempts"]
    when = (
        f"{moment(totals['started_unix_seconds'])} to {moment(totals['ended_unix_seconds'])} UTC, "
        f"{attempts} attempt{'' if attempts == 1 else 's'}"
        if records.events
        else "No event was recorded: when it ran is not known."
    )
    state = totals["state"]
    return (
        f'<header><div class="state {state}">{state}</div><h1>{escape(records.name)}</h1>'
        f"{note(' · '.join(str(fact) for fact in facts if fact), '')}{note(when)}</header>"
    )


def tiles(records: Records, totals: Totals) -> str:
    """The few numbers that say how the run went."""
    planned = {key: row["plan"] for key, row in totals["plan_vs_actual"].items()}
    bad_losses = totals["nonfinite_losses"]
    shown = (
        ("Final loss", fixed(totals["final_loss"], 3), f"{bad_losses:,} not finite" if bad_losses else ""),
        ("Tokens seen", short(totals["tokens"]), _of_plan(planned["tokens"], short)),
        ("Tokens per second", short(totals["tokens_per_second"]), _data_note(totals)),
        ("MFU", percent(totals["mfu"]) if totals["mfu"] is not None else "not known", _mfu_note(totals)),
        ("Goodput", percent(totals["goodput"]), _kept_note(totals)),
        ("Wall time", duration(totals["wall_seconds"]), _of_plan(planned["seconds"], duration)),
    )
    boxes = "".join(
        f'<div class="tile"><span>{name}</span><strong>{value}</strong><small>{small}</small></div>'
        for name, value, small in shown
    )
    goodput = (
        "Goodput is the time spent in steps whose result was kept, over the wall time from the first event "
        "to the last. Start-up, evaluation, waiting for machines and repeated steps lower it."
    )
    damaged = records.damaged_lines
    warning = note(f"{damaged:,} damaged line{'s' * (damaged > 1)} left out.", "fine bad") if damaged else ""
    return f'<div class="tiles">{boxes}</div>{note(goodput, "fine soft")}{warning}'


def plan_against_actual(records: Records, totals: Totals) -> str:
    """What was promised, what happened, and on which assumptions the promise stood."""
    if not records.plan:
        return section("Plan against actual", note("This run has no readable plan.json."))
    names: dict[str, tuple[str, Callable[[float | None], str]]] = {
        "tokens": ("Tokens", short),
        "steps": ("Steps", lambda value: fixed(value, 0)),
        "step_seconds": ("Time per step", duration),
        "tokens_per_second": ("Tokens per second", short),
        "mfu": ("MFU", percent),
        "memory_gib": ("Memory per GPU, peak", lambda value: fixed(value, 1, " GiB")),
        "seconds": ("Total time", duration),
    }
    rows = [
        (
            names[key][0],
            names[key][1](row["plan"]),
            names[key][1](row["actual"]),
            fixed(row["ratio"], 2, " ×"),
        )
        for key, row in totals["plan_vs_actual"].items()
    ]
    caption = "Times per step, tokens per second and MFU are medians; total time is wall time."
    if totals["state"] != "finished":
        caption += " The run is unfinished: tokens, steps and total time are those so far."
    compared = table(caption, ("Quantity", "Plan", "Actual", "Actual / plan"), ("", "n", "n", "n"), rows)
    verdicts = {
        "Budget": dig(records.plan, "budget", "verdict"),
        "Memory": dig(records.plan, "memory", "verdict"),
        "Step time bound by": dig(records.plan, "time", "bound_by"),
    }
    assumed = dig(records.plan, "assumptions")
    terms = {**verdicts, **(assumed if isinstance(assumed, dict) else {})}
    listed = "".join(
        f"<dt>{escape(str(name).replace('_', ' ').capitalize())}</dt><dd>{escape(_said(sentence))}</dd>"
        for name, sentence in terms.items()
        if sentence is not None
    )
    return section(
        "Plan against actual",
        compared,
        details("Verdicts and assumptions", f"<dl>{listed}</dl>") if listed else "",
    )


def timeline(records: Records, totals: Totals) -> str:
    """What happened to the run."""
    events = records.events
    if not events:
        return section("Events", note("No event was recorded."))
    left_out = max(0, len(events) - MOST_EVENTS)
    half = MOST_EVENTS // 2
    started = number(events[0]["time"])
    rows = [
        (
            "+ " + duration(number(event["time"]) - started),
            _said(event.get("attempt")),
            _said(event.get("event")),
            " · ".join(
                f"{key} {_said(value)}"
                for key, value in event.items()
                if key not in ("time", "event", "attempt")
            ),
            moment(number(event["time"])),
        )
        for event in (events[:half] + events[-half:] if left_out else events)
    ]
    caption = f"{left_out:,} events in the middle are left out; all are in events.jsonl." if left_out else ""
    heads = ("After", "Attempt", "Event", "Details", "Time, UTC")
    return section("Events", table(caption, heads, ("t", "n", "t", "d", "t"), rows))


def config(records: Records, totals: Totals) -> str:
    """The resolved configuration, word for word."""
    if not records.config_text:
        return section("Configuration", note("This run has no config.yaml."))
    shown = f'<pre tabindex="0">{escape(records.config_text)}</pre>'
    return section("Configuration", details("The resolved config.yaml", shown))


def _workers(plan: dict[str, Any]) -> str | None:
    world_size, hardware = dig(plan, "world", "world_size"), dig(plan, "world", "hardware")
    return f"{world_size} × {hardware}" if world_size and hardware else None


def _of_plan(planned: float | None, write: Callable[[float], str]) -> str:
    return f"{write(planned)} planned" if planned is not None else ""


def _data_note(totals: Totals) -> str:
    share = totals["data_share"]
    return "" if share is None else f"{percent(share)} waiting for data"


def _kept_note(totals: Totals) -> str:
    seconds = totals["productive_seconds"]
    return "" if seconds is None else f"{duration(seconds)} in kept steps"


def _mfu_note(totals: Totals) -> str:
    return "median over logged steps" if totals["mfu"] is not None else "none was logged"


def _said(value: Any) -> str:
    """A value from a file as short plain text."""
    if value is None:
        return UNKNOWN
    if isinstance(value, float):
        return f"{value:.6g}"
    said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return said if len(said) <= LONGEST_DETAIL else said[:LONGEST_DETAIL] + "…"
