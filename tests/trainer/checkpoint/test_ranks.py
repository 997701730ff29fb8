"""Several ranks: failures are everybody's, and disks may be each node's own."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from checkpoints import STATE

from cluster import attempt as attempts
from cluster import events
from configs.schema import Checkpoint, ConfigError
from trainer.checkpoint.store import Store
from trainer.distributed import World
from trainer.sharding.logical import Logical, Piece

ROWS = 5


def state(world: World, step: int) -> dict[str, Logical]:
    """A tensor that is split over ranks by rows, and one that each has whole."""
    rows = torch.arange(ROWS).tensor_split(world.size)[world.rank]
    split = (rows * 10.0 + step)[:, None].expand(-1, 3).contiguous()
    return {
        "weight/split": Logical(torch.Size([ROWS, 3]), (Piece((int(rows[0]), 0), split),)),
        "weight/whole": Logical(
            torch.Size([ROWS]), (Piece((0,), torch.arange(ROWS) + step + 0.0),), world.rank, world.size
        ),
    }


def equal(one: dict[str, Logical], other: dict[str, Logical]) -> bool:
    return all(one[name].pieces[0].tensor.equal(other[name].pieces[0].tensor) for name in one)


def store_of(run: Path, world: World, **options: object) -> Store:
    attempt = world.from_main(attempts.begin(run) if world.main else None)
    return Store(run, world, attempt, "fsdp", Checkpoint(**options))


def scene(run: Path, world: World, act: Callable[[Path, World], None]) -> None:
    if world.main:
        run.mkdir()
    world.barrier()
    act(run, world)
    world.barrier()


def save_in_background_and_load(run: Path, world: World) -> None:
    store = store_of(run, world)
    for step in (1, 2, 3, 4):
        live = state(world, step)
        store.save(step, live, STATE | {"step": step})
        for tensor in live.values():
            tensor.pieces[0].tensor.fill_(-1)
    store.close()
    live = state(world, 0)
    loaded = store.load(live)
    assert loaded is not None
    assert loaded["step"] == 4
    assert equal(live, state(world, 4))


def fail_on_one_rank(run: Path, world: World) -> None:
    store = store_of(run, world)
    store.save(1, state(world, 1), STATE)
    store.close()
    if world.rank == 1:
        write = store.place.writer

        def broken(step: int, attempt: int) -> object:
            writer = write(step, attempt)
            writer.files.fs = None  # nothing can be opened
            return writer

        store.place.writer = broken  # type: ignore[method-assign,assignment]
    store.save(2, state(world, 2), STATE)
    with pytest.raises(AttributeError):
        store.close()
    live = state(world, 0)
    store.load(live)
    assert equal(live, state(world, 1))


def every_node_has_its_own_disk(run: Path, world: World) -> None:
    own, durable = run / f"node-{world.rank}", run / "durable"
    store = store_of(run, world, directory=str(own), durable=str(durable), keep_last=1)
    for step in (1, 2):
        store.save(step, state(world, step), STATE | {"step": step})
        store.close()
    shared = {".metadata", "state.json", "manifest.json"}
    mine = {f"__{world.rank}_0.distcp", "manifest.json"}
    assert set(os.listdir(own)) == {"step-00000002"}
    assert set(os.listdir(own / "step-00000002")) == (mine | shared if world.main else mine)
    world.barrier()
    parts = {f"__{rank}_0.distcp" for rank in range(world.size)}
    assert set(os.listdir(durable)) == {"step-00000002"}
    assert set(os.listdir(durable / "step-00000002")) == parts | shared
    live = state(world, 0)
    store.load(live)
    assert equal(live, state(world, 2))
    assert not [e for e in events.read(run / "events.jsonl") if e["event"] == "checkpoint_damaged"]
    alone = store_of(run, world, directory=str(own))
    with pytest.raises(ConfigError, match="not shared between nodes"):
        alone.load(live)


def _rank(rank: int, directory: Path, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world = World.join()
    scene(directory / "background", world, save_in_background_and_load)
    scene(directory / "failure", world, fail_on_one_rank)
    scene(directory / "disks", world, every_node_has_its_own_disk)
    world.leave()


def test_ranks_save_fail_and_load_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (tmp_path, port), nprocs=2)
    manifest = json.loads((tmp_path / "background/checkpoints/step-00000004/manifest.json").read_text())
    assert manifest["world_size"] == 2
