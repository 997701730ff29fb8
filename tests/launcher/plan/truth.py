"""What a published fact asks of the planner: a prediction, what was published, and how close is close."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
"""id, kind, inputs, formula, expected, unit, tol_rel; formula and id may say what inputs do not."""


@dataclass(frozen=True)
class Check:
    """One number, verdict or choice of the planner beside the published one."""

    predicted: Any
    expected: Any
    tolerance: float
    """Largest relative deviation of a number; texts must be equal."""

    @property
    def deviation(self) -> float:
        """|predicted / expected - 1|; for anything but numbers 0 when equal and infinite otherwise."""
        numbers = (int, float)
        if isinstance(self.expected, bool) or not isinstance(self.expected, numbers):
            return 0.0 if self.predicted == self.expected else float("inf")
        if not isinstance(self.predicted, numbers):
            return float("inf")
        if self.expected == 0:
            return 0.0 if self.predicted == 0 else float("inf")
        return abs(self.predicted / self.expected - 1)

    @property
    def within(self) -> bool:
        return self.deviation <= self.tolerance


Evaluator = Callable[[Row], list[Check]]


def compare(row: Row, predicted: Any) -> list[Check]:
    """The checks of a row with one expected value, or with a list of them."""
    tolerance = float(row["tol_rel"] or 0)
    if isinstance(row["expected"], list):
        return [
            Check(value, expected, tolerance)
            for value, expected in zip(predicted, row["expected"], strict=True)
        ]
    return [Check(predicted, row["expected"], tolerance)]
