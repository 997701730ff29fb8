"""Save and load the checkpoints of a run, at the places that its configuration names."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from cluster import events
from configs.schema import Checkpoint, ConfigError
from trainer.checkpoint import manifest
from trainer.checkpoint.agreement import cause, everywhere, insist, on_main
from trainer.checkpoint.background import Background
from trainer.checkpoint.copying import Copier
from trainer.checkpoint.loading import newest_whole
from trainer.checkpoint.places import Away, Directory, Place, places_of, sync
from trainer.checkpoint.planner import Loading
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.staging import Staging
from trainer.checkpoint.writing import Identity, Target
from trainer.distributed import World
from trainer.sharding.logical import Logical

LONGEST_WRITE = timedelta(hours=4)
"""How long a rank waits for others that read or write; a rank that dies ends the wait at once."""


class Store:
    """The checkpoints of a run as one attempt of it sees them.

    Every method is called by all ranks, at the same boundary between two steps.
    """

    def __init__(
        self, run: Path, world: World, attempt: int, strategy: str, options: Checkpoint, name: str = ""
    ) -> None:
        """strategy: told in manifests. name: the run's, of its folder at places that runs may share.

        Raises ConfigError for a place that cannot be opened.
        """
        self.run, self.world = run, world
        self._who = Identity(run, attempt, strategy)
        self.place, *second = places_of(run, options, name)
        self._staging = Staging() if options.asynchronous else None
        self._background = Background("checkpoints")
        self._overtaken = threading.Event()
        self._missing = ""
        self._patient = _apart(world)
        self._target = Target(
            self.place,
            self._patient,
            self._who,
            Retention(self.place, options),
            announce=lambda step: self._point_latest_to(self.place, step),
            needed=lambda: self._copier.needed if self._copier is not None else set(),
        )
        self._copier: Copier | None = None
        if second:
            target = Target(second[0], _apart(world), self._who, Retention(second[0], options))
            self._copier = Copier(self.place, target)

    @property
    def failed(self) -> bool:
        """Whether something went wrong in the background that the next call of `save` raises."""
        return self._background.failed

    def save(self, step: int, tensors: dict[str, Logical], state: dict[str, Any]) -> None:
        """Save the checkpoint of `step`; asynchronously, its tensors may change as soon as this returns.

        tensors: live logical state, each rank its part. state: JSON values, rank 0's are written.
        The checkpoint exists only when it is whole. On every rank raises what befell it or, asynchronously,
        the one before: NoSpace, Fenced or the writer's error. A store that is Away is no error: an event
        tells, and the next checkpoint tries anew.
        """
        began = time.monotonic()
        busy = self._background.busy
        self._overtaken.set()
        self._background.wait()
        self._overtaken.clear()
        if busy and self.world.main:
            self._tell("checkpoint_waited", step=step, seconds=round(time.monotonic() - began, 3))
        own = {name: tensor.own() for name, tensor in tensors.items()}
        if self._staging is None:
            self._write(step, own, state, began, None)
            return
        own = self._staging.copy(own)
        stall_seconds = time.monotonic() - began
        self._background.start(lambda: self._write(step, own, state, began, stall_seconds))

    def close(self) -> None:
        """Wait for what is under way. Raises Away if the last checkpoint could not be saved at all."""
        self._background.wait()
        if self._copier is not None:
            self._copier.wait()
        if self._missing:
            raise Away(self._missing)

    def load(self, tensors: dict[str, Logical]) -> dict[str, Any] | None:
        """Fill `tensors` from the newest whole checkpoint; returns its state, or None for a new run.

        Damaged checkpoints are set aside with an event. Raises ConfigError if damaged ones are all there
        are, or if the checkpoint is of another model; nothing is overwritten then.
        """
        places = [self.place] + ([self._copier.place] if self._copier is not None else [])
        world = self._patient  # a rank may read a large file for longer than the loop's messages may take
        found = newest_whole(places, world, self.run)
        if found is None:
            return None
        place, whole = found.place, found.manifest
        if differs := manifest.difference(whole.tensors, manifest.shapes(tensors)):
            raise ConfigError(f"{place.at(whole.step)}: a checkpoint of another model: {differs}")
        # A crash may have come between the checkpoint and the link to it.
        on_main(world, lambda: self._point_latest_to(place, whole.step))
        reader = place.reader(whole)
        everywhere(world, lambda: bool(reader.read_metadata()))  # torch's load passes over its errors
        try:
            load(tensors, storage_reader=reader, planner=Loading(), process_group=world.host)
        except CheckpointException as error:  # no Exception in torch's hierarchy
            raise cause(error) from error
        state: dict[str, Any] = on_main(world, lambda: place.state(whole))
        return state

    def _write(
        self, step: int, own: dict[str, Logical], state: dict[str, Any], began: float, stalled: float | None
    ) -> None:
        """Write a checkpoint and tell so; on every rank, in the background or not."""
        if self.world.device.type == "cuda":
            torch.cuda.set_device(self.world.device)  # that of a new thread is the first
        copier, world = self._copier, self._target.world
        path = self.place.at(step)

        def delayed(error: Away) -> None:
            self._tell("checkpoint_delayed", step=step, reason=str(error), path=path)

        try:
            whole, files = insist(
                world, lambda: self._target.write(step, own, state), delayed, self._overtaken
            )
        except Away as error:
            self._missing = str(error)
            if world.main:
                self._tell("checkpoint_failed", step=step, reason=str(error), path=path)
            return
        self._missing = ""
        if copier is not None:
            copier.add(whole, files)
        if world.main:
            seconds = time.monotonic() - began
            self._tell(
                "checkpoint",
                step=step,
                seconds=round(seconds, 3),
                stall_seconds=round(seconds if stalled is None else stalled, 3),
                bytes=whole.size_bytes,
                path=path,
            )

    def _point_latest_to(self, place: Place, step: int) -> None:
        """Move RUN/checkpoints/latest, by which everybody knows how far the run has come."""
        directory = self.run / "checkpoints"
        directory.mkdir(exist_ok=True)
        local = isinstance(place, Directory) and place.path == directory.absolute()
        link = directory / f".latest.attempt-{self._who.attempt}"
        link.unlink(missing_ok=True)
        link.symlink_to(f"step-{step:08d}" if local else place.at(step))
        link.replace(directory / "latest")
        sync(directory)

    def _tell(self, event: str, **fields: object) -> None:
        events.record(self.run, event, **fields)


def _apart(world: World) -> World:
    """The same ranks with a group of their own for messages, which a thread beside training may use."""
    host = dist.new_group(backend="gloo", timeout=LONGEST_WRITE)
    assert host is not None
    return replace(world, host=host)
