"""Which way to run it is best? A search over strategy, micro batch, checkpointing and offload."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from configs.schema import Hardware
from launcher.plan.memory import Memory, memory
from launcher.plan.setup import Checkpointing, Offload, Setup, Strategy
from launcher.plan.shape import Shape
from launcher.plan.time import Calibration, StepTime, step_time

SIMPLEST_FIRST: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "fsdp_grad_op", "fsdp", "hsdp", "zero3")
DEEPSPEED: tuple[Strategy, ...] = ("zero1", "zero2", "zero3")
"""Strategies that need a package which not every machine has, so that sharding=auto leaves them out."""
OFFLOADS: dict[Strategy, tuple[Offload, ...]] = {
    "zero1": ("none", "optimizer"),
    "zero2": ("none", "optimizer"),
    "zero3": ("none", "optimizer", "all"),
    "fsdp": ("none", "all"),
}
"""What is offered; other strategies keep all states on the device."""
EQUAL = 0.02
"""Relative difference in step time below which the simpler strategy is preferred."""
ADVISED = 3
LARGEST_MICRO_BATCH = 256


@dataclass(frozen=True)
class Choice:
    """One way to run it, with its price."""

    setup: Setup
    memory: Memory
    time: StepTime

    @property
    def fits(self) -> bool:
        return self.memory.verdict != "does not fit"

    @property
    def native(self) -> bool:
        """Whether torch alone is enough."""
        return self.setup.strategy not in DEEPSPEED

    @property
    def seconds(self) -> float:
        """Seconds of a step; endless where the speed is unknown, so that order falls to simplicity."""
        return float("inf") if self.time.step_seconds is None else self.time.step_seconds


def choices(
    shape: Shape,
    base: Setup,
    global_batch: int,
    hardware: Hardware,
    calibration: Calibration | None = None,
) -> list[Choice]:
    """Every way to train the global batch on the ranks of `base`, whether it fits or not.

    Micro batches are the divisors of a rank's rows, so that accumulation is whole.
    """
    measured = calibration.get("reserved_over_active") if calibration else None
    return [
        Choice(
            setup,
            memory(shape, setup, hardware, measured),
            step_time(shape, setup, hardware, calibration),
        )
        for setup in _setups(base, global_batch)
    ]


def _setups(base: Setup, global_batch: int) -> Iterator[Setup]:
    rows = global_batch // base.data_parallel
    micro_batches = [size for size in range(1, min(rows, LARGEST_MICRO_BATCH) + 1) if rows % size == 0]
    in_place: tuple[Offload, ...] = ("none",)
    for strategy in SIMPLEST_FIRST:
        if strategy == "zero3" and base.compile:
            continue
        for micro_batch in micro_batches:
            for checkpointing in _checkpointings(strategy):
                for offload in OFFLOADS.get(strategy, in_place):
                    for degree in _degrees(base) if strategy == "hsdp" else (None,):
                        yield replace(
                            base,
                            strategy=strategy,
                            micro_batch=micro_batch,
                            accumulation=rows // micro_batch,
                            checkpointing=checkpointing,
                            offload=offload,
                            shard_degree=degree,
                            reshard_after_forward=True,
                            secondary_degree=base.secondary_degree if strategy == "zero3" else None,
                        )


def _checkpointings(strategy: Strategy) -> list[Checkpointing]:
    """DeepSpeed's stage 3 cannot recompute a part of a block."""
    return [kind for kind in get_args(Checkpointing) if (strategy, kind) != ("zero3", "selective")]


def _degrees(base: Setup) -> list[int]:
    """A node at least: less leaves fast links unused; all ranks would be fsdp."""
    ranks = base.state_ranks
    return [degree for degree in _divisors(ranks) if base.ranks_of_a_node <= degree < ranks]


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def best(found: Sequence[Choice]) -> list[Choice]:
    """Those that fit, best first: the fastest, and of those within 2 % the simplest with most room.

    Where memory is tight, a run may fail; so what is tight comes only where nothing else fits.
    """
    safe = [choice for choice in found if choice.memory.verdict == "fits"]
    fitting = sorted(safe or [choice for choice in found if choice.fits], key=lambda choice: choice.seconds)
    ranked: list[Choice] = []
    while fitting:
        fastest = fitting[0].seconds
        equal = [choice for choice in fitting if choice.seconds <= fastest * (1 + EQUAL)]
        equal = equal or fitting
        ranked += sorted(equal, key=_simplicity)
        fitting = fitting[len(equal) :]
    return ranked


def _simplicity(choice: Choice) -> tuple[Any, ...]:
    """Less machinery first, then less time."""
    setup = choice.setup
    checkpointing = get_args(Checkpointing).index(setup.checkpointing)
    return (
        setup.offload != "none",
        SIMPLEST_FIRST.index(setup.strategy),
        checkpointing,
        choice.seconds,
    )


def advise(found: Sequence[Choice], yours: Choice) -> list[dict[str, Any]]:
    """The best three strategies, each in its best form, with the reason for its place.

    If all of them need DeepSpeed, the best that does not comes fourth.

    yours: the configured way, which each is compared with.
    """
    ranked = best(found)
    first_of_each: dict[Strategy, Choice] = {}
    for choice in ranked:
        first_of_each.setdefault(choice.setup.strategy, choice)
    leading = list(first_of_each.values())[:ADVISED]
    if not any(choice.native for choice in leading):
        leading += [choice for choice in ranked if choice.native][:1]
    return [_advice(choice, leading[0], yours) for choice in leading]


def _advice(choice: Choice, top: Choice, yours: Choice) -> dict[str, Any]:
    setup, time = choice.setup, choice.time
    return {
        "strategy": setup.strategy,
        "overrides": overrides(setup, yours.setup),
        "micro_batch": setup.micro_batch,
        "accumulation": setup.accumulation,
        "activation_checkpointing": setup.checkpointing,
        "offload": setup.offload,
        "shard_degree": setup.shards if setup.strategy == "hsdp" else None,
        "native": choice.native,
        "device_gib": choice.memory.device_gib,
        "verdict": choice.memory.verdict,
        "step_seconds": time.step_seconds,
        "mfu": time.mfu,
        "reason": _reason(choice, top),
        "speed_over_yours": _ratio(yours.time.step_seconds, time.step_seconds),
    }


def overrides(setup: Setup, base: Setup) -> list[str]:
    """What to type after the words of `base` to get this setup."""
    name = setup.strategy
    words = [f"sharding={name}", f"micro_batch={setup.micro_batch}"]
    words.append(f"activation_checkpointing={setup.checkpointing}")
    if setup.offload != "none" or base.offload != "none":  # which may be a preset's, or typed
        words.append(f"sharding.offload={setup.offload}")
    if setup.strategy == "hsdp":
        words.append(f"sharding.shard_degree={setup.shards}")
    elif base.shard_degree is not None:
        words.append("sharding.shard_degree=null")
    if base.secondary_degree is not None and setup.strategy != "zero3":
        words.append("sharding.secondary_degree=null")
    if setup.reshard_after_forward != base.reshard_after_forward:
        words.append(f"sharding.reshard_after_forward={str(setup.reshard_after_forward).lower()}")
    return words


def _reason(choice: Choice, top: Choice) -> str:
    slower = _ratio(choice.time.step_seconds, top.time.step_seconds)
    if slower is None:
        pace = "speed unknown"
    else:
        pace = "the fastest that fits" if choice is top else f"{slower - 1:+.1%} step time"
    room = choice.memory.limit_gib - choice.memory.device_gib
    said = [pace, f"{room:.1f} GiB free"]
    if choice.time.bound_by:
        said.append(f"bound by {choice.time.bound_by}")
    return ", ".join(said)


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


def prices(found: Sequence[Choice], yours: Choice) -> dict[str, float | None]:
    """What each constraint costs, as the relative gain in speed without it.

    memory: with room for everything; checkpointing: not allowed to recompute; yours: the best that fits
    against the configured way. None where the speed is unknown.
    """
    fitting = best(found)
    if not fitting:
        return {}
    top = fitting[0]
    fastest = min(found, key=lambda choice: choice.seconds)
    whole = [choice for choice in fitting if choice.setup.checkpointing == "none"]
    one_by_one = [choice for choice in fitting if choice.setup.micro_batch == 1]
    return {
        "memory_limit": _gain(top, fastest),
        "without_recomputing": _gain(whole[0], top) if whole else None,
        "micro_batch_of_one": _gain(one_by_one[0], top) if one_by_one else None,
        "your_choice": _gain(yours, top),
    }


def _gain(slow: Choice, fast: Choice) -> float | None:
    ratio = _ratio(slow.time.step_seconds, fast.time.step_seconds)
    return None if ratio is None else ratio - 1
