"""Does a rank's memory suffice? The peak of a training step in the three numbers that people meet.

active: bytes of live tensors; reserved: what torch's allocator took for them; device: what nvidia-smi shows,
with what lies outside the allocator. Each has an interval from stated errors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

from configs.schema import Hardware
from launcher.plan.checkpoint_size import checkpoint_bytes
from launcher.plan.part import parts_of
from launcher.plan.regimes import Bytes, regimes_of
from launcher.plan.setup import STRATEGIES, Setup, Strategy
from launcher.plan.shape import Shape

GIB = 2**30
COMPONENTS = ("weights", "gradients", "optimizer", "working", "communication", "activations", "logits")


@dataclass(frozen=True)
class Estimate:
    """A factor or an amount with its interval."""

    low: float
    middle: float
    high: float


TRACED, UNTRACED = Estimate(0.95, 1.0, 1.05), Estimate(0.9, 1.0, 1.1)
"""Real over planned active bytes: of strategies compared with traces (worst 4.7 %), and of the others."""
EAGER, COMPILED = Estimate(1.03, 1.2, 1.25), Estimate(1.03, 1.12, 1.2)
"""Reserved over active bytes of torch's CUDA allocator: published reserved bytes of Llama-3-8B over traced
active ones are 1.19 to 1.24 eager and 1.10 to 1.15 compiled. A nearly full device needs less: before the
allocator fails it gives its cache back."""
OUTSIDE_GIB, OUTSIDE_ALONE_GIB = Estimate(1.5, 2.0, 2.5), Estimate(0.5, 0.7, 0.9)
"""CUDA context with NCCL's buffers, and without on a single GPU."""
RESIDENT = Estimate(1.0, 1.15, 1.35)
"""Resident over active bytes on CPU, measured on Linux with glibc, which keeps freed blocks."""
RUNTIME_GIB = 0.42
"""Python and torch, which the resident memory of a worker contains."""
UNTRACED_STRATEGIES = ("zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Memory:
    """Peak of one rank. components_gib add up to active_gib."""

    components_gib: dict[str, float]
    active_gib: float
    active_interval_gib: tuple[float, float]
    reserved_gib: float
    reserved_interval_gib: tuple[float, float]
    device_gib: float
    device_interval_gib: tuple[float, float]
    limit_gib: float
    regime: str
    """The part of a step that is the peak."""
    host_gib: float
    """Host memory of a node: its workers' runtime, offloaded states, and a copy of what they save."""
    host_limit_gib: float | None
    offloaded: bool

    @property
    def fullness(self) -> float:
        """What is needed over what there is, on the device or on the host, whichever is fuller."""
        device = self.device_gib / self.limit_gib
        return max(device, self.host_gib / self.host_limit_gib) if self.host_limit_gib else device

    @property
    def shortage(self) -> str:
        """In words, what is needed and what there is where it is fullest."""
        if self.fullness > self.device_gib / self.limit_gib:
            return f"{self.host_gib:.1f} GiB of host memory per node, there are {self.host_limit_gib:.1f}"
        return f"{self.device_gib:.1f} GiB per rank, there are {self.limit_gib:.1f}"

    @property
    def verdict(self) -> str:
        """does not fit: not even with the errors in its favour; fits: whatever the errors; else tight.

        Offloaded states that go to a host of unknown memory are tight at best.
        """
        if self.device_interval_gib[0] > self.limit_gib:
            return "does not fit"
        if self.host_limit_gib is not None and self.host_gib > self.host_limit_gib:
            return "does not fit"
        if self.host_limit_gib is None and self.offloaded:
            return "tight"
        return "tight" if self.device_interval_gib[1] > self.limit_gib else "fits"


def memory(
    shape: Shape, setup: Setup, hardware: Hardware, reserved_over_active: float | None = None
) -> Memory:
    """Peak memory of one rank.

    reserved_over_active: as measured on this hardware; none takes what others measured.
    """
    on_gpu = hardware.device_name is not None
    parts = parts_of(shape, setup)
    regime, peak, offloaded = _peak(
        (name, *_offload(sizes, setup if on_gpu else replace(setup, offload="none")))
        for part in parts
        for name, sizes in regimes_of(part, setup).items()
    )
    components = {name: peak.get(name, 0.0) / GIB for name in COMPONENTS}
    staged_gib = checkpoint_bytes(shape, setup) / setup.world_size / GIB if setup.asynchronous else 0.0
    if not on_gpu:
        components |= {"staging": staged_gib, "runtime": RUNTIME_GIB}
    active = sum(components.values())
    error = UNTRACED if setup.strategy in UNTRACED_STRATEGIES else TRACED
    if on_gpu:
        factor = COMPILED if setup.compile else EAGER
        if reserved_over_active is not None:
            factor = Estimate(1.03, reserved_over_active, max(reserved_over_active * 1.04, 1.03))
        outside = OUTSIDE_GIB if setup.world_size > 1 else OUTSIDE_ALONE_GIB
    else:
        factor, outside = RESIDENT, Estimate(0, 0, 0)
    low, high = active * error.low, active * error.high
    workers = min(setup.gpus_per_node, setup.world_size)
    return Memory(
        components_gib=components,
        active_gib=active,
        active_interval_gib=(low, high),
        reserved_gib=active * factor.middle,
        reserved_interval_gib=(low * factor.low, high * factor.high),
        device_gib=active * factor.middle + outside.middle,
        device_interval_gib=(low * factor.low + outside.low, high * factor.high + outside.high),
        limit_gib=hardware.memory_gib or _machine_memory_gib() / setup.gpus_per_node,
        regime=regime,
        host_gib=workers * (RUNTIME_GIB + staged_gib + offloaded / GIB if on_gpu else active),
        host_limit_gib=hardware.host_memory_gib,
        offloaded=offloaded > 0,
    )


def memory_by_strategy(
    shape: Shape, setup: Setup, hardware: Hardware, reserved_over_active: float | None = None
) -> dict[Strategy, Memory]:
    """The same setup under every strategy."""
    return {
        strategy: memory(shape, replace(setup, strategy=strategy), hardware, reserved_over_active)
        for strategy in STRATEGIES
    }


def _peak(regimes: Iterable[tuple[str, Bytes, float]]) -> tuple[str, Bytes, float]:
    """The fullest regime, and the most bytes in host memory of any."""
    seen = list(regimes)
    name, sizes, _ = max(seen, key=lambda regime: sum(regime[1].values()))
    return name, sizes, max(offloaded for _, _, offloaded in seen)


def _offload(sizes: Bytes, setup: Setup) -> tuple[Bytes, float]:
    """What stays on the device, and the bytes moved to the host.

    optimizer: its states, and the step with its copies; all: weights and gradients too, where they are split.
    """
    if setup.offload == "none":
        return sizes, 0.0
    moved = ["optimizer"]
    if setup.offload == "all" and setup.strategy not in ("ddp", "zero1", "zero2"):
        moved += ["weights", "gradients"]
    kept = {name: 0.0 if name in moved else size for name, size in sizes.items()}
    if "activations" not in sizes:
        kept["working"] = 0.0
    return kept, sum(sizes.get(name, 0.0) for name in moved)


def _machine_memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
