"""The planner reproduces published facts: every row of a truth file, through the planner's own functions.

TRAINYARD_TRUTH names another file of the same schema. `-s` shows the table kind / rows / within / worst.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import truth_memory
import truth_parameters
import truth_scaling
import truth_time
import yaml
from truth import Check, Evaluator, Row

TRUTH = Path(os.environ.get("TRAINYARD_TRUTH") or Path(__file__).parent / "truth.yaml")
ROOMS = (truth_parameters, truth_scaling, truth_memory, truth_time)
EVALUATORS: dict[str, Evaluator] = {
    kind: evaluator for room in ROOMS for kind, evaluator in room.EVALUATORS.items()
}

facts: dict[str, Any] = yaml.safe_load(TRUTH.read_text())
outcomes: dict[str, list[tuple[str, list[Check]]]] = defaultdict(list)


def judge(kind: str, name: str, checks: list[Check]) -> None:
    """Note the checks for the table, and fail on the first that is out."""
    outcomes[kind].append((name, checks))
    assert checks, f"{name}: nothing was compared"
    for check in checks:
        assert check.within, (
            f"{name}: predicted {check.predicted!r}, published {check.expected!r}, "
            f"deviation {check.deviation:.4g}, allowed {check.tolerance:g}"
        )


@pytest.mark.parametrize("row", facts.get("rows") or [], ids=lambda row: row["id"])
def test_row(row: Row) -> None:
    kind = row["kind"]
    assert kind in EVALUATORS, f"{row['id']}: the planner knows no facts of kind {kind}"
    judge(kind, row["id"], EVALUATORS[kind](row))


def foundry() -> list[tuple[str, str, Check]]:
    """Speed and fit of the published llm-foundry benchmarks, if the file has them."""
    table = facts.get("mfu_llm_foundry")
    if table is None:
        return []
    speeds = [("llm-foundry speed", *named) for named in truth_parameters.foundry_checks(table)]
    return speeds + [("llm-foundry fits", *named) for named in truth_memory.foundry_fits(table)]


@pytest.mark.parametrize(("kind", "name", "check"), foundry())
def test_llm_foundry(kind: str, name: str, check: Check) -> None:
    judge(kind, name, [check])


def test_no_two_rooms_claim_the_same_kind() -> None:
    assert len(EVALUATORS) == sum(len(room.EVALUATORS) for room in ROOMS)


@pytest.fixture(scope="module", autouse=True)
def truth_table(request: pytest.FixtureRequest) -> Any:
    """Prints the table once every row has been judged."""
    yield
    lines = [f"{'kind':24}{'rows':>6}{'within':>8}{'worst':>10}  worst row"]
    for kind, rows in sorted(outcomes.items()):
        within = sum(all(check.within for check in checks) for _, checks in rows)
        deviations = [
            (max((check.deviation for check in checks), default=float("inf")), name) for name, checks in rows
        ]
        worst, name = max(deviations)
        lines.append(f"{kind:24}{len(rows):6}{within:8}{worst:10.2%}  {name}")
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n" + "\n".join(lines))
