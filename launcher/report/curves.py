"""The parts of the report that draw: perplexity per corpus, and the curves of the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from launcher.report.chart import Line, Mark, figure
from launcher.report.html import Html, details, note, section, table, text
from launcher.report.records import Records
from launcher.report.series import plottable, smooth
from launcher.report.totals import interruptions
from launcher.words import UNKNOWN, fixed, percent, short

COLOURS = 6
MOST_TABLE_ROWS = 21


def evaluation(records: Records, totals: dict[str, Any]) -> str:
    """What the run did to the perplexity of each corpus."""
    if not records.evaluations:
        return section("Perplexity", note("No evaluation was logged."))
    series = [
        (corpus, f"s{index % COLOURS}{' dashed' * (index >= COLOURS)}", columns)
        for index, (corpus, columns) in enumerate(records.evaluations.items())
    ]
    changes = totals["perplexity"]
    before_after = table(
        "First against last evaluation; lower is better.",
        ("Corpus", "Steps", "Before", "After", "Change"),
        ("", "n", "n", "n", "n"),
        (
            (
                Html(f'<span class="key {look}">{text(corpus)}</span>'),
                f"{fixed(changes[corpus]['before_step'], 0)} – {fixed(changes[corpus]['after_step'], 0)}",
                fixed(changes[corpus]["before"]),
                fixed(changes[corpus]["after"]),
                _coloured(changes[corpus]["change"]),
            )
            for corpus, look, _ in series
        ),
    )
    chart = figure(
        "Held-out perplexity",
        _with_gaps("over tokens", [value for _, _, columns in series for value in columns["perplexity"]]),
        [Line(corpus, columns["tokens"], columns["perplexity"], look) for corpus, look, columns in series],
        last_x=_last_tokens(records),
        marks=_marks(records),
        legend=True,
        log_above=10.0,
    )
    numbers = table(
        "",
        ("Corpus", "Step", "Tokens", "Perplexity"),
        ("", "n", "n", "n"),
        (
            (
                corpus,
                fixed(columns["step"][row], 0),
                short(columns["tokens"][row]),
                fixed(columns["perplexity"][row], 3),
            )
            for corpus, _, columns in series
            for row in _sample(len(columns["step"]))
        ),
    )
    pair = f'<div class="pair"><div>{before_after}</div>{chart}</div>'
    return section("Perplexity", pair, details("Numbers", numbers))


def training(records: Records, totals: dict[str, Any]) -> str:
    """The curves of the training loop, and some of their numbers."""
    columns = records.training
    if not columns["step"]:
        return section("Training", note("No step was logged."))
    tokens, last_x, marks = columns["tokens"], _last_tokens(records), _marks(records)
    charts = []
    for key, title, what, smoothed, log_above in (
        ("loss", "Loss", "nats per token; bold: mean over a window of 2 % of the run", True, math.inf),
        ("lr", "Learning rate", "as scheduled", False, math.inf),
        ("grad_norm", "Gradient norm", "before clipping", True, 100.0),
        ("tokens_per_second", "Tokens per second", "over all ranks", True, math.inf),
    ):
        values = columns[key]
        lines = [Line(title.lower(), tokens, values, "raw s0" if smoothed else "s0")]
        if smoothed:
            lines.append(Line("smoothed", tokens, smooth(values), "s0"))
        charts.append(
            figure(
                title,
                _with_gaps(what, values),
                lines,
                last_x=last_x,
                marks=marks,
                wide=key == "loss",
                log_above=log_above,
            )
        )
    about = "Over tokens." + (" Dotted lines: where the run was taken up again." if marks else "")
    return section(
        "Training",
        note(about),
        f'<div class="charts">{"".join(charts)}</div>',
        details("Numbers", _numbers(records)),
    )


def _numbers(records: Records) -> str:
    columns = records.training
    shown: dict[str, tuple[str, Callable[[float], str]]] = {
        "Step": ("step", lambda value: fixed(value, 0)),
        "Tokens": ("tokens", short),
        "Loss": ("loss", lambda value: fixed(value, 4)),
        "Learning rate": ("lr", short),
        "Gradient norm": ("grad_norm", short),
        "Tokens/s": ("tokens_per_second", short),
        "Step s": ("step_seconds", short),
        "Data s": ("data_seconds", short),
        "Memory GiB": ("memory_gib", short),
    }
    rows = _sample(len(columns["step"]))
    return table(
        f"{len(rows):,} of {len(columns['step']):,} logged rows; all are in metrics.jsonl.",
        tuple(shown),
        ("n",) * len(shown),
        ([write(columns[key][row]) for key, write in shown.values()] for row in rows),
    )


def _coloured(change: float | None) -> str:
    if change is None:
        return UNKNOWN
    look = "good" if change < 0 else "bad" if change > 0 else ""
    return Html(f'<span class="{look}">{percent(change, signed=True)}</span>')


def _with_gaps(what: str, values: Sequence[float]) -> str:
    gaps = sum(not plottable(value) for value in values)
    return f"{what}; {gaps:,} of {len(values):,} values are not finite" if gaps else what


def _last_tokens(records: Records) -> float:
    series = [records.training, *records.evaluations.values()]
    tokens = [value for columns in series for value in columns["tokens"] if plottable(value)]
    return max(tokens, default=0.0) or 1.0


def _marks(records: Records) -> list[Mark]:
    return [Mark(tokens, label) for tokens, label in interruptions(records) if plottable(tokens)]


def _sample(length: int) -> Sequence[int]:
    """Row numbers spread evenly over a series, the first and the last among them."""
    if length <= MOST_TABLE_ROWS:
        return range(length)
    return [round(part * (length - 1) / (MOST_TABLE_ROWS - 1)) for part in range(MOST_TABLE_ROWS)]
