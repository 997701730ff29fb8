"""Finding the newest whole checkpoint over all places, and setting damaged ones aside."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cluster import attempt as attempts
from cluster import events
from configs.schema import Config, ConfigError
from trainer.checkpoint.agreement import everywhere, on_main
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.places import Away, Place, places_of
from trainer.distributed import World

LISTING_TRIES = 5
SCATTERED = "not every rank sees every file: the directory is not shared between nodes"


@dataclass(frozen=True)
class Found:
    """A whole checkpoint."""

    place: Place
    manifest: Manifest


def newest_whole(places: list[Place], world: World, run: Path) -> Found | None:
    """The newest whole checkpoint; of two of the same step that of the first place. None for a new run.

    Each rank verifies its share of the files. A damaged checkpoint is set aside with an event, and the
    next older one is taken. Raises ConfigError if that leaves none, Away if a place that may have one
    does not answer.
    """
    steps, away = on_main(world, lambda: _listed(places))
    if away is not None and world.main:
        events.record(run, "checkpoints_unknown", reason=str(away))
    scattered = None
    for step, number in steps:
        place = places[number]
        found = on_main(world, partial(_manifest, place, step))
        problem = found if isinstance(found, str) else _problem(place, found, world)
        if problem is None and isinstance(found, Manifest):
            return Found(place, found)
        if problem == SCATTERED:
            scattered = place.at(step)
            continue
        aside = on_main(world, partial(place.set_aside, step))
        if world.main:
            events.record(run, "checkpoint_damaged", path=aside, reason=problem)
    if away is not None:
        raise away
    if scattered is not None:
        raise ConfigError(f"{scattered}: {SCATTERED}")
    damaged = on_main(world, lambda: {place.address: place.damaged() for place in places})
    if any(damaged.values()):
        told = ", ".join(f"{address} ({count})" for address, count in damaged.items() if count)
        raise ConfigError(f"no whole checkpoint is left, damaged ones are set aside in {told}")
    if latest := on_main(world, lambda: attempts.newest_checkpoint(run)):
        told = " or ".join(place.address for place in places)
        raise ConfigError(
            f"{told}: empty, though this run has saved {latest}: is it mounted? To start over, remove "
            f"{run / 'checkpoints' / 'latest'}"
        )
    return None


def whole_checkpoint(run: Path, config: Config, step: int | None) -> Found:
    """The checkpoint of a step, by default the newest, verified by this process. Raises ConfigError."""
    everywhere = places_of(run, config.checkpoint, config.run.name or "")
    steps = [(known, place) for place in everywhere for known in place.steps() if step in (None, known)]
    if not steps:
        named = "a checkpoint" if step is None else f"step-{step:08d}"
        raise ConfigError(f"{run}: has no {named} in {', '.join(place.address for place in everywhere)}")
    newest, place = max(steps, key=lambda entry: entry[0])
    try:
        manifest = place.manifest(newest)
        problem = place.problem(manifest)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise ConfigError(f"{place.at(newest)}: damaged: {problem}")
    return Found(place, manifest)


def _listed(places: list[Place]) -> tuple[list[tuple[int, int]], Away | None]:
    """Step and place's number of each checkpoint, in the order to try them, and who did not answer."""
    found: list[tuple[int, int]] = []
    away = None
    for number, place in enumerate(places):
        for left in reversed(range(LISTING_TRIES)):
            try:
                found += [(step, number) for step in place.steps()]
                break
            except Away as error:
                if left == 0:
                    away = error
                else:
                    time.sleep(2.0 ** (LISTING_TRIES - left))
    return sorted(found, key=lambda entry: (-entry[0], entry[1])), away


def _manifest(place: Place, step: int) -> Manifest | str:
    """A manifest, or what is wrong with it."""
    try:
        return place.manifest(step)
    except ValueError as error:
        return str(error)


def _problem(place: Place, whole: Manifest, world: World) -> str | None:
    """What is wrong with a checkpoint's files; each rank reads its share."""
    wanted = {file.name for file in whole.files}
    views = everywhere(world, lambda: place.visible(whole).keys() & wanted)
    if missing := wanted - set().union(*views):
        return f"{min(missing)} is missing"
    if any(view != wanted for view in views):
        return SCATTERED
    problems = everywhere(world, lambda: place.problem(whole, world.rank, world.size))
    return next(filter(None, problems), None)
