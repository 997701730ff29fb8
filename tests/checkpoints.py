"""What tests of checkpoints share: small states, stores over them, and ways to damage what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cluster import attempt as attempts
from cluster import events
from configs.schema import Checkpoint
from trainer.checkpoint.store import Store
from trainer.distributed import World
from trainer.sharding.logical import Logical, logical

STATE: dict[str, Any] = {"step": 0, "tokens": 0, "data": {"rows": 0, "lanes": []}}


def begin(run: Path, world: World, name: str = "", **options: Any) -> Store:
    """The store of a new attempt; in line unless options say otherwise. name: the run's."""
    run.mkdir(exist_ok=True)
    return Store(
        run, world, attempts.begin(run), "ddp", Checkpoint(**{"asynchronous": False} | options), name
    )


def tensors(value: float = 0.0, rows: int = 5) -> dict[str, Logical]:
    whole = {"weight/a": torch.full((rows, 3), value), "exp_avg/a": torch.full((rows, 3), -value)}
    return {name: logical(tensor) for name, tensor in whole.items()}


def save(store: Store, *steps: int, **state: Any) -> None:
    for step in steps:
        store.save(step, tensors(float(step)), STATE | {"step": step} | state)


def loaded(store: Store) -> tuple[int, float] | None:
    """Step and first weight of what a resume takes up."""
    live = tensors()
    state = store.load(live)
    return None if state is None else (state["step"], live["weight/a"].pieces[0].tensor[0, 0].item())


def checkpoints(store: Store) -> Path:
    return store.run / "checkpoints"


def names(store: Store) -> list[str]:
    return sorted(path.name for path in checkpoints(store).iterdir())


def told(store: Store, kind: str) -> list[dict[str, Any]]:
    """Events of a kind."""
    return [event for event in events.read(store.run / "events.jsonl") if event["event"] == kind]


def flip_a_byte(path: Path) -> None:
    (file,) = path.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
