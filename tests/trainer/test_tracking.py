from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import wandb
from support import Site, event_names
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from configs.compose import compose
from launcher.freeze import freeze
from launcher.plan.plan import make_plan
from trainer import tracking
from trainer.tracking import Metrics

ROW = {"tokens": 128, "loss": 2.5, "mfu": None}


def prepared(site: Site, *overrides: str) -> tuple[Path, Any]:
    config = compose([*site.overrides(), *overrides])
    run = freeze(config, make_plan(config))
    return run, config


def offline_records(directory: Path) -> list[wandb_internal_pb2.Record]:
    """What `wandb sync` would send: a LevelDB log after a header of 7 bytes, a protobuf in each record."""
    (file,) = directory.glob("*.wandb")
    data, offset, parts, records = file.read_bytes(), 7, b"", []
    while offset + 7 <= len(data):
        left_in_block = 32768 - offset % 32768
        if left_in_block < 7:
            offset += left_in_block
            continue
        length, kind = struct.unpack_from("<HB", data, offset + 4)
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # the whole record, or the last part of one
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def test_an_interrupted_run_goes_on_in_the_same_wandb_run(site: Site) -> None:
    overrides = [*site.overrides(), "tracker=wandb", "tracker.mode=offline", "run.name=curious"]
    run = site.root / "run"
    assert site.trainyard("train", *overrides, "checkpoint.every_steps=4").returncode == 0
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "step-00000008").rename(run / "gone")
    (run / "checkpoints" / "latest").symlink_to("step-00000004")
    assert site.trainyard("resume", str(run)).returncode == 0

    directories = sorted((run / "wandb").glob("offline-run-*"))
    assert len(directories) == 2
    assert {path.name.rsplit("-", 1)[1] for path in directories} == {(run / "wandb-run-id").read_text()}

    records = offline_records(directories[0])
    logged = {item.key for record in records for item in record.run.config.update}
    assert {"optimizer", "plan", "git"} <= logged
    steps = [record.history.step.num for record in records if record.HasField("history")]
    assert steps == list(range(9))


def test_a_dead_wandb_server_leaves_an_offline_run(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "ONLINE_START_SECONDS", 3)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    run, config = prepared(site, "tracker=wandb", "tracker.mode=online")
    metrics = Metrics(run, config, step=-1)
    metrics.log({"step": 1, **ROW})
    metrics.close()
    wandb.teardown()

    assert event_names(run) == ["tracker_offline"]
    (directory,) = (run / "wandb").glob("offline-run-*")
    assert any(record.HasField("history") for record in offline_records(directory))
    assert json.loads((run / "metrics.jsonl").read_text())["loss"] == 2.5


def test_tensorboard_gets_every_number(site: Site) -> None:
    run, config = prepared(site, "tracker=tensorboard")
    metrics = Metrics(run, config, step=-1)
    for step in (1, 2):
        metrics.log({"step": step, **ROW})
    metrics.close()

    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    assert [(event.step, event.value) for event in accumulator.Scalars("loss")] == [(1, 2.5), (2, 2.5)]


def test_rows_that_will_be_trained_again_are_forgotten(site: Site) -> None:
    run, config = prepared(site)
    rows = [{"step": step, "loss": float(step)} for step in range(1, 6)]
    torn = '{"step": 6, "lo'
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    Metrics(run, config, step=3).close()
    assert [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] == rows[:3]
