"""The learning rate: up to the peak, down to the final ratio, without a jump."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Schedule
from trainer.schedule import learning_rate

PEAK = 3e-4
KINDS = ["cosine", "linear", "wsd"]


def rates(steps: int, kind: str, **options: Any) -> list[float]:
    schedule = Schedule(kind=kind, **options)  # type: ignore[arg-type]
    return [learning_rate(step, steps, PEAK, schedule) for step in range(steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_in_equal_steps_to_the_peak_at_its_last(kind: str) -> None:
    rising = rates(100, kind, warmup_fraction=0.25)[:25]
    assert rising == pytest.approx([PEAK * (step + 1) / 25 for step in range(25)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("final_ratio", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("steps", [2, 7, 1000])
def test_the_last_step_has_the_final_ratio_of_the_peak(kind: str, final_ratio: float, steps: int) -> None:
    assert rates(steps, kind, final_ratio=final_ratio)[-1] == pytest.approx(final_ratio * PEAK, abs=1e-12)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert rates(100, "cosine", warmup_fraction=0, final_ratio=0.2)[49] == pytest.approx(0.6 * PEAK)


def test_linear_falls_in_equal_steps() -> None:
    falling = rates(100, "linear", warmup_fraction=0.2, final_ratio=0.2)[19:]
    assert [before - after for before, after in pairwise(falling)] == pytest.approx([PEAK * 0.01] * 80)


def test_wsd_stays_at_the_peak_between_warm_up_and_decay() -> None:
    found = rates(100, "wsd", warmup_fraction=0.1, decay_fraction=0.3, final_ratio=0.1)
    assert found[9:70] == [PEAK] * 61
    assert found[8] < PEAK
    assert found[70] == pytest.approx(PEAK * (1 - 0.9 / 30))


def test_wsd_without_decay_ends_at_the_peak() -> None:
    assert rates(10, "wsd", warmup_fraction=0, decay_fraction=0) == [PEAK] * 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_one_step_trains_at_the_peak(kind: str) -> None:
    assert rates(1, kind) == [PEAK]


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_first_step_is_near_the_peak(kind: str) -> None:
    assert rates(1000, kind, warmup_fraction=0)[0] == pytest.approx(PEAK, rel=0.01)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_run_of_nothing_but_warm_up_ends_at_the_peak(kind: str) -> None:
    assert rates(10, kind, warmup_fraction=1) == pytest.approx([PEAK * step / 10 for step in range(1, 11)])


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    steps=st.integers(1, 500),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0.01, 0.5),
    final_ratio=st.floats(0, 1),
)
def test_rates_are_in_range_and_never_jump(
    kind: str, steps: int, warmup: float, decay: float, final_ratio: float
) -> None:
    found = rates(steps, kind, warmup_fraction=warmup, decay_fraction=decay, final_ratio=final_ratio)
    assert all(0 <= rate <= PEAK * (1 + 1e-12) for rate in found)
    rising = math.ceil(warmup * steps)
    falling = math.ceil(decay * steps) if kind == "wsd" else steps - rising
    steepest = PEAK * max(1 / max(1, rising), math.pi / 2 / max(1, min(falling, steps - rising)))
    assert all(abs(after - before) <= steepest * (1 + 1e-9) for before, after in pairwise(found))
