"""The planner reproduces published facts: every row of a truth file, through the planner's own functions.

TRAINYARD_TRUTH names another file of the same schema. Shows the table kind / rows / within / worst.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import truth_memory
import truth_parameters
import truth_scaling
import truth_time
import yaml
from truth import Check, Evaluator, Row, normalised

TRUTH = Path(os.environ.get("TRAINYARD_TRUTH") or Path(__file__).parent / "truth.yaml")
ROOMS = (truth_parameters, truth_scaling, truth_memory, truth_time)
EVALUATORS: dict[str, Evaluator] = {
    kind: evaluator for room in ROOMS for kind, evaluator in room.EVALUATORS.items()
}

facts: dict[str, Any] = yaml.safe_load(TRUTH.read_text()) or {}
foundry: dict[str, Any] = facts.get("mfu_llm_foundry") or {}
outcomes: dict[str, list[tuple[str, list[Check]]]] = defaultdict(list)


def judge(kind: str, name: str, evaluate: Callable[[], list[Check]]) -> None:
    """Note the checks for the table, none if there is no answer, and fail on the first that is out."""
    checks: list[Check] = []
    try:
        checks = evaluate()
    finally:
        outcomes[kind].append((name, checks))
    assert checks, f"{name}: nothing was compared"
    for check in checks:
        assert check.within, (
            f"{name}: predicted {check.predicted!r}, published {check.expected!r}, "
            f"deviation {check.deviation:.4g}, allowed {check.tolerance:g}"
        )


def name_of(row: Any) -> str:
    return str(row.get("id")) if isinstance(row, dict) else str(row)


@pytest.mark.parametrize("raw", facts.get("rows") or [], ids=name_of)
def test_row(raw: Row) -> None:
    row = normalised(raw)

    def evaluate() -> list[Check]:
        assert row["kind"] in EVALUATORS, f"{row['id']}: the planner knows no facts of kind {row['kind']}"
        return EVALUATORS[row["kind"]](row)

    judge(row["kind"], row["id"], evaluate)


@pytest.mark.parametrize(
    "values", foundry.get("rows") or [], ids=lambda values: "-".join(map(str, values[:4]))
)
@pytest.mark.parametrize(
    ("kind", "ask"),
    [("llm-foundry speed", truth_parameters.foundry_checks), ("llm-foundry fits", truth_memory.foundry_fits)],
    ids=["speed", "fits"],
)
def test_llm_foundry(kind: str, ask: Callable[..., list[tuple[str, Check]]], values: list[Any]) -> None:
    """Speed and fit of the published llm-foundry benchmarks, if the file has them."""
    named: list[tuple[str, list[Check]]] = [(f"{kind} {values}", [])]
    try:
        row = dict(zip(foundry["columns"], values, strict=True))
        named = [(name, [check]) for name, check in ask(row, foundry["shapes"][row["model"]])]
    finally:
        outcomes[kind] += named
    for name, (check,) in named:
        assert check.within, f"{name}: predicted {check.predicted!r}, published {check.expected!r}"


def test_no_two_rooms_claim_the_same_kind() -> None:
    assert len(EVALUATORS) == sum(len(room.EVALUATORS) for room in ROOMS)


@pytest.fixture(scope="module", autouse=True)
def truth_table(show: Callable[[str], None]) -> Iterator[None]:
    """Shows the table once every row has been judged."""
    yield
    lines = [f"{'kind':24}{'rows':>6}{'within':>8}{'worst':>10}  worst row"]
    for kind, rows in sorted(outcomes.items()):
        within = sum(bool(checks) and all(check.within for check in checks) for _, checks in rows)
        deviations = [
            (max((check.deviation for check in checks), default=float("inf")), name) for name, checks in rows
        ]
        worst, name = max(deviations)
        lines.append(f"{kind:24}{len(rows):6}{within:8}{worst:10.2%}  {name}")
    show("\n".join(lines))
