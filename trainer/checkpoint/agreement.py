"""What one rank fails at, all ranks fail at, together and with the same error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from trainer.checkpoint.places import Away
from trainer.distributed import World

RETRY_SECONDS = 300.0
"""How long an object store may be away before a checkpoint is given up."""
LONGEST_PAUSE_SECONDS = 30.0

T = TypeVar("T")


def everywhere(world: World, action: Callable[[], T]) -> list[T]:
    """Run an action on every rank; every rank gets all results in rank order, or the first rank's error."""
    outcomes = world.gather(_outcome(action))
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [result for result, _ in outcomes]


def on_main(world: World, action: Callable[[], T]) -> T:
    """Run an action on rank 0; every rank gets its result or its error."""
    result, failure = world.from_main(_outcome(action) if world.main else None)
    if failure is not None:
        raise failure
    found: T = result
    return found


def insist(
    world: World, action: Callable[[], T], delayed: Callable[[Away], None], overtaken: threading.Event
) -> T:
    """Run an action on every rank, again and again while a store is Away, at most for RETRY_SECONDS.

    The action fails on all ranks or on none. delayed: told once, on rank 0, that it takes longer.
    overtaken: set when a newer checkpoint waits for this one, which is then given up.
    """
    began, pause_seconds = time.monotonic(), 1.0
    while True:
        try:
            return action()
        except Away as error:
            if world.from_main(overtaken.is_set() or time.monotonic() - began >= RETRY_SECONDS):
                raise
            if world.main and pause_seconds == 1.0:
                delayed(error)
        overtaken.wait(pause_seconds)
        pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)


def cause(failure: CheckpointException) -> Exception:
    """The first rank's error in that of all of them."""
    causes = [found for found, _ in failure.failures.values() if isinstance(found, Exception)]
    return causes[0] if causes else RuntimeError(str(failure))


def _outcome(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error
