from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import begin, names, save

from trainer.distributed import World

METRIC = "eval/legal/loss"


def kept(run: Path, world: World, losses: dict[int, float | None], **options: Any) -> list[int]:
    """Steps that stay after each of these steps was saved with a loss."""
    store = begin(run, world, **options)
    for step, loss in losses.items():
        save(store, step, evaluation={} if loss is None else {"step": step, METRIC: loss})
    return [int(name.removeprefix("step-")) for name in names(store) if name.startswith("step-")]


def test_the_newest_stay(tmp_path: Path, world: World) -> None:
    assert kept(tmp_path, world, dict.fromkeys((1, 2, 3, 4, 10)), keep_last=2) == [4, 10]


def test_those_at_round_steps_stay_for_good(tmp_path: Path, world: World) -> None:
    steps = dict.fromkeys((2, 4, 6, 8, 10, 12))
    assert kept(tmp_path, world, steps, keep_last=1, keep_every_steps=4) == [4, 8, 12]


def test_the_best_stays_until_there_is_a_better_one(tmp_path: Path, world: World) -> None:
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: 6.0}
    options = {"keep_last": 1, "keep_best": METRIC}
    assert kept(tmp_path / "a", world, losses, **options) == [2, 4]
    assert kept(tmp_path / "b", world, losses | {5: 2.0, 6: 7.0}, **options) == [5, 6]


@pytest.mark.parametrize("unknown", [None, float("nan")])
def test_one_without_a_value_is_never_the_best(tmp_path: Path, world: World, unknown: float | None) -> None:
    losses = {1: unknown, 2: 9.0, 3: unknown, 4: unknown}
    assert kept(tmp_path, world, losses, keep_last=1, keep_best=METRIC) == [2, 4]


def test_of_several_with_the_same_evaluation_the_first_is_the_best(tmp_path: Path, world: World) -> None:
    store = begin(tmp_path, world, keep_last=1, keep_best=METRIC)
    save(store, 2, evaluation={"step": 2, METRIC: 3.0})
    save(store, 3, 4, evaluation={"step": 2, METRIC: 3.0})
    assert names(store) == ["latest", "step-00000002", "step-00000004"]


def test_what_an_earlier_attempt_found_best_stays(tmp_path: Path, world: World) -> None:
    options = {"keep_last": 1, "keep_best": METRIC}
    kept(tmp_path, world, {1: 2.0, 2: 3.0}, **options)
    assert kept(tmp_path, world, {3: 4.0, 4: 5.0}, **options) == [1, 4]
