"""`trainyard checkpoint ls|verify`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import begin, checkpoints, flip_a_byte, save
from support import Site

from cluster import exit_codes
from configs.compose import compose
from trainer.checkpoint.__main__ import main
from trainer.checkpoint.store import Store
from trainer.distributed import World


@pytest.fixture
def store(site: Site, tmp_path: Path, world: World) -> Store:
    """A run with checkpoints of steps 3 and 7, and a durable place that has 7 only."""
    run, durable = tmp_path / "run", tmp_path / "durable"
    config = compose([*site.overrides(8), f"checkpoint.durable={durable}"], None)
    store = begin(run, world)
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    save(store, 3)
    store = begin(run, world, durable=str(durable))
    save(store, 7, tokens=112)
    store.close()
    return store


def checkpoint(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of the program."""
    monkeypatch.setattr(sys, "argv", ["checkpoint", *map(str, arguments)])
    monkeypatch.setattr("trainer.checkpoint.__main__.die_with_parent", lambda: None)
    return main()


def test_ls_shows_every_checkpoint_of_every_place(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert checkpoint(monkeypatch, "ls", store.run, "--json") == exit_codes.DONE
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(row["step"], row["place"]) for row in rows] == [
        (7, str(checkpoints(store))),
        (7, str(tmp_path / "durable")),
        (3, str(checkpoints(store))),
    ]
    assert {row["problem"] for row in rows} == {None}
    assert rows[0]["tokens"] == 112
    assert rows[0]["world_size"] == 1
    assert rows[0]["strategy"] == "ddp"
    assert rows[0]["bytes"] > 0
    assert checkpoint(monkeypatch, "ls", store.run) == exit_codes.DONE
    assert "strategy" in capsys.readouterr().out


def test_ls_tells_what_sizes_give_away(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoints(store) / "step-00000003" / ".metadata").unlink()
    assert checkpoint(monkeypatch, "ls", store.run, "--json", "--step", 3) == exit_codes.DONE
    (row,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert row["problem"] == ".metadata is missing"


def test_verify_reads_every_byte_and_names_each_damaged_one(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoint(monkeypatch, "verify", store.run) == exit_codes.DONE
    assert capsys.readouterr().out.count(": whole") == 3
    path = checkpoints(store) / "step-00000003"
    flip_a_byte(path)
    assert checkpoint(monkeypatch, "verify", store.run) == exit_codes.BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"trainyard: {path}: damaged: __0_0.distcp does not match its checksum"
    assert path.is_dir()  # looking changes nothing


def test_a_step_that_is_not_there_is_a_mistake(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoint(monkeypatch, "verify", store.run, "--step", 5) == exit_codes.BAD_INPUT
    assert "--step=5: " in capsys.readouterr().err
