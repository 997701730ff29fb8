"""What our loop costs: its steps beside those of a bare loop of the same model, strategy and rows.

    python tests/benchmarks/loop_overhead.py [RANKS]

Not a test: it takes minutes of a quiet machine. In one group of processes blocks of steps of either loop take
turns: ours is `train` on a tokenized stream with everything that it does at a step, the bare one is torch's
own wrappers, AdamW and clipping on rows that it is given. Prints by how
much ours take longer.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from ranks import freeze, together
from support import Site
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from cluster.signals import StopNotice
from configs.compose import compose
from configs.schema import Config
from trainer.data.loader import Batch
from trainer.distributed import World
from trainer.loop import train
from trainer.model import architecture_of, blocks
from trainer.session import Session, open_session

STRATEGIES = ("ddp", "fsdp")
PAIRS, BLOCK_STEPS, WARMUP_STEPS = 12, 10, 5
LENGTH, MICRO_BATCH, ACCUMULATION = 128, 2, 2


def seconds() -> Tensor:
    """[2]: by the clock, and of this process on a core, which others on the machine disturb less."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


class Turns:
    """Gives the loop its batches; between blocks of them it lets the bare loop run, and times both."""

    def __init__(self, session: Session, bare_step: Callable[[Tensor], None]) -> None:
        self._next_batch = session.next_batch
        self._bare_step = bare_step
        self._rows = torch.empty(0)
        self._taken = 0
        self._began = seconds()
        self._bare: list[Tensor] = []
        self._ours: list[Tensor] = []

    @property
    def overheads(self) -> Tensor:
        """[blocks, 2]: of each block of ours over the mean of its two neighbours, minus 1."""
        bare = torch.stack(self._bare)
        return 2 * torch.stack(self._ours) / (bare[:-1] + bare[1:]) - 1

    @property
    def step_seconds(self) -> float:
        """Of the bare loop."""
        return torch.stack(self._bare)[:, 0].median().item() / BLOCK_STEPS

    def next_batch(self, give_up: Callable[[], bool]) -> Batch | None:
        steps = self._taken - WARMUP_STEPS
        self._taken += 1
        if steps >= 0 and steps % BLOCK_STEPS == 0:
            now = seconds()
            if steps > 0:
                self._ours.append(now - self._began)
            for _ in range(BLOCK_STEPS):
                self._bare_step(self._rows)
            self._began = seconds()
            self._bare.append(self._began - now)
        batch = self._next_batch(give_up)
        if batch is not None:
            self._rows = torch.from_numpy(batch.rows).long()
        return batch


def bare_loop(config: Config) -> Callable[[Tensor], None]:
    """A step of a loop that does nothing but train, on rows [rows of a rank, LENGTH + 1]."""
    module = AutoModelForCausalLM.from_config(architecture_of(config.model), dtype=torch.float32)
    model: nn.Module
    if config.sharding.strategy == "ddp":
        model = DistributedDataParallel(module, gradient_as_bucket_view=True)
        no_sync: Callable[[], contextlib.AbstractContextManager[None]] = model.no_sync
    else:
        for block in blocks(module):
            fully_shard(block)
        model = fully_shard(module)
        no_sync = contextlib.nullcontext
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, fused=True)

    def loss(micro: Tensor) -> Tensor:
        logits = model(input_ids=micro[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), micro[:, 1:].flatten()) / ACCUMULATION

    def step(rows: Tensor) -> None:
        *first, last = rows.split(MICRO_BATCH)
        for micro in first:
            with no_sync():
                loss(micro).backward()
        loss(last).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def work(world: World, run: Path, config: Config) -> None:
    session = open_session(run, config, world, attempt=1)
    turns = Turns(session, bare_loop(config))
    session.next_batch = turns.next_batch  # type: ignore[method-assign]
    train(session, StopNotice(run))
    if world.main:
        clock, cpu = turns.overheads.median(0).values.tolist()
        low, high = turns.overheads[:, 0].aminmax()
        print(
            f"| {config.sharding.strategy} | {world.size} | {turns.step_seconds:.3f} | {clock:+.2%} "
            f"| {low:+.2%} to {high:+.2%} | {cpu:+.2%} |",
            flush=True,
        )


def main() -> None:
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    os.environ["TRAINYARD_ATTEMPT"] = "1"
    steps = WARMUP_STEPS + PAIRS * BLOCK_STEPS + 1
    global_batch = ranks * MICRO_BATCH * ACCUMULATION
    print("| strategy | ranks | seconds of a bare step | overhead, median | least to most | in CPU time |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        site = Site.create(Path(root))
        for strategy in STRATEGIES:
            run = Path(root) / strategy
            config = compose(
                [
                    *(text for text in site.overrides(steps, global_batch) if "validation" not in text),
                    "model.layers=6",
                    "model.hidden=256",
                    "model.heads=4",
                    "model.ffn=688",
                    "model.vocabulary=8000",
                    f"model.sequence_length={LENGTH}",
                    f"budget.tokens={steps * global_batch * LENGTH}",
                    f"sharding={strategy}",
                    f"gpus_per_node={ranks}",
                    f"micro_batch={MICRO_BATCH}",
                    "log_every_steps=10",
                    # A model that knows its few rows by heart computes with denormal numbers, which are slow.
                    "optimizer.lr=1e-5",
                    f"run.directory={run}",
                ]
            )
            freeze(config, run)
            together(ranks, work, run, config)


if __name__ == "__main__":
    main()
