"""Every number of a plan carries its formula and its source."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from configs.compose import compose
from launcher.plan.explain import ORIGINS, numbers, origin, rows
from launcher.plan.figure import draw
from launcher.plan.plan import make_plan
from launcher.plan.table import render_explained

PLAN = make_plan(compose(["model=llama-7b", "hardware=h100-sxm-80gb", "gpus_per_node=8", "sharding=hsdp"]))


def test_every_number_of_a_plan_is_explained() -> None:
    explained = list(rows(PLAN))
    assert len(explained) == len(list(numbers(PLAN))) > 100
    assert all(found.formula and found.source for _, _, found in explained)


def test_a_number_that_nothing_explains_is_an_error_not_a_blank() -> None:
    with pytest.raises(KeyError):
        origin("weather.tomorrow")


def test_no_explanation_is_left_over_from_a_number_that_is_gone() -> None:
    used = {id(found) for _, _, found in rows(PLAN)}
    optional = {
        "budget.epochs",
        "budget.continuation.*",
        "memory.host_limit_gib",
        "time.parts_seconds.*",
    }
    unused = {path for path, found in ORIGINS.items() if id(found) not in used}
    assert unused <= optional


def test_published_models_are_shown_with_their_verdict() -> None:
    screen = io.StringIO()
    Console(file=screen, width=220).print(render_explained(PLAN))
    lines = screen.getvalue().splitlines()
    for name, verdict in (
        ("GPT-3", "under-trained"),
        ("Chinchilla", "balanced"),
        ("Llama-3-8B", "over-trained"),
    ):
        assert any(line.strip().startswith(name) and verdict in line for line in lines), name


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_a_plan_is_drawn_in_the_format_of_the_file_name(suffix: str, start: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"plan{suffix}"
    draw(PLAN, file)
    assert file.read_bytes().startswith(start)
