"""Save, find, verify and load the checkpoints of a run."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from cluster import attempt as attempts
from cluster import events
from configs.schema import ConfigError
from trainer.checkpoint import manifest
from trainer.checkpoint.manifest import File, Manifest
from trainer.distributed import World


class NoSpace(OSError):
    """The run directory's file system cannot hold the checkpoint. Its text is one line."""


@dataclass(frozen=True)
class Store:
    """RUN/checkpoints as one attempt of a run sees it."""

    run: Path
    world: World
    attempt: int
    strategy: str
    keep_last: int

    @property
    def directory(self) -> Path:
        return self.run / "checkpoints"

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, which becomes visible only when it is whole on disk.

        tensors: live logical state, each rank its part. state: JSON values, rank 0's are written.
        Raises NoSpace or the writer's error on every rank; earlier checkpoints stay as they were.
        """
        began = time.monotonic()
        final = self.directory / f"step-{step:08d}"
        temporary = self.directory / f".step-{step:08d}.attempt-{self.attempt}"
        failure = None
        if self.world.main:
            shutil.rmtree(temporary, ignore_errors=True)
            failure = _failure(lambda: temporary.mkdir(parents=True))
        self._agree(failure, temporary, tensors)
        failure = _failure(lambda: self._write_tensors(temporary, tensors))
        written: list[File] = []
        if failure is None:
            own = sorted(temporary.glob(f"__{self.world.rank}_*"))
            own += [temporary / ".metadata"] if self.world.main else []
            written = [File.of(path) for path in own]
        files = self.world.gather((failure, written))
        failure = next((failure for failure, _ in files if failure), None)
        if failure is None and self.world.main:
            whole = [file for _, part in files for file in part]
            failure = _failure(lambda: self._commit(temporary, final, step, tensors, state, whole))
        self._agree(failure, temporary, tensors)
        if self.world.main:
            seconds = round(time.monotonic() - began, 3)
            events.record(self.run, "checkpoint", step=step, seconds=seconds, path=str(final))

    def load(self, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """Fill `tensors` from the newest whole checkpoint; returns its state, or None for a new run.

        A damaged checkpoint is renamed to step-N.damaged-TIME with an event, and the next older one is
        taken. Raises ConfigError if damaged ones are all there are, or if the checkpoint is of
        another model; nothing is overwritten then.
        """
        while path := self.world.from_main(self._newest() if self.world.main else None):
            problem = self._problem(path)
            if problem is None:
                break
            if self.world.main:
                aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
                path.rename(aside)
                events.record(self.run, "checkpoint_damaged", path=str(aside), reason=problem)
            self.world.barrier()
        if path is None:
            if damaged := list(self.directory.glob("*.damaged-*")):
                raise ConfigError(
                    f"{self.directory}: no whole checkpoint, {len(damaged)} damaged ones are set aside"
                )
            return None
        if self.world.main:  # a crash may have come between the checkpoint and the link to it
            self._point_latest_to(path)
        saved = Manifest.read(path)
        if differs := manifest.difference(saved.tensors, manifest.shapes(tensors)):
            raise ConfigError(f"{path}: a checkpoint of another model: {differs}")
        load(tensors, checkpoint_id=path, process_group=self.world.host)
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        return state

    def _write_tensors(self, temporary: Path, tensors: dict[str, Tensor]) -> None:
        writer = FileSystemWriter(temporary, single_file_per_rank=True, sync_files=True)
        save(tensors, storage_writer=writer, process_group=self.world.host)

    def _commit(
        self,
        temporary: Path,
        final: Path,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        files: list[File],
    ) -> None:
        (temporary / "state.json").write_text(json.dumps(state))
        files = [*files, File.of(temporary / "state.json")]
        shapes = manifest.shapes(tensors)
        Manifest(step, self.attempt, self.world.size, self.strategy, shapes, files).write(temporary)
        for path in (temporary / "state.json", temporary / manifest.NAME, temporary):
            _fsync(path)
        attempts.check(self.run, self.attempt)
        temporary.rename(final)
        _fsync(self.directory)
        self._point_latest_to(final)
        for old in _complete(self.directory)[self.keep_last :]:
            old.rename(old.with_name(f".{old.name}.old"))
        for leftover in self.directory.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _point_latest_to(self, checkpoint: Path) -> None:
        link = self.directory / f".latest.attempt-{self.attempt}"
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.name)
        link.replace(self.directory / "latest")
        _fsync(self.directory)

    def _agree(self, failure: Exception | None, temporary: Path, tensors: dict[str, Tensor]) -> None:
        """Raise rank 0's failure on every rank, the half-written directory removed."""
        if failure is not None and self.world.main:
            need_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            full = self._is_full(failure, need_bytes)
            shutil.rmtree(temporary, ignore_errors=True)
            if full:
                need, free = need_bytes / 2**30, shutil.disk_usage(self.run).free / 2**30
                space = f"no space left, a checkpoint needs {need:.3g} GiB and {free:.3g} are free"
                failure = NoSpace(errno.ENOSPC, f"{self.run}: {space}")
        failure = self.world.from_main(failure)
        if failure is not None:
            raise failure

    def _is_full(self, failure: Exception, need_bytes: int) -> bool:
        """Whether a full disk is behind a failure. torch hides ENOSPC behind an error of its own."""
        if isinstance(failure, OSError):
            return failure.errno in (errno.ENOSPC, errno.EDQUOT)
        return type(failure) is RuntimeError and shutil.disk_usage(self.run).free < need_bytes

    def _newest(self) -> Path | None:
        return next(iter(_complete(self.directory)), None)

    def _problem(self, path: Path) -> str | None:
        """What is wrong with a checkpoint; each rank reads its share of the files."""
        try:
            problem = Manifest.read(path).problem(path, self.world.rank, self.world.size)
        except ValueError as error:
            problem = str(error)
        return next(filter(None, self.world.gather(problem)), None)


def _complete(directory: Path) -> list[Path]:
    """Committed checkpoints, newest first."""
    found = [path for path in directory.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _failure(action: Callable[[], object]) -> Exception | None:
    """Run an action; return what it raised, the writer's wrapper opened."""
    try:
        action()
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values() if isinstance(cause, Exception)]
        return causes[0] if causes else RuntimeError(str(error))
    except Exception as error:
        return error
    return None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
