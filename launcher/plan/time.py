"""How long does it take? Step time from arithmetic alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import numpy as np

from configs.schema import Config
from launcher.plan.budget import TokenBudget
from launcher.plan.flops import flops_per_token, recomputed_flops_per_token
from launcher.plan.memory import on_gpu
from launcher.plan.shape import Shape

SECONDS_PER_DAY = 86400


@dataclass(frozen=True)
class Time:
    """Planned pace of a run; every field is null where the hardware's peak is unknown."""

    step_seconds: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    """Model FLOPs over the accelerators' peak; null on CPU, which has no published peak."""
    days: float | None = None
    seconds: float | None = None
    bound_by: str | None = None


def planned_time(shape: Shape, config: Config, budget: TokenBudget) -> Time:
    """Step seconds = FLOPs of a step, recomputation included, / (world size x peak x efficiency)."""
    peak = rank_flops_per_second(config)
    if peak is None:
        return Time()
    per_token = flops_per_token(shape)
    spent_per_token = per_token + recomputed_flops_per_token(shape, config.activation_checkpointing)
    step_seconds = (
        spent_per_token * budget.global_batch_tokens / (config.world_size * peak * config.hardware.efficiency)
    )
    seconds = step_seconds * budget.steps
    return Time(
        step_seconds=step_seconds,
        tokens_per_second=budget.global_batch_tokens / step_seconds,
        mfu=config.hardware.efficiency * per_token / spent_per_token if on_gpu(config.hardware) else None,
        days=seconds / SECONDS_PER_DAY,
        seconds=seconds,
        bound_by="compute",
    )


def rank_flops_per_second(config: Config) -> float | None:
    """Peak of one rank in the configured format; on CPU a rank's share of this machine, timed."""
    published_tflops: float | None = getattr(config.hardware.peak_tflops, config.precision.compute)
    if published_tflops is not None:
        return published_tflops * 1e12
    if on_gpu(config.hardware):
        return None
    return machine_flops_per_second() / config.gpus_per_node


@cache
def machine_flops_per_second() -> float:
    """Fastest of several float32 matrix products on all cores of this machine."""
    size, tries = 1024, 4
    matrix = np.ones((size, size), np.float32)
    fastest_seconds = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        matrix @ matrix
        fastest_seconds = min(fastest_seconds, time.perf_counter() - start)
    return 2 * size**3 / fastest_seconds
