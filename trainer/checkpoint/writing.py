"""How a checkpoint comes to exist: written by all ranks, seen by nobody before it is whole."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from cluster import attempt as attempts
from trainer.checkpoint import manifest
from trainer.checkpoint.agreement import cause, everywhere, on_main
from trainer.checkpoint.manifest import File, Manifest
from trainer.checkpoint.places import NoSpace, Place
from trainer.checkpoint.planner import Saving
from trainer.checkpoint.retention import Retention
from trainer.distributed import World
from trainer.sharding.logical import Logical


@dataclass(frozen=True)
class Identity:
    """Whose checkpoints these are."""

    run: Path
    attempt: int
    strategy: str


@dataclass(frozen=True)
class Target:
    """A place as all ranks of an attempt write to it."""

    place: Place
    world: World
    who: Identity
    retention: Retention
    announce: Callable[[int], None] = lambda step: None
    """Called on rank 0 when the checkpoint of a step exists, before older ones go."""
    needed: Callable[[], set[int]] = set
    """Steps that must not go yet."""

    def write(
        self, step: int, tensors: dict[str, Logical], state: dict[str, Any]
    ) -> tuple[Manifest, list[File]]:
        """Write a checkpoint. Returns its manifest, and the files that this rank has written.

        tensors: what this rank saves. state: JSON values, rank 0's are written.
        Collective; raises the same error on every rank, with earlier checkpoints as they were.
        """
        place, world, who = self.place, self.world, self.who
        own: list[File] = []

        def fill() -> list[File]:
            writer = place.writer(step, who.attempt)
            try:
                save(tensors, storage_writer=writer, planner=Saving(), process_group=world.host)
            except CheckpointException as error:  # no Exception in torch's hierarchy
                raise cause(error) from error
            own.extend(writer.written)
            if world.main:
                content = json.dumps(state).encode()
                place.put(f"{place.draft(step, who.attempt)}/state.json", content)
                own.append(File.of_bytes("state.json", content))
            return own

        def describe(files: list[File]) -> Manifest:
            shapes = manifest.shapes(tensors)
            return Manifest(step, who.attempt, world.size, who.strategy, shapes, files, time.time())

        try:
            return self.publish(step, fill, describe), own
        except NoSpace as error:
            need_gib = sum(4 * tensor.shape.numel() for tensor in tensors.values()) / 2**30
            text = f"{error.strerror}, a checkpoint needs {need_gib:.3g} GiB"
            raise NoSpace(errno.ENOSPC, text) from error

    def publish(
        self,
        step: int,
        fill: Callable[[], list[File]],
        describe: Callable[[list[File]], Manifest],
    ) -> Manifest:
        """Let a checkpoint exist once every rank has filled in its files; collective, and fails on all.

        fill: writes this rank's files into the draft. describe: the manifest of all ranks' files. Where
        ranks have disks of their own, one rank for each disk does there what rank 0 does on its own.
        """
        place, world, attempt = self.place, self.world, self.who.attempt

        def begin() -> bool:
            with place.explained():
                return place.begin(step, attempt)

        def commit(files: list[File]) -> Manifest:
            whole = describe(files)
            attempts.check(self.who.run, attempt)
            with place.explained():
                place.commit(whole)
            self.announce(whole.step)
            return whole

        everywhere(world, lambda: place.abandon(step, attempt))  # what a try before this one has left
        leads = on_main(world, begin) and world.main
        try:
            leads = everywhere(world, lambda: leads or begin())[world.rank]
            parts = everywhere(world, fill)
            whole = on_main(world, lambda: commit([file for part in parts for file in part]))
            everywhere(world, lambda: place.commit(whole) if leads and not world.main else None)
        except Exception:
            place.abandon(step, attempt)
            raise
        self.retention.forget(step)
        kept = on_main(world, lambda: self._kept(step))
        if kept is not None and (world.main or leads):
            with suppress(OSError, ValueError):  # old files are no reason to fail
                place.tidy(kept)
        return whole

    def _kept(self, step: int) -> set[int] | None:
        """Steps that stay; none if that cannot be known now, the next checkpoint will do."""
        with suppress(OSError, ValueError):
            return self.retention.kept({*self.needed(), step})
        return None
