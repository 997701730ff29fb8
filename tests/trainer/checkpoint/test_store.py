from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from checkpoints import begin, checkpoints, flip_a_byte, loaded, names, save, tensors
from support import event_names

from cluster import attempt as attempts
from configs.schema import ConfigError
from trainer.checkpoint import manifest
from trainer.checkpoint.manifest import File, Manifest
from trainer.checkpoint.store import Store
from trainer.distributed import World
from trainer.sharding.logical import logical


def test_a_new_run_has_nothing_to_load(store: Store) -> None:
    assert store.load(tensors()) is None


def test_the_newest_checkpoint_is_loaded_into_the_live_tensors(store: Store) -> None:
    save(store, 3, 7)
    assert loaded(store) == (7, 7.0)


def test_only_the_newest_checkpoints_stay(store: Store) -> None:
    save(store, 1, 2, 3, 4, 10)
    assert names(store) == ["latest", "step-00000003", "step-00000004", "step-00000010"]
    assert (checkpoints(store) / "latest").readlink() == Path("step-00000010")


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
    damage(checkpoints(store) / "step-00000007")
    assert loaded(store) == (3, 3.0)
    assert event_names(store.run)[-1] == "checkpoint_damaged"
    assert any(name.startswith("step-00000007.damaged-") for name in names(store))


def test_nothing_is_started_over_when_every_checkpoint_is_damaged(store: Store) -> None:
    save(store, 3, 7)
    for name in ("step-00000003", "step-00000007"):
        flip_a_byte(checkpoints(store) / name)
    for _ in range(2):  # and not the second time either
        with pytest.raises(ConfigError, match="damaged"):
            store.load(tensors())


def test_a_checkpoint_of_another_model_is_refused_and_kept(store: Store) -> None:
    save(store, 3)
    with pytest.raises(ConfigError, match=r"weight/a is \[5, 3\] there and \[4, 3\] here"):
        store.load({"weight/a": logical(torch.zeros(4, 3)), "exp_avg/a": logical(torch.zeros(5, 3))})
    with pytest.raises(ConfigError, match="weight/b is absent there"):
        store.load(tensors() | {"weight/b": logical(torch.zeros(1))})
    with pytest.raises(ConfigError, match=r"exp_avg/a is \[5, 3\] there and absent here"):
        store.load({"weight/a": logical(torch.zeros(5, 3))})
    assert loaded(store) == (3, 3.0)


def test_a_zombie_of_an_older_attempt_cannot_commit(store: Store) -> None:
    save(store, 3)
    attempts.begin(store.run)
    with pytest.raises(attempts.Fenced):
        save(store, 5)
    assert names(store) == ["latest", "step-00000003"]


def test_what_a_killed_save_left_behind_is_ignored_and_swept(store: Store) -> None:
    save(store, 3)
    shutil.copytree(checkpoints(store) / "step-00000003", checkpoints(store) / ".step-00000009.attempt-1")
    assert loaded(store) == (3, 3.0)
    save(store, 5)
    assert names(store) == ["latest", "step-00000003", "step-00000005"]


def test_a_crash_before_latest_moved_is_made_up_for_when_the_run_resumes(store: Store) -> None:
    save(store, 3, 7)
    latest = checkpoints(store) / "latest"
    latest.unlink()
    latest.symlink_to("step-00000003")
    assert loaded(store) == (7, 7.0)
    assert latest.readlink() == Path("step-00000007")


def test_an_error_of_the_file_system_is_no_damage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 3)

    def fails(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(manifest.File, "of", fails)
        with pytest.raises(OSError, match="Input/output error"):
            store.load(tensors())
    assert loaded(store) == (3, 3.0)


def test_runs_that_save_to_one_directory_leave_each_other_alone(world: World, tmp_path: Path) -> None:
    shared = {"directory": str(tmp_path / "shared"), "keep_last": 1}
    one, other = (begin(tmp_path / name, world, name, **shared) for name in ("one", "other"))
    save(one, 1000)
    save(other, 10, 20)
    assert (loaded(one), loaded(other)) == ((1000, 1000.0), (20, 20.0))


def test_a_place_that_is_empty_all_at_once_starts_nothing_over(world: World, tmp_path: Path) -> None:
    directory = tmp_path / "mounted"
    save(begin(tmp_path / "run", world, directory=str(directory)), 3)
    directory.rename(tmp_path / "unmounted")
    with pytest.raises(ConfigError, match="empty, though this run has saved step-00000003: is it mounted"):
        loaded(begin(tmp_path / "run", world, directory=str(directory)))


def test_a_new_checkpoint_stays_below_ones_that_cannot_be_used(store: Store, world: World) -> None:
    save(store, 26, 30)
    save(begin(store.run, world, keep_last=2), 25)
    assert "step-00000025" in names(store)


def test_every_flipped_bit_of_a_manifest_is_found(store: Store) -> None:
    save(store, 3)
    content = (checkpoints(store) / "step-00000003" / "manifest.json").read_bytes()
    whole = Manifest.parse(content)
    for place in range(len(content)):
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        try:
            assert Manifest.parse(flipped) == whole
        except ValueError:
            continue


def rewrite_manifest(path: Path) -> None:
    """Let the manifest say that the files are as they should be."""
    whole = Manifest.read(path)
    values = asdict(whole) | {"files": [File.of(path / file.name) for file in whole.files]}
    Manifest(**values).write(path)


class Hostile:
    """When unpickled, makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle_is_refused_before_it_runs(store: Store, tmp_path: Path) -> None:
    save(store, 3)
    path = checkpoints(store) / "step-00000003"
    (path / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    rewrite_manifest(path)
    with pytest.raises(ConfigError, match="mkdir does not belong in a checkpoint"):
        store.load(tensors())
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_an_older_version_is_loaded(store: Store) -> None:
    save(store, 3)
    path = checkpoints(store) / "step-00000003" / "manifest.json"
    values = json.loads(path.read_text())
    del values["time"], values["sha256"]
    path.write_text(json.dumps(values))
    assert loaded(store) == (3, 3.0)


def test_a_step_that_is_reached_again_replaces_its_checkpoint(store: Store, world: World) -> None:
    save(store, 3, 7)
    again = begin(store.run, world)
    again.save(7, tensors(70.0), {"step": 7})
    assert loaded(again) == (7, 70.0)
    assert names(store) == ["latest", "step-00000003", "step-00000007"]
