"""What our loop costs: its steps beside those of a bare loop of the same model, strategy and rows.

    python tests/benchmarks/loop_overhead.py [RANKS]

Not a test: it takes minutes of a quiet machine. In one group of processes blocks of steps of either loop take
turns: ours is `train` on a tokenized stream with everything that it does at a step, the bare one is torch's
own wrappers, AdamW and clipping on rows that it is given. Prints the ratio of their times, block by block.
"""

from __future__ import annotations

import contextlib
import os
import statistics
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


class Turns:
    """Gives the loop its batches; between blocks of them it lets the bare loop run, and times both."""

    def __init__(self, session: Session, bare_step: Callable[[Tensor], None]) -> None:
        self._next_batch = session.next_batch
        self._bare_step = bare_step
        self._rows = torch.empty(0)
        self._taken = 0
        self._began = 0.0
        self._bare_seconds: list[float] = []
        self._our_seconds: list[float] = []

    @property
    def ratios(self) -> list[float]:
        """Our seconds over the bare loop's: each block of ours over the mean of its two neighbours."""
        before, after = self._bare_seconds[:-1], self._bare_seconds[1:]
        return [2 * o / (b + a) for o, b, a in zip(self._our_seconds, before, after, strict=True)]

    @property
    def step_seconds(self) -> float:
        """Of the bare loop."""
        return statistics.median(self._bare_seconds) / BLOCK_STEPS

    def next_batch(self, give_up: Callable[[], bool]) -> Batch | None:
        steps = self._taken - WARMUP_STEPS
        self._taken += 1
        if steps >= 0 and steps % BLOCK_STEPS == 0:
            now = time.perf_counter()
            if steps > 0:
                self._our_seconds.append(now - self._began)
            for _ in range(BLOCK_STEPS):
                self._bare_step(self._rows)
            self._began = time.perf_counter()
            self._bare_seconds.append(self._began - now)
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
        ratio = statistics.median(turns.ratios)
        low, high = min(turns.ratios), max(turns.ratios)
        print(
            f"| {config.sharding.strategy} | {world.size} | {turns.step_seconds:.3f} | {ratio - 1:+.2%} "
            f"| {low - 1:+.2%} to {high - 1:+.2%} |",
            flush=True,
        )


def main() -> None:
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    os.environ["TRAINYARD_ATTEMPT"] = "1"
    steps = WARMUP_STEPS + PAIRS * BLOCK_STEPS + 1
    global_batch = ranks * MICRO_BATCH * ACCUMULATION
    print("| strategy | ranks | seconds of a bare step | overhead, median | least to most |")
    print("|---|---|---|---|---|")
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
