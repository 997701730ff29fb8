"""Any strategy resumes any other's checkpoint at another world size; its own bit for bit.

Every strategy trains 15 steps and saves at 5, 10 and 15; what resumes from 5 must repeat the other ten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from ranks import Job, freeze, saved_tensors, train_all
from support import Site, metrics

from configs.compose import compose
from configs.schema import Config

# The first test waits for all runs.
pytestmark = pytest.mark.timeout(1800)

STEPS, SAVED_STEP, SECOND_STEP, GLOBAL_BATCH = 15, 5, 10, 8
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp")
WORLD_SIZES = (2, 4)
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Setting:
    strategy: str
    world_size: int

    def __str__(self) -> str:
        return f"{self.strategy}-{self.world_size}"

    def config(self, site: Site) -> Config:
        own = (override for override in site.overrides(STEPS, GLOBAL_BATCH) if "validation" not in override)
        return compose(
            [
                *own,
                f"sharding={self.strategy}",
                *([f"sharding.shard_degree={self.world_size // 2}"] if self.strategy == "hsdp" else []),
                f"gpus_per_node={self.world_size}",
                f"micro_batch={GLOBAL_BATCH // self.world_size // 2}",
                f"checkpoint.every_steps={SAVED_STEP}",
                "checkpoint.keep_last=3",
            ]
        )


SETTINGS = [Setting(strategy, size) for size in WORLD_SIZES for strategy in STRATEGIES]
PAIRS = [
    (saved, resumed)
    for saved, resumed in product(SETTINGS, SETTINGS)
    if saved.world_size != resumed.world_size
]


@dataclass(frozen=True)
class Matrix:
    """Run directories by what they show, and what failed."""

    root: Path
    failures: dict[Path, str]

    def whole(self, setting: Setting) -> Path:
        """A run that nothing interrupts."""
        return self._run(f"whole-{setting}")

    def resumed(self, saved: Setting, resumed: Setting) -> Path:
        """The run that goes on from step 5 of another's."""
        return self._run(f"from-{saved}-to-{resumed}")

    def again(self, setting: Setting) -> Path:
        """The run that goes on from step 10 of one that was resumed itself."""
        return self._run(f"again-{setting}")

    def _run(self, name: str) -> Path:
        run = self.root / name
        if run in self.failures:
            pytest.fail(self.failures[run])
        return run


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """All runs, in three groups of processes, each of them after those that it goes on from."""
    site = Site.create(tmp_path_factory.mktemp("matrix"))
    configs = {setting: setting.config(site) for setting in SETTINGS}
    matrix = Matrix(site.root, {})

    def whole(size: int) -> list[Job]:
        return [freeze(configs[s], matrix.whole(s)) for s in SETTINGS if s.world_size == size]

    def resumed(size: int) -> list[Job]:
        """On `size` ranks: every run of the other size, and this size's own twice."""
        jobs = []
        for saved, setting in product(SETTINGS, SETTINGS):
            if setting.world_size == size and (saved.world_size != size or saved == setting):
                run = matrix.resumed(saved, setting)
                jobs.append(freeze(configs[setting], run, matrix.whole(saved), SAVED_STEP))
        for setting in SETTINGS:
            if setting.world_size == size:
                source = matrix.resumed(setting, setting)
                jobs.append(freeze(configs[setting], matrix.again(setting), source, SECOND_STEP))
        return jobs

    for size, jobs in ((2, whole(2)), (4, whole(4) + resumed(4)), (2, resumed(2))):
        matrix.failures.update(train_all(jobs, size))
    return matrix


@pytest.fixture(scope="module")
def table(show: Callable[[str], None]) -> Iterator[dict[tuple[Setting, Setting], float]]:
    """Worst relative difference of a loss by (saved, resumed), shown when all are done."""
    worst: dict[tuple[Setting, Setting], float] = {}
    yield worst
    lines = []
    for p, q in ((2, 4), (4, 2)):
        lines += ["", f"Worst relative difference of ten losses, saved on {p} ranks and resumed on {q}"]
        lines.append(f"{'saved':8}" + "".join(f"{strategy:>9}" for strategy in STRATEGIES))
        for saved in STRATEGIES:
            cells = (worst.get((Setting(saved, p), Setting(resumed, q))) for resumed in STRATEGIES)
            lines.append(
                f"{saved:8}" + "".join("       --" if cell is None else f"{cell:9.1e}" for cell in cells)
            )
    show("\n".join(lines))


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics(run)}


def deterministic(run: Path) -> dict[int, tuple[float, ...]]:
    return {row["step"]: tuple(row[k] for k in ("tokens", "loss", "lr", "grad_norm")) for row in metrics(run)}


@pytest.mark.parametrize(("saved", "resumed"), PAIRS, ids=str)
def test_any_strategy_resumes_any_other_at_another_world_size(
    saved: Setting, resumed: Setting, matrix: Matrix, table: dict[tuple[Setting, Setting], float]
) -> None:
    expected = losses(matrix.whole(saved))
    actual = losses(matrix.resumed(saved, resumed))
    assert sorted(actual) == list(range(SAVED_STEP + 1, STEPS + 1))
    worst = max(abs(loss - expected[step]) / expected[step] for step, loss in actual.items())
    table[saved, resumed] = worst
    assert worst <= TOLERANCE


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_same_strategy_and_world_size_go_on_bit_for_bit_twice_in_a_row(
    setting: Setting, matrix: Matrix
) -> None:
    expected = deterministic(matrix.whole(setting))
    final = saved_tensors(matrix.whole(setting) / "checkpoints" / "latest")
    for run, step in ((matrix.resumed(setting, setting), SAVED_STEP), (matrix.again(setting), SECOND_STEP)):
        assert deterministic(run) == {s: row for s, row in expected.items() if s > step}
        tensors = saved_tensors(run / "checkpoints" / "latest")
        assert tensors.keys() == final.keys()
        assert all(torch.equal(tensors[name], final[name]) for name in final)
