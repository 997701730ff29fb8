"""Peak memory of a rank under every strategy, on 2 and 4 processes, beside what the plan says and what the
strategy promises.

    python tests/benchmarks/sharding_memory.py [STRATEGY-RANKS ...]

Not a test: it takes minutes and up to 14 GiB. A Llama of 290 M parameters trains a step of two passes of one
short row a rank in fp32 on the CPU; between the passes zero1 holds all gradients, zero2 its share. Measured
is the most resident memory of a rank (VmHWM) without what an idle worker has, in fresh processes, with a C
library that gives freed memory back at once. ddp holds the same on any number of ranks, so it is measured on
two. gloo gathers into a copy: whoever gathers all weights at once (zero1, zero2) has them twice for a moment.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from ranks import freeze, together
from support import Site

from configs.compose import compose
from configs.schema import Config
from launcher.plan.plan import make_plan
from trainer import objective
from trainer.distributed import World
from trainer.session import open_session

STEPS, LENGTH, ACCUMULATION = 1, 16, 2
RANKS = (2, 4)
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp_grad_op", "fsdp", "hsdp")
CELLS = [
    f"{strategy}-{ranks}" for ranks in RANKS for strategy in STRATEGIES if (strategy, ranks) != ("ddp", 4)
]
SMALLER = {"bucket_parameters": 2e7, "prefetch_parameters": 2e6, "live_parameters": 4e7}
"""DeepSpeed's buffers are made for models of 7B and more; to this one they are as these are."""
RETURNING = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(2**20))


def promised(strategy: str, ranks: int) -> float:
    """States of a rank as a share of ddp's: 4 bytes each of weight, gradient and two moments, split or not.

    ZeRO counts its fp32 copy of the weights with the optimizer's states, which it splits as well
    (Rajbhandari et al. 2020, table 1).
    """
    weights, gradients, moments = 4.0, 4.0, 8.0
    match strategy:
        case "zero1":
            kept, split = weights + gradients, moments + 4.0
        case "zero2":
            kept, split = weights, gradients + moments + 4.0
        case "zero3":
            kept, split = 0.0, weights + gradients + moments + 4.0
        case "fsdp_grad_op":
            kept, split = weights, moments + weights  # gathered ones go as gradients come
        case "fsdp":
            kept, split = 0.0, weights + gradients + moments
        case "hsdp":
            kept, split = 0.0, (weights + gradients + moments) * ranks / shard_degree(ranks)
        case _:
            kept, split = weights + gradients + moments, 0.0
    return (kept + split / ranks) / (weights + gradients + moments)


def shard_degree(ranks: int) -> int:
    """Ranks that hsdp splits over; on two it is fsdp."""
    return 2


def config_of(site: Site, strategy: str, ranks: int, run: Path) -> Config:
    return compose(
        [
            *(text for text in site.overrides(STEPS, ACCUMULATION * ranks) if "validation" not in text),
            "model.layers=20",
            "model.hidden=1024",
            "model.heads=16",
            "model.ffn=2816",
            "model.vocabulary=16000",
            "model.tied_embeddings=false",
            f"model.sequence_length={LENGTH}",
            f"budget.tokens={STEPS * ACCUMULATION * ranks * LENGTH}",
            f"sharding={strategy}",
            *(f"sharding.{key}={value}" for key, value in SMALLER.items() if strategy.startswith("zero")),
            *([f"sharding.shard_degree={shard_degree(ranks)}"] if strategy == "hsdp" else []),
            "hardware=cpu",
            f"gpus_per_node={ranks}",
            "micro_batch=1",
            "checkpoint.asynchronous=false",
            f"run.directory={run}",
        ]
    )


def resident_gib(name: str) -> float:
    """A line of /proc/self/status: VmRSS is now, VmHWM the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 2**20
    raise KeyError(name)


def work(world: World, run: Path, config: Config) -> None:
    """Train without saving, and leave the peak in RUN/peak-RANK."""
    torch.set_num_threads(1)
    idle_gib = resident_gib("VmRSS")
    session = open_session(run, config, world, attempt=1)
    for _ in range(STEPS):
        batch = session.next_batch(give_up=lambda: False)
        assert batch is not None
        inputs, targets, _ = objective.causal(torch.from_numpy(batch.rows).long())
        for number in range(ACCUMULATION):
            row = slice(number, number + 1)
            with session.strategy.gradients(complete=number + 1 == ACCUMULATION):
                loss = objective.loss_sum(session.strategy.logits(inputs[row]), targets[row])
                session.strategy.backward(loss)
        session.strategy.step(1e-4)
    (run / f"peak-{world.rank}").write_text(str(resident_gib("VmHWM") - idle_gib))


def main() -> None:
    os.environ |= RETURNING
    print("GiB of a rank, without an idle worker's; the last three columns are shares of ddp's")
    print("| strategy | ranks | planned | measured | ratio | promised | planned | measured |")
    print("|---|---|---|---|---|---|---|---|")
    whole: tuple[float, float] | None = None
    with tempfile.TemporaryDirectory() as root:
        site = Site.create(Path(root))
        for cell in sys.argv[1:] or CELLS:
            strategy, ranks = cell.rsplit("-", 1)
            run = Path(root) / cell
            config = config_of(site, strategy, int(ranks), run)
            memory = make_plan(config)["memory"]
            planned = memory["active_gib"] - memory["components_gib"]["runtime"]
            freeze(config, run)
            if not together(int(ranks), work, run, config):
                print(f"| {strategy} | {ranks} | {planned:.2f} | failed |", flush=True)
                continue
            measured = max(float(file.read_text()) for file in run.glob("peak-*"))
            whole = whole or (planned, measured)
            shares = (promised(strategy, int(ranks)), planned / whole[0], measured / whole[1])
            numbers = f"{planned:.2f} | {measured:.2f} | {planned / measured:.3f}"
            print(
                f"| {strategy} | {ranks} | {numbers} | " + " | ".join(f"{s:.3f}" for s in shares) + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
