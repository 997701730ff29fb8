from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoints import begin

from trainer.checkpoint.store import Store
from trainer.distributed import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A process group of one."""
    file = tmp_path_factory.mktemp("rendezvous") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield World(0, 1, torch.device("cpu"), group)
    dist.destroy_process_group()


@pytest.fixture
def store(tmp_path: Path, world: World) -> Store:
    """Checkpoints of a new run, written in line."""
    return begin(tmp_path, world)
