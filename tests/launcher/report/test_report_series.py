"""What is drawn of a series: axes, smoothing, thinning, and how numbers are written."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.report.series import linear_axis, log_axis, plottable, smooth, thin
from launcher.words import duration, moment, percent, short

FINITE = st.floats(-1e12, 1e12)
ANY = st.one_of(FINITE, st.just(math.nan), st.just(math.inf), st.just(-math.inf))


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((2.31, 3.62), ["2.0", "2.5", "3.0", "3.5", "4.0"]),
        ((0.0, 133e6), ["0", "50M", "100M", "150M"]),
        ((0.0, 3e-4), ["0", "1e-4", "2e-4", "3e-4"]),
        ((2.501, 2.504), ["2.501", "2.502", "2.503", "2.504"]),
        ((7.0, 7.0), ["0", "5", "10", "15"]),
        ((0.0, 0.0), ["0.0", "0.5", "1.0"]),
    ],
)
def test_ticks_are_round_and_told_apart(values: tuple[float, float], labels: list[str]) -> None:
    assert linear_axis(values, about=3).labels() == labels


@given(st.lists(FINITE, min_size=1, max_size=20), st.integers(2, 8), st.booleans())
def test_a_linear_axis_holds_its_values_and_few_ticks(values: list[float], about: int, tight: bool) -> None:
    axis = linear_axis(values, about, tight=tight)
    assert axis.low < axis.high
    assert all(-1e-6 <= axis.place(value) <= 1 + 1e-6 for value in [*values, *axis.ticks])
    assert 1 <= len(axis.ticks) <= about + 3
    assert len(set(axis.labels())) == len(axis.ticks) or max(map(abs, axis.ticks)) >= 1000


@given(st.lists(st.floats(1e-6, 1e12), min_size=2, max_size=20))
def test_a_logarithmic_axis_holds_its_values_and_few_ticks(values: list[float]) -> None:
    if max(values) / min(values) <= 10:
        return
    axis = log_axis(values)
    assert axis.ticks == sorted(axis.ticks)
    assert all(-1e-9 <= axis.place(value) <= 1 + 1e-9 for value in values)
    assert 2 <= len(axis.ticks) <= 14


@given(st.lists(ANY, max_size=300), st.integers(2, 50))
@example([1.0, math.nan, 0.0, math.nan, 0.0, 1.0], 3)
def test_thinning_keeps_the_extremes_and_the_order(y: list[float], most: int) -> None:
    x = [float(index) for index in range(len(y))]
    points = [point for run in thin(x, y, most) for point in run]
    assert points == sorted(points)
    assert len(points) <= most + 1
    finite = [value for value in y if plottable(value)]
    kept = [value for _, value in points]
    assert (min(kept), max(kept)) == (min(finite), max(finite)) if finite else not kept


def test_a_short_series_is_kept_whole_and_broken_where_a_value_is_missing() -> None:
    assert thin([1, 2, 3, 4], [5.0, math.nan, 7.0, 8.0]) == [[(1, 5.0)], [(3, 7.0), (4, 8.0)]]


def test_smoothing_follows_a_steep_start_and_a_straight_line() -> None:
    line = [10.0 - index / 10 for index in range(100)]
    smoothed = smooth(line, share=0.2)
    assert smoothed[0] == line[0]
    assert smoothed[:90] == pytest.approx(line[:90])


def test_a_spike_is_forgotten_once_the_window_has_passed_it() -> None:
    assert smooth([2.0] * 50 + [1e60] + [2.0] * 50, share=0.1)[60:] == [2.0] * 41


@given(st.lists(ANY, min_size=1, max_size=100))
def test_smoothing_stays_within_the_finite_values(values: list[float]) -> None:
    finite = [value for value in values if plottable(value)]
    rounding = 0.01 + 1e-9 * max(map(abs, finite), default=0.0)
    for mean in smooth(values, share=0.1):
        assert math.isnan(mean) or min(finite) - rounding <= mean <= max(finite) + rounding


@pytest.mark.parametrize(
    ("value", "written"),
    [(1.339e9, "1.339B"), (999_999, "1M"), (0, "0"), (3e-4, "3e-4"), (-2500, "-2.5K"), (0.5, "0.5"),
     (math.inf, "inf"), (math.nan, "–"), (None, "–"), (1e21, "1e21")],
)  # fmt: skip
def test_short_numbers(value: float | None, written: str) -> None:
    assert short(value) == written


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0.4119, "0.412 s"), (59.999, "60 s"), (64, "1 min 4 s"), (3599.9, "1 h"), (7500, "2 h 5 min"),
     (90_000, "1 d 1 h"), (86_399, "1 d"), (None, "–")],
)  # fmt: skip
def test_durations(seconds: float | None, written: str) -> None:
    assert duration(seconds) == written


def test_percentages_and_moments() -> None:
    assert percent(-0.457, signed=True) == "−45.7 %"
    assert percent(0.07, signed=True) == "+7.0 %"
    assert moment(0) == "1970-01-01 00:00:00"
    assert moment(1e300) == "–"
