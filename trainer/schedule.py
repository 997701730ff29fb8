"""Learning rate as a function of the step."""

from __future__ import annotations

import math

from configs.schema import Schedule


def learning_rate(step: int, steps: int, peak: float, schedule: Schedule) -> float:
    """Learning rate of step `step` (0 is the first) of `steps`.

    Warm-up rises linearly and reaches the peak at its last step. After it, cosine and linear fall to
    final_ratio x peak at the last step; wsd (Hu et al. 2024) stays at the peak and falls linearly
    over the last decay_fraction of the steps.
    """
    warmup_steps = math.ceil(schedule.warmup_fraction * steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    decay_from = warmup_steps
    if schedule.kind == "wsd":
        decay_from = max(warmup_steps, steps - math.ceil(schedule.decay_fraction * steps))
    if step < decay_from:
        return peak
    progress = (step + 1 - decay_from) / max(1, steps - decay_from)
    fall = 0.5 * (1 - math.cos(math.pi * progress)) if schedule.kind == "cosine" else progress
    return peak * (1 - fall * (1 - schedule.final_ratio))
