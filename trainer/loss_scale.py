"""The factor of the loss that keeps fp16 gradients from vanishing."""

from __future__ import annotations

from configs.schema import Precision
from trainer.sharding import Progress


class LossScale:
    """Halved when gradients overflow, doubled after a number of steps without (Micikevicius et al. 2017)."""

    def __init__(self, initial: float, steps: int) -> None:
        """steps: without overflow, after which the scale is doubled."""
        self.scale = initial
        self.steps_at_scale = 0
        self._steps = steps

    def update(self, finite: bool) -> None:
        """Take note of a step, whose gradients were all finite or not."""
        if not finite:
            self.scale, self.steps_at_scale = self.scale / 2, 0
            return
        self.steps_at_scale += 1
        if self.steps_at_scale >= self._steps:
            self.scale, self.steps_at_scale = self.scale * 2, 0

    def loaded(self, progress: Progress) -> None:
        """Go on with the scale of a checkpoint, if it has one: it may be of a run in another format."""
        if progress.loss_scale is not None:
            self.scale, self.steps_at_scale = progress.loss_scale, progress.steps_at_scale


def loss_scale_of(precision: Precision) -> LossScale | None:
    """None where gradients need no scale."""
    if precision.compute != "fp16":
        return None
    return LossScale(precision.loss_scale, precision.loss_scale_steps)
