"""The second tier: every checkpoint is copied to a durable place, by the ranks that wrote its files."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass

from cluster import events
from trainer.checkpoint.agreement import insist
from trainer.checkpoint.background import Background
from trainer.checkpoint.manifest import CHUNK_BYTES, File, Manifest
from trainer.checkpoint.places import Away, Place
from trainer.checkpoint.storage import Files
from trainer.checkpoint.writing import Target


@dataclass(frozen=True)
class _Task:
    manifest: Manifest
    own: list[File]


class Copier:
    """Copies checkpoints beside training, one at a time; those that newer ones overtake are passed over."""

    def __init__(self, source: Place, target: Target) -> None:
        self._source, self._target = source, target
        self._background = Background("checkpoint copies")
        self._tasks: list[_Task] = []
        self._changing = threading.Lock()

    @property
    def needed(self) -> set[int]:
        """The step that is being copied, which must stay at the source."""
        with self._changing:
            return {task.manifest.step for task in self._tasks[:1]}

    @property
    def place(self) -> Place:
        """Where the copies go."""
        return self._target.place

    def add(self, manifest: Manifest, own: list[File]) -> None:
        """Copy this checkpoint, of which this rank has written `own`; every rank adds it."""
        with self._changing:
            self._tasks.append(_Task(manifest, own))
            idle = len(self._tasks) == 1
        if idle:
            self._background.wait()
            self._background.start(self._run)

    def wait(self) -> None:
        """Until everything is copied or given up."""
        self._background.wait()

    def _run(self) -> None:
        while True:
            # Ranks learn of a checkpoint at slightly different times; they take the newest that all know.
            newest = min(self._target.world.gather(self._tasks[-1].manifest.step))
            with self._changing:
                self._tasks = [task for task in self._tasks if task.manifest.step >= newest]
            self._copy(self._tasks[0])
            with self._changing:
                del self._tasks[0]
                if not self._tasks:
                    return

    def _copy(self, task: _Task) -> None:
        step, began, place = task.manifest.step, time.monotonic(), self._target.place

        def delayed(error: Away) -> None:
            self._tell("checkpoint_delayed", step=step, reason=str(error), path=place.at(step))

        try:
            insist(self._target.world, lambda: self._publish(task), delayed, threading.Event())
        except Exception as error:  # the checkpoint itself is safe, and training does not depend on its copy
            self._tell("checkpoint_failed", step=step, reason=str(error), path=place.at(step))
            return
        seconds = round(time.monotonic() - began, 3)
        self._tell("checkpoint_copied", step=step, seconds=seconds, path=place.at(step))

    def _publish(self, task: _Task) -> None:
        source, place, attempt = self._source, self._target.place, self._target.who.attempt
        step = task.manifest.step

        def fill() -> list[File]:
            files = Files(place.fs, place.explain)
            if {file.name for file in task.own} - source.visible(task.manifest).keys():
                raise FileNotFoundError(source.at(step))
            for file in task.own:
                path = f"{place.draft(step, attempt)}/{file.name}"
                with (
                    source.explained(),
                    source.fs.open(f"{source.folder(task.manifest)}/{file.name}", "rb") as reading,
                    files.create_stream(path, "wb") as writing,
                ):
                    shutil.copyfileobj(reading, writing, CHUNK_BYTES)
                if files.written[path] != file:
                    raise OSError(f"{source.at(step)}: {file.name} has changed since it was written")
            return task.own

        self._target.publish(step, fill, lambda files: task.manifest)

    def _tell(self, event: str, **fields: object) -> None:
        if self._target.world.main:
            events.record(self._target.who.run, event, **fields)
