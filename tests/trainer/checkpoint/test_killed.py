"""kill -9 at any instant of a save, and a disk that fills up."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from checkpoints import STATE, begin

from cluster import attempt as attempts
from trainer.checkpoint.places import NoSpace
from trainer.distributed import World
from trainer.sharding.logical import Logical, logical

KILLS = 20
ROWS, COLUMNS = 5000, 1000  # 20 MB
DISK_MIB = 50


def content(step: int) -> torch.Tensor:
    """What the checkpoint of a step must hold, bit for bit."""
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(step))


def state(tensor: torch.Tensor) -> dict[str, Logical]:
    return {"weight/a": logical(tensor)}


def _save_for_ever(run: Path, rendezvous: Path, asynchronous: bool) -> None:
    """Take up the newest checkpoint and save one after the other, until killed."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    store = begin(run, World(0, 1, torch.device("cpu"), group), asynchronous=asynchronous, keep_last=2)
    live = torch.zeros(ROWS, COLUMNS)
    saved = store.load(state(live))
    step = saved["step"] if saved else 0
    while True:
        step += 1
        live.copy_(content(step))
        store.save(step, state(live), STATE | {"step": step})


def test_whenever_a_save_is_killed_the_newest_checkpoint_is_whole_and_right(
    tmp_path: Path, world: World
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    checkpoints, dice, found = run / "checkpoints", random.Random(4), 0
    processes = get_context("forkserver")
    processes.set_forkserver_preload(
        ["trainer.checkpoint.store"]
    )  # torch is imported once, not for each of them
    for kill in range(KILLS):
        arguments = (run, tmp_path / f"rendezvous-{kill}", kill % 2 == 0)
        process = processes.Process(target=_save_for_ever, args=arguments)
        process.start()
        while attempts.newest_checkpoint(run) == (f"step-{found:08d}" if found else None):
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.4))
        process.kill()
        process.join()
        # As a resume would do, in a run directory of its own: attempts of this one stay as they are.
        reader = begin(tmp_path / "reader", world, directory=str(checkpoints))
        live = torch.zeros(ROWS, COLUMNS)
        saved = reader.load(state(live))
        assert saved is not None
        assert saved["step"] > found
        assert live.equal(content(saved["step"]))
        assert not list(checkpoints.glob("*.damaged-*"))
        found = saved["step"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that holds two checkpoints and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", disk]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("A FULL DISK WAS NOT TESTED: that needs root and the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_leaves_every_checkpoint_as_it_was(
    small_disk: Path, world: World, asynchronous: bool
) -> None:
    run = small_disk / "run"
    store = begin(run, world, asynchronous=asynchronous, keep_last=9)
    live = torch.zeros(ROWS, COLUMNS)
    for step in (1, 2):
        store.save(step, state(live.copy_(content(step))), STATE | {"step": step})
    store.close()
    with pytest.raises(NoSpace, match=r"checkpoints: no space left, a checkpoint needs 0\.0186 GiB"):  # noqa: PT012
        store.save(3, state(live.copy_(content(3))), STATE | {"step": 3})
        store.close()  # where what happened in the background shows
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "latest",
        "step-00000001",
        "step-00000002",
    ]
    saved = store.load(state(live))
    assert saved is not None
    assert saved["step"] == 2
    assert live.equal(content(2))
