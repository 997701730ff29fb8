"""Charts as inline SVG with labels in HTML, so that text keeps its size at any width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from launcher.report.series import Axis, Point, linear_axis, log_axis, thin
from launcher.words import short

# The drawing is stretched over its box; strokes and labels are not.
SIDE = 1000
LABEL_DISTANCE = 0.09


@dataclass(frozen=True)
class Line:
    """A series of points; `look` names its CSS classes, s0 to s5 being the colours."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    look: str = "s0"


@dataclass(frozen=True)
class Mark:
    """Something that happened at one place of the horizontal axis."""

    x: float
    label: str


def figure(
    title: str,
    note: str,
    lines: Sequence[Line],
    *,
    last_x: float,
    marks: Sequence[Mark] = (),
    wide: bool = False,
    legend: bool = False,
    log_above: float = math.inf,
) -> str:
    """A chart over tokens, from 0 to `last_x`.

    log_above: ratio of the largest to the smallest value above which the vertical axis is logarithmic.
    legend: names the lines below the title; read-outs always name them.
    """
    drawn = [(line, thin(line.x, line.y)) for line in lines]
    values = [y for _, runs in drawn for run in runs for _, y in run]
    if not values:
        return f'<figure class="chart">{_caption(title, "no finite value was logged", ())}</figure>'
    x_axis = linear_axis((0.0, last_x), about=6 if wide else 4, tight=True)
    y_axis = _vertical(values, log_above, about=6 if wide else 4)
    if y_axis.log:
        note += "; logarithmic"
    place = f'data-x="{x_axis.low!r} {x_axis.high!r}" data-y="{y_axis.low!r} {y_axis.high!r}"'
    return (
        f'<figure class="chart{" wide" if wide else ""}">{_caption(title, note, lines if legend else ())}'
        f'<div class="plot" {place}{" data-log" if y_axis.log else ""}>'
        f"{_drawing(title, drawn, x_axis, y_axis, marks)}{_labels(x_axis, y_axis)}"
        f"{_mark_labels(marks, x_axis) if wide else ''}</div></figure>"
    )


def _vertical(values: list[float], log_above: float, about: int) -> Axis:
    if min(values) > 0 and max(values) / min(values) > log_above:
        return log_axis(values)
    return linear_axis(values, about)


def _drawing(
    title: str,
    drawn: list[tuple[Line, list[list[Point]]]],
    x_axis: Axis,
    y_axis: Axis,
    marks: Sequence[Mark],
) -> str:
    def x(value: float) -> str:
        return f"{SIDE * x_axis.place(value):.5g}"

    def y(value: float) -> str:
        return f"{SIDE * (1 - y_axis.place(value)):.5g}"

    grid = "".join(f"M0 {y(tick)}H{SIDE}" for tick in y_axis.ticks)
    paths = []
    for line, runs in drawn:
        # A run of one point ends where it begins: the round line cap makes it a dot.
        d = "".join("M" + " ".join(f"{x(a)} {y(b)}" for a, b in (*run, run[-1])) for run in runs)
        paths.append(f'<path class="line {line.look}" data-name="{escape(line.name)}" d="{d}"/>')
        if sum(map(len, runs)) <= 60 and "raw" not in line.look:
            dots = "".join(f"M{x(a)} {y(b)}h0" for run in runs for a, b in run)
            paths.append(f'<path class="dots {line.look}" d="{dots}"/>')
    rules = "".join(
        f'<path class="mark" d="M{x(mark.x)} 0V{SIDE}"><title>{escape(mark.label)}</title></path>'
        for mark in marks
    )
    spoken = "; ".join(
        f"{line.name} from {short(runs[0][0][1])} to {short(runs[-1][-1][1])}" for line, runs in drawn if runs
    )
    return (
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img">'
        f"<title>{escape(title)} over tokens</title><desc>{escape(spoken)}</desc>"
        f'<path class="grid" d="{grid}"/>{rules}{"".join(paths)}</svg>'
    )


def _labels(x_axis: Axis, y_axis: Axis) -> str:
    across = "".join(
        f'<span class="x" style="left:{100 * x_axis.place(tick):.4g}%">{label}</span>'
        for tick, label in zip(x_axis.ticks, x_axis.labels(), strict=True)
        if tick > 0
    )
    up = "".join(
        f'<span class="y" style="bottom:{100 * y_axis.place(tick):.4g}%">{label}</span>'
        for tick, label in zip(y_axis.ticks, y_axis.labels(), strict=True)
    )
    return f'<div class="labels" aria-hidden="true"><span class="x first">0 tokens</span>{across}{up}</div>'


def _mark_labels(marks: Sequence[Mark], x_axis: Axis) -> str:
    labels, free_from = [], 0.0
    for mark in marks:
        at = x_axis.place(mark.x)
        if at >= free_from:
            side = "before" if at > 1 - LABEL_DISTANCE else "after"
            labels.append(f'<span class="m {side}" style="left:{100 * at:.4g}%">{escape(mark.label)}</span>')
            free_from = at + LABEL_DISTANCE
    return "".join(labels)


def _caption(title: str, note: str, legend: Sequence[Line]) -> str:
    keys = "".join(f'<li class="key {line.look}">{escape(line.name)}</li>' for line in legend)
    return (
        f"<figcaption><h3>{escape(title)}</h3><p>{escape(note)}</p>"
        f"{f'<ul class=legend>{keys}</ul>' if keys else ''}</figcaption>"
    )
