from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import event_names

from cluster import attempt as attempts
from configs.schema import ConfigError
from trainer.checkpoint import manifest
from trainer.checkpoint.store import Store
from trainer.distributed import World

STATE = {"step": 0, "tokens": 0, "data": {"rows": 0, "lanes": []}}


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
    return Store(tmp_path, world, attempts.begin(tmp_path), "ddp", keep_last=3)


def tensors(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"weight/a": torch.full((5, 3), value), "exp_avg/a": torch.full((5, 3), -value)}


def save(store: Store, *steps: int) -> None:
    for step in steps:
        store.save(step, tensors(float(step)), STATE | {"step": step})


def names(store: Store) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


def loaded(store: Store) -> tuple[int, float]:
    """Step and first weight of what a resume takes up."""
    live = tensors()
    state = store.load(live)
    assert state is not None
    return state["step"], live["weight/a"][0, 0].item()


def test_a_new_run_has_nothing_to_load(store: Store) -> None:
    assert store.load(tensors()) is None


def test_the_newest_checkpoint_is_loaded_into_the_live_tensors(store: Store) -> None:
    save(store, 3, 7)
    assert loaded(store) == (7, 7.0)


def test_only_the_newest_checkpoints_stay(store: Store) -> None:
    save(store, 1, 2, 3, 4, 10)
    assert names(store) == ["latest", "step-00000003", "step-00000004", "step-00000010"]
    assert (store.directory / "latest").readlink() == Path("step-00000010")


def flip_a_byte(path: Path) -> None:
    (file,) = path.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def delete_a_file(path: Path) -> None:
    next(path.glob("*.distcp")).unlink()


def truncate_the_manifest(path: Path) -> None:
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text()[:40])


def lose_the_state(path: Path) -> None:
    (path / "state.json").write_text("{}")


DAMAGES = [flip_a_byte, delete_a_file, truncate_the_manifest, lose_the_state]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(store: Store, damage: object) -> None:
    save(store, 3, 7)
    assert callable(damage)
    damage(store.directory / "step-00000007")
    assert loaded(store) == (3, 3.0)
    assert event_names(store.run)[-1] == "checkpoint_damaged"
    assert any(name.startswith("step-00000007.damaged-") for name in names(store))


def test_nothing_is_started_over_when_every_checkpoint_is_damaged(store: Store) -> None:
    save(store, 3, 7)
    for name in ("step-00000003", "step-00000007"):
        flip_a_byte(store.directory / name)
    for _ in range(2):  # and not the second time either
        with pytest.raises(ConfigError, match="damaged"):
            store.load(tensors())


def test_a_checkpoint_of_another_model_is_refused_and_kept(store: Store) -> None:
    save(store, 3)
    with pytest.raises(ConfigError, match=r"weight/a is \[5, 3\] there and \[4, 3\] here"):
        store.load({"weight/a": torch.zeros(4, 3), "exp_avg/a": torch.zeros(5, 3)})
    assert loaded(store) == (3, 3.0)


def test_a_zombie_of_an_older_attempt_cannot_commit(store: Store) -> None:
    save(store, 3)
    attempts.begin(store.run)
    with pytest.raises(attempts.Fenced):
        save(store, 5)
    assert names(store) == ["latest", "step-00000003"]


def test_what_a_killed_save_left_behind_is_ignored_and_swept(store: Store) -> None:
    save(store, 3)
    shutil.copytree(store.directory / "step-00000003", store.directory / ".step-00000009.attempt-1")
    assert loaded(store) == (3, 3.0)
    save(store, 5)
    assert names(store) == ["latest", "step-00000003", "step-00000005"]


def test_a_crash_before_latest_moved_is_made_up_for_when_the_run_resumes(store: Store) -> None:
    save(store, 3, 7)
    latest = store.directory / "latest"
    latest.unlink()
    latest.symlink_to("step-00000003")
    assert loaded(store) == (7, 7.0)
    assert latest.readlink() == Path("step-00000007")


def test_an_error_of_the_file_system_is_no_damage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 3)

    def fails(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(manifest.File, "of", fails)
        with pytest.raises(OSError, match="Input/output error"):
            store.load(tensors())
    assert loaded(store) == (3, 3.0)
