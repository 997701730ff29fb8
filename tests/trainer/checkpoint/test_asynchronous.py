from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from checkpoints import STATE, begin, checkpoints, loaded, names, save, told

from cluster import attempt as attempts
from trainer.checkpoint.store import Store
from trainer.distributed import World
from trainer.sharding.logical import logical

MEBIBYTE = 2**18
"""Numbers of 4 bytes."""


@pytest.fixture
def store(tmp_path: Path, world: World) -> Store:
    return begin(tmp_path, world, asynchronous=True)


def test_what_is_saved_are_the_values_of_the_step_and_not_later_ones(store: Store) -> None:
    live = torch.zeros(20, MEBIBYTE)
    for step in (1, 2, 3):
        live.fill_(step)
        store.save(step, {"weight/a": logical(live)}, STATE | {"step": step})
        live.fill_(-1)
    store.close()
    state = store.load({"weight/a": logical(live)})
    assert state is not None
    assert state["step"] == 3
    assert live.unique().tolist() == [3.0]


def test_a_checkpoint_exists_once_the_store_is_closed(store: Store) -> None:
    save(store, 3)
    store.close()
    assert names(store) == ["latest", "step-00000003"]
    assert loaded(store) == (3, 3.0)


def test_the_loop_waits_for_the_copy_and_the_event_says_how_long(store: Store) -> None:
    live = {"weight/a": logical(torch.zeros(40, MEBIBYTE))}
    store.save(1, live, STATE)
    store.save(2, live, STATE)
    store.close()
    first, second = told(store, "checkpoint")
    assert first["stall_seconds"] < first["seconds"]
    assert first["bytes"] > 40 * 2**20
    (waited,) = told(store, "checkpoint_waited")  # the second came while the first was being written
    assert 0 < waited["seconds"] <= second["stall_seconds"]


def test_a_failure_in_the_background_is_raised_by_the_next_save(store: Store) -> None:
    save(store, 3)
    store.close()
    attempts.begin(store.run)
    save(store, 5)
    with pytest.raises(attempts.Fenced):
        save(store, 7)
    assert names(store) == ["latest", "step-00000003"]


def test_a_failure_in_the_background_shows_before_the_next_save(store: Store) -> None:
    attempts.begin(store.run)
    assert not store.failed
    save(store, 5)
    store._background._thread.join()  # type: ignore[union-attr]
    assert store.failed


def test_closing_raises_what_befell_the_last_checkpoint(store: Store) -> None:
    attempts.begin(store.run)
    save(store, 5)
    with pytest.raises(attempts.Fenced):
        store.close()


def test_the_same_host_memory_serves_every_checkpoint(store: Store) -> None:
    staging = store._staging
    assert staging is not None
    save(store, 1)
    before = {key: buffer.data_ptr() for key, buffer in staging._buffers.items()}
    save(store, 2)
    assert {key: buffer.data_ptr() for key, buffer in staging._buffers.items()} == before
    store.close()


def test_nothing_runs_beside_training_when_it_is_not_asked_for(tmp_path: Path, world: World) -> None:
    in_line = begin(tmp_path, world, asynchronous=False)
    threads = threading.active_count()
    save(in_line, 3)
    assert threading.active_count() == threads
    assert (checkpoints(in_line) / "step-00000003" / "manifest.json").exists()
