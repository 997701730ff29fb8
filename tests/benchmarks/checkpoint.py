"""What a checkpoint costs: `python tests/benchmarks/checkpoint.py [--ranks 2] [--mib 300] [--to DIRECTORY]`.

Ranks share a state evenly. A save in line is compared with the time for which an asynchronous one stops the
loop, and both directions with writing (and syncing) and reading files of the same size straight through.
Everything is repeated and the medians are told; files are dropped from the page cache before they are read,
where the system allows it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.multiprocessing as multiprocessing

sys.path.insert(0, str(Path(__file__).parents[2]))

from cluster import attempt as attempts
from configs.schema import Checkpoint
from trainer.checkpoint.store import Store
from trainer.distributed import World
from trainer.sharding.logical import Logical, Piece

MIB = 2**20
TENSORS = 24


def state(world: World, mib: int) -> dict[str, Logical]:
    """Tensors of `mib` in all, of which each rank has its rows."""
    rows = mib * MIB // (4 * TENSORS * 1024) // world.size
    tensors = {}
    for number in range(TENSORS):
        piece = Piece((world.rank * rows, 0), torch.randn(rows, 1024))
        tensors[f"weight/{number}"] = Logical(torch.Size([rows * world.size, 1024]), (piece,))
    return tensors


def timed(world: World, action: Callable[[], object]) -> float:
    """Seconds until the last rank is done."""
    world.barrier()
    began = time.perf_counter()
    action()
    world.barrier()
    return time.perf_counter() - began


def drop(directory: Path) -> None:
    """Ask the system to forget the files of a directory, so that reading them is reading the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def plain_write(path: Path, content: memoryview) -> None:
    with path.open("wb", buffering=0) as file:
        left = content
        while left:
            left = left[file.write(left[: 16 * MIB]) :]
        os.fsync(file.fileno())


def plain_read(path: Path, into: memoryview) -> None:
    with path.open("rb", buffering=0) as file:
        while file.readinto(into[: 16 * MIB]):
            pass


def measure(world: World, run: Path, mib: int, repeats: int) -> dict[str, float]:
    """Seconds of each kind of work, medians over repeats on the slowest rank."""
    tensors = state(world, mib)
    content = torch.cat([tensor.pieces[0].tensor.flatten() for tensor in tensors.values()])
    plain = run / f"plain-{world.rank}"
    view = memoryview(content.numpy()).cast("B")
    attempt = world.from_main(attempts.begin(run) if world.main else None)
    stores = {
        kind: Store(
            run,
            world,
            attempt,
            "fsdp",
            Checkpoint(asynchronous=kind == "async", directory=str(run / kind), keep_last=1),
        )
        for kind in ("sync", "async")
    }
    seconds: dict[str, list[float]] = {}

    def add(kind: str, action: Callable[[], object]) -> None:
        seconds.setdefault(kind, []).append(timed(world, action))

    for step in range(1, repeats + 2):
        add("write", lambda: plain_write(plain, view))
        add("save", lambda step=step: stores["sync"].save(step, tensors, {"step": step}))
        add("stall", lambda step=step: stores["async"].save(step, tensors, {"step": step}))
        add("rest", stores["async"].close)
        if world.main:
            drop(run)
        add("read", lambda: plain_read(plain, view))
        add("load", lambda: stores["sync"].load(tensors))
    worst = {kind: max(world.gather(median(values[1:]))) for kind, values in seconds.items()}
    return worst | {"first_stall": max(world.gather(seconds["stall"][0]))}


def rank(number: int, ranks: int, port: int, directory: str, mib: int, repeats: int) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    world = World.join()
    result = measure(world, Path(directory), mib, repeats)
    if world.main:
        tell(result, mib)
    world.leave()


def tell(seconds: dict[str, float], mib: int) -> None:
    for kind, text in (
        ("write", "plain write and fsync"),
        ("save", "save in line"),
        ("stall", "stall of an asynchronous save"),
        ("first_stall", "stall of the first one, which makes its buffers"),
        ("rest", "rest of it, in the background with nothing else to do"),
        ("read", "plain read"),
        ("load", "load, every byte verified first"),
    ):
        print(f"{text:56} {seconds[kind]:8.3f} s {mib / seconds[kind]:8.0f} MiB/s")
    print(f"stall / save in line           {seconds['stall'] / seconds['save']:.1%}")
    print(f"save bandwidth / plain write   {seconds['write'] / seconds['save']:.1%}")
    print(f"load bandwidth / plain read    {seconds['read'] / seconds['load']:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mib", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--port", type=int, default=29717)
    parser.add_argument("--to", type=Path, help="where to write; a directory for temporary files by default")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(dir=options.to))
    try:
        arguments = (options.ranks, options.port, str(directory), options.mib, options.repeats)
        multiprocessing.spawn(rank, arguments, nprocs=options.ranks)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
