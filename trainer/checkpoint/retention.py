"""Which checkpoints stay."""

from __future__ import annotations

import math
from collections.abc import Iterable

from configs.schema import Checkpoint
from trainer.checkpoint.places import Away, Place


class Retention:
    """The newest, those at round steps, and the best by a metric; at one place."""

    def __init__(self, place: Place, options: Checkpoint) -> None:
        self._place, self._options = place, options
        self._values: dict[int, float] = {}

    def kept(self, needed: Iterable[int] = ()) -> set[int]:
        """Steps of the checkpoints that stay, of those that exist; `needed` ones stay as well."""
        steps = self._place.steps()
        every = self._options.keep_every_steps
        kept = set(steps[: self._options.keep_last]) | (set(steps) & set(needed))
        kept |= {step for step in steps if every is not None and step % every == 0}
        if self._options.keep_best is not None:
            values = {step: self._value(step, self._options.keep_best) for step in steps}
            # Several may carry the same evaluation: the oldest is nearest to the weights it was made with.
            best = min((value, step) for step, value in values.items())
            kept |= {best[1]} if math.isfinite(best[0]) else set()
        return kept

    def forget(self, step: int) -> None:
        """The checkpoint of this step has been written anew."""
        self._values.pop(step, None)

    def _value(self, step: int, metric: str) -> float:
        """Value of a metric when a checkpoint was saved; infinite where it was not known."""
        if step not in self._values:
            try:
                found = self._place.state(self._place.manifest(step)).get("evaluation") or {}
            except (ValueError, FileNotFoundError):
                return math.inf
            except Away as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    return math.inf
                raise
            value = found.get(metric)
            self._values[step] = value if value is not None and math.isfinite(value) else math.inf
        return self._values[step]
