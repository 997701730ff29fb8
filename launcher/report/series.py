"""Long series made fit to draw: smoothed, thinned, and put on axes with round numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from launcher.words import short

MOST_POINTS = 1000
# Sums of whole multiples of 1e-12 are exact: a spike does not swallow the digits of what follows it.
_UNIT = 10**12
Point = tuple[float, float]


def plottable(value: float) -> bool:
    """Whether an axis can reach `value`; beyond 1e100 differences and ratios overflow."""
    return math.isfinite(value) and abs(value) < 1e100


def smooth(values: Sequence[float], share: float = 0.02) -> list[float]:
    """Mean over a centred window of `share` of the series; values that are not finite are left out.

    The window is cut short on both sides near the beginning, where a loss falls too steeply for a
    lopsided one, and only on the far side near the end.
    """
    finite = [plottable(value) for value in values]
    sums = [0, *accumulate(round(v * _UNIT) if ok else 0 for v, ok in zip(values, finite, strict=True))]
    counts = [0, *accumulate(map(int, finite))]
    half = max(1, round(len(values) * share / 2))
    means = []
    for index in range(len(values)):
        low, high = index - min(index, half), min(len(values), index + min(index, half) + 1)
        count = counts[high] - counts[low]
        means.append((sums[high] - sums[low]) / (count * _UNIT) if count else math.nan)
    return means


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> list[list[Point]]:
    """Runs of at most about `most` points in all; each bucket keeps its lowest and its highest.

    A bucket without a finite value separates two runs.
    """
    size = 1 if len(x) <= most else math.ceil(2 * len(x) / most)
    runs: list[list[Point]] = [[]]
    for start in range(0, len(x), size):
        bucket = [
            index
            for index in range(start, min(start + size, len(x)))
            if plottable(x[index]) and plottable(y[index])
        ]
        if bucket:
            extremes = {min(bucket, key=y.__getitem__), max(bucket, key=y.__getitem__)}
            runs[-1].extend((x[index], y[index]) for index in sorted(extremes))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


@dataclass(frozen=True)
class Axis:
    """A range of values, the round numbers in it, and how they are spread."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def place(self, value: float) -> float:
        """Position of `value`: 0 at low, 1 at high."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)

    def labels(self) -> list[str]:
        """One per tick, with as many decimals as tell the ticks apart."""
        largest = max(map(abs, self.ticks))
        if self.log or largest >= 1000 or largest < 0.01:
            return [short(tick) for tick in self.ticks]
        gap = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1.0
        return [f"{tick:.{max(0, -math.floor(math.log10(gap) + 1e-9))}f}" for tick in self.ticks]


def linear_axis(values: Iterable[float], about: int, *, tight: bool = False) -> Axis:
    """An axis with `about` ticks at multiples of 1, 2 or 5; a tight one ends at the values themselves."""
    values = list(values)
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    # Nearly equal values get room around them: their differences are rounding errors.
    if size < 1e-100:
        low, high = 0.0, 1.0
    elif high - low <= 1e-9 * size:
        low, high = low - size / 2, high + size / 2
    gap = _round_gap((high - low) / about)
    if not tight:
        low, high = math.floor(low / gap + 1e-9) * gap, math.ceil(high / gap - 1e-9) * gap
    first, last = math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9)
    # Twelve digits, so that 3 x 0.1 is the tick 0.3.
    return Axis(low, high, [float(f"{index * gap:.12g}") for index in range(first, last + 1)])


def log_axis(values: Iterable[float]) -> Axis:
    """An axis by powers of ten, with 2 and 5 between them where there is room; values above 0."""
    values = list(values)
    low, high = math.log10(min(values)), math.log10(max(values))
    decades = range(math.floor(low), math.ceil(high) + 1)
    if high - low < 3:
        marks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    else:
        marks = [10.0**decade for decade in decades[:: math.ceil(len(decades) / 7)]]
    inside = [mark for mark in marks if min(values) <= mark <= max(values)]
    below = max((mark for mark in marks if mark <= min(values)), default=min(values))
    above = min((mark for mark in marks if mark >= max(values)), default=max(values))
    return Axis(below, above, sorted({below, *inside, above}), log=True)


def _round_gap(gap: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(gap))
    return magnitude * next(digit for digit in (1, 2, 5, 10) if gap <= digit * magnitude * (1 + 1e-9))
