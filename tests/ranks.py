"""Runs of several ranks without the launcher: one group of processes trains run after run.

Starting processes and importing torch takes longer than training a tiny model. So the ranks of one world
size are started once and take run directories one after another, through the trainer's own doors.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from cluster import attempt as attempts
from cluster import exit_codes
from cluster.signals import StopNotice, die_with_parent
from configs.load import load
from configs.schema import Config
from trainer.checkpoint.planner import Loading
from trainer.checkpoint.storage import Reader
from trainer.distributed import World
from trainer.loop import train
from trainer.session import open_session
from trainer.sharding.logical import logical

FAILURE, DONE = "failure.txt", "done"
GROUP_SECONDS = 900
MOST_FAILURES = 3
"""Starting processes anew for each of many runs that fail would take for ever."""


@dataclass(frozen=True)
class Job:
    """A run directory to be trained; with a source it goes on from that run's checkpoint of a step."""

    run: Path
    source: Path | None = None
    step: int = 0


def freeze(config: Config, run: Path, source: Path | None = None, step: int = 0) -> Job:
    """Make a run directory. The source has to be trained only when this run's turn comes."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    return Job(run, source, step)


def train_all(jobs: Sequence[Job], world_size: int) -> dict[Path, str]:
    """Train runs in order on so many ranks; returns the traceback of each that failed, by its directory.

    A run that fails takes its processes with it, and new ones do those that are left.
    """
    failures: dict[Path, str] = {}
    left = list(jobs)
    while left and len(failures) < MOST_FAILURES:
        together(world_size, _train_in_turn, left)
        while left and (left[0].run / DONE).exists():
            left.pop(0)
        if left:
            failed = left.pop(0).run
            report = failed / FAILURE
            failures[failed] = report.read_text() if report.exists() else "a rank ended without a word"
    return failures | {job.run: f"not tried after {MOST_FAILURES} failures" for job in left}


def together(world_size: int, work: Callable[..., None], *arguments: Any) -> bool:
    """Call work(world, *arguments) in so many new processes that have met; whether none of them failed.

    The first that fails, or the time limit, ends them all.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("spawn")
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, port, work, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + GROUP_SECONDS
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode for process in ranks) or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return codes == [0] * world_size


def saved_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The logical state in a checkpoint, whole."""
    reader = Reader(str(checkpoint))
    metadata = reader.read_metadata()
    tensors = {name: torch.empty(stored.size) for name, stored in metadata.state_dict_metadata.items()}
    wanted = {name: logical(tensor) for name, tensor in tensors.items()}
    load_tensors(wanted, storage_reader=reader, planner=Loading(), no_dist=True)
    return tensors


def _rank(
    rank: int, world_size: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    die_with_parent()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # Threads of so small a model only wait for one another.
    torch.set_num_threads(1)
    world = World.join()
    work(world, *arguments)
    world.leave()


def _train_in_turn(world: World, jobs: list[Job]) -> None:
    for job in jobs:
        try:
            _train(job, world)
        except BaseException:
            with (job.run / FAILURE).open("a") as file:
                file.write(f"rank {world.rank}\n{traceback.format_exc()}\n")
            os._exit(1)


def _train(job: Job, world: World) -> None:
    """What `python -m trainer RUN` does once the ranks have met."""
    run = job.run
    if world.main and job.source is not None:
        checkpoint = Path("checkpoints") / f"step-{job.step:08d}"
        shutil.copytree(job.source / checkpoint, run / checkpoint, copy_function=os.link)
        shutil.copy(job.source / "shards.json", run)
    attempt = world.from_main(attempts.begin(run) if world.main else None)
    os.environ["TRAINYARD_ATTEMPT"] = str(attempt)
    code = train(open_session(run, load(run / "config.yaml"), world, attempt), StopNotice(run))
    assert code == exit_codes.DONE
    world.barrier()
    if world.main:
        (run / DONE).touch()
