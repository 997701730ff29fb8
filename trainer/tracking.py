"""Where metrics go: always RUN/metrics.jsonl, and a tracker if one is configured. Rank 0 only."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cluster import events
from configs.schema import Config

logger = logging.getLogger(__name__)

ONLINE_START_SECONDS = 30
FINISH_SECONDS = 60


class Tracker(Protocol):
    def log(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Appends rows to metrics.jsonl and passes them on; the tracker's troubles never reach the loop."""

    def __init__(self, run: Path, config: Config, step: int) -> None:
        self._run = run
        path = run / "metrics.jsonl"
        _forget_after(path, step)
        self._file = path.open("a")
        self._tracker: Tracker | None = None
        self._guarded(lambda: setattr(self, "_tracker", _tracker(run, config)))

    def log(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        logger.info("%s", "  ".join(f"{key} {value}" for key, value in row.items()))
        if self._tracker is not None:
            self._guarded(partial(self._tracker.log, row))

    def close(self) -> None:
        self._file.close()
        if self._tracker is not None:
            self._guarded(self._tracker.close)

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._tracker = None
            reason = f"{type(error).__name__}: {error}"[:300]
            events.record(self._run, "tracker_failed", reason=reason)


def _forget_after(path: Path, step: int) -> None:
    """Drop rows of steps that will be trained again, and a line that a crash left torn."""
    if not path.exists():
        return
    kept = [row for row in events.read(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    temporary.replace(path)


def _tracker(run: Path, config: Config) -> Tracker | None:
    match config.tracker.kind:
        case "wandb" if config.tracker.mode != "disabled":
            return Wandb(run, config)
        case "tensorboard":
            return TensorBoard(run)
    return None


class Wandb:
    """Weights & Biases. The run's id is kept in the run directory, so a resumed run goes on in it."""

    def __init__(self, run: Path, config: Config) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        id_file = run / "wandb-run-id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        frozen = {name: _json(run / name) for name in ("plan.json", "frozen/git.json")}
        arguments: dict[str, Any] = {
            "id": id_file.read_text().strip(),
            "name": config.run.name,
            "project": config.tracker.project,
            "entity": config.tracker.entity,
            "dir": str(run),
            "config": config.model_dump() | {"plan": frozen["plan.json"], "git": frozen["frozen/git.json"]},
            "settings": wandb.Settings(
                init_timeout=ONLINE_START_SECONDS, finish_timeout=FINISH_SECONDS, console="off"
            ),
        }
        try:
            self._run = wandb.init(mode=config.tracker.mode, resume="allow", **arguments)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:300]
            events.record(run, "tracker_offline", reason=reason)
            wandb.teardown()
            self._run = wandb.init(mode="offline", **arguments)

    def log(self, row: dict[str, Any]) -> None:
        self._run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / "tensorboard"))

    def log(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        self._writer.close()


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
