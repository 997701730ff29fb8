"""One trajectory: every strategy on 1, 2 and 4 ranks follows a plain single-process loop.

The plain loop is written here without any trainer code. It reads one file in order, packs it, accumulates
nothing, and trains with torch's own AdamW. A table of all cells is printed at the end.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from ranks import freeze, saved_tensors, train_all
from support import SEQUENCE_LENGTH, VOCABULARY, Site, metrics
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from configs.compose import compose

# The first cell of a world size waits for all of that size.
pytestmark = pytest.mark.timeout(900)

STEPS, GLOBAL_BATCH, SEED, PEAK, CLIP_NORM = 30, 8, 3, 1e-2, 1.0
ROWS = VOCABULARY + 1
"""Embedding rows; neither 2 nor 4 ranks get equal shares."""
STRATEGIES = (
    "ddp",
    "zero1",
    "zero2",
    "zero3",
    "zero3_offload",
    "fsdp",
    "fsdp_offload",
    "fsdp_grad_op",
    "hsdp",
)


@dataclass(frozen=True)
class Distance:
    """How far one trajectory is from another: relative for losses and norms, absolute for weights."""

    loss: float
    norm: float
    weights: float

    def within(self, bound: Distance) -> bool:
        return self.loss <= bound.loss and self.norm <= bound.norm and self.weights <= bound.weights


@dataclass(frozen=True)
class Trajectory:
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]

    def distance(self, other: Trajectory) -> Distance:
        assert len(self.losses) == len(other.losses) == STEPS
        assert self.weights.keys() == other.weights.keys()
        return Distance(
            _worst(self.losses, other.losses),
            _worst(self.norms, other.norms),
            max((weight - other.weights[name]).abs().max().item() for name, weight in self.weights.items()),
        )


@dataclass(frozen=True)
class Cell:
    strategy: str
    world_size: int
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.strategy}-{self.world_size}-{self.precision}"

    def overrides(self, site: Site) -> list[str]:
        """Every cell accumulates, over two forward passes or more."""
        own = (override for override in site.overrides(STEPS, GLOBAL_BATCH) if "data.corpora" not in override)
        degree = {1: 1, 2: 1, 4: 2}[self.world_size]
        return [
            *own,
            f"data.corpora.general.train={shard(site)}",
            "data.lanes=1",
            "data.shuffle_window=1",
            "schedule.warmup_fraction=0.1",
            f"model.vocabulary={ROWS}",
            f"seed={SEED}",
            f"optimizer.clip_norm={CLIP_NORM}",
            f"sharding={self.strategy}",
            *([f"sharding.shard_degree={degree}"] if self.strategy == "hsdp" else []),
            f"precision={self.precision}",
            "precision.loss_scale=1024",  # so small that no step is skipped, which would shift all later ones
            f"gpus_per_node={self.world_size}",
            f"micro_batch={2 if self.world_size < 4 else 1}",
            f"run.directory={site.root / str(self)}",
        ]


BOUNDS = {
    "fp32": Distance(loss=1e-5, norm=1e-5, weights=1e-4),
    # Against the plain loop in fp32. AdamW moves a weight by the rate whatever its gradient's size, so one
    # whose gradient is mostly rounding goes its own way: the rates of the 30 steps add up to 0.16.
    "bf16": Distance(loss=2e-3, norm=5e-2, weights=1e-1),
    "fp16": Distance(loss=5e-4, norm=1e-2, weights=5e-2),
}
CELLS = [
    *(Cell(strategy, world_size) for world_size in (1, 2, 4) for strategy in STRATEGIES),
    *(Cell(strategy, 2, "bf16") for strategy in STRATEGIES),
    *(Cell(strategy, 2, "fp16") for strategy in ("ddp", "zero2", "fsdp")),
]


def shard(site: Site) -> Path:
    return site.root / "general" / "train.00000.json.gz"


def plain_rows(file: Path, tokenizer_file: Path) -> torch.Tensor:
    """[rows, SEQUENCE_LENGTH + 1]: documents in file order, each ended by id 0, rows overlapping by one."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    ids: list[int] = []
    with gzip.open(file, "rt") as lines:
        for line in lines:
            ids += [*tokenizer.encode(json.loads(line)["text"]).ids, 0]
    starts = range(0, STEPS * GLOBAL_BATCH * SEQUENCE_LENGTH, SEQUENCE_LENGTH)
    return torch.tensor([ids[start : start + SEQUENCE_LENGTH + 1] for start in starts])


def plain_loop(rows: torch.Tensor) -> Trajectory:
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=ROWS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=SEQUENCE_LENGTH,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
    )
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    losses, norms = [], []
    for step in range(STEPS):
        batch = rows[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]
        logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM).item())
        warmup = math.ceil(0.1 * STEPS)
        progress = (step + 1 - warmup) / (STEPS - warmup)
        falling = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = PEAK * ((step + 1) / warmup if step < warmup else falling)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Trajectory(losses, norms, {name: p.detach() for name, p in model.named_parameters()})


@pytest.fixture(scope="module")
def parity_site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site.create(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def reference(parity_site: Site) -> Trajectory:
    return plain_loop(plain_rows(shard(parity_site), parity_site.root / "tokenizer" / "tokenizer.json"))


@pytest.fixture(scope="module")
def trained(parity_site: Site) -> Callable[[Cell], Trajectory]:
    """Trajectory of a cell; the first of a world size trains all of that size."""

    @cache
    def failures(world_size: int) -> dict[Path, str]:
        cells = [cell for cell in CELLS if cell.world_size == world_size]
        jobs = [freeze(compose(cell.overrides(parity_site)), parity_site.root / str(cell)) for cell in cells]
        return train_all(jobs, world_size)

    def of(cell: Cell) -> Trajectory:
        run = parity_site.root / str(cell)
        if failure := failures(cell.world_size).get(run):
            pytest.fail(failure)
        return trajectory(run)

    return of


@pytest.fixture(scope="module")
def table(show: Callable[[str], None]) -> Iterator[list[str]]:
    """Lines that are shown when all cells are done."""
    lines: list[str] = []
    yield lines
    head = f"{'strategy':14} {'ranks':>5} {'format':6} {'loss':>9} {'grad norm':>9} {'weights':>9}"
    show("\n".join(["Worst distance from a plain loop in fp32 over 30 steps", head, *lines]))


def trajectory(run: Path) -> Trajectory:
    rows = metrics(run)
    tensors = saved_tensors(run / "checkpoints" / "latest")
    weights = {name.removeprefix("weight/"): t for name, t in tensors.items() if name.startswith("weight/")}
    return Trajectory([row["loss"] for row in rows], [row["grad_norm"] for row in rows], weights)


def test_the_reference_clips_some_of_its_gradients(reference: Trajectory) -> None:
    clipped = [norm > CLIP_NORM for norm in reference.norms]
    assert any(clipped)
    assert not all(clipped)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_every_strategy_follows_a_plain_loop(
    cell: Cell, trained: Callable[[Cell], Trajectory], reference: Trajectory, table: list[str]
) -> None:
    distance = trained(cell).distance(reference)
    table.append(
        f"{cell.strategy:14} {cell.world_size:5} {cell.precision:6} "
        f"{distance.loss:9.1e} {distance.norm:9.1e} {distance.weights:9.1e}"
    )
    assert distance.within(BOUNDS[cell.precision]), distance


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_bf16_strategies_agree_with_one_another(strategy: str, trained: Callable[[Cell], Trajectory]) -> None:
    distance = trained(Cell(strategy, 2, "bf16")).distance(trained(Cell("ddp", 2, "bf16")))
    assert distance.within(BOUNDS["bf16"]), distance


@pytest.mark.parametrize("cell", [Cell("ddp", 2), Cell("zero3", 2), Cell("fsdp", 4)], ids=str)
def test_the_command_line_trains_the_same(site: Site, cell: Cell, reference: Trajectory) -> None:
    finished = site.trainyard("train", *cell.overrides(site))
    assert finished.returncode == 0, finished.stderr
    assert trajectory(site.root / str(cell)).distance(reference).within(BOUNDS["fp32"])


def _worst(actual: list[float], expected: list[float]) -> float:
    """Largest relative difference of two rows of numbers."""
    return max(abs(a - e) / abs(e) for a, e in zip(actual, expected, strict=True))
