"""How long does it take? A roofline of one optimizer step, and the run that is made of such steps.

A step is the sum of what an eager program does one after the other: matrix products and attention at a
share of the peak, memory traffic of everything between them, the optimizer, and the communication that
does not hide beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.schema import Hardware
from launcher.plan.communication import (
    LINK_SHARE,
    communication,
    tensor_parallel_seconds,
    trained_share,
)
from launcher.plan.flops import flops_per_token, recomputed_flops_per_token, trained_flops_per_token
from launcher.plan.hardware import machine_flops_per_second, on_gpu
from launcher.plan.setup import BYTES, Setup
from launcher.plan.shape import Shape

SECONDS_PER_DAY = 86400

# The constants below are fitted to the 130 published steps of llm-foundry (8 to 512 A100 and H100, 125M to
# 70B, rows of 512 to 65536; median error of the step time 4 %, 19 of 20 within 15 %) and six of torchtitan.
REFERENCE_PEAK = 312e12
"""The A100's, from which shares of the peak fall as peaks rise."""
PRODUCTS_SHARE, PRODUCTS_FALL = 0.73, 0.15
ATTENTION_SHARE, ATTENTION_FALL = 0.58, 0.52
MOVES = 4
"""Times that each byte of a kept activation passes through memory: written and read in forward, read in
backward, its gradient written and read."""
EXPOSED_SHARE = 0.2
"""Share of communication that delays compute although there is enough to hide it: the first gather, the
last scatter, and cores and memory that it takes away."""
FP8_SHARE = 0.82
"""Speed of fp8 products over what their peak promises: scaling and transposes come with them."""
FITTED_PEAKS = (300e12, 1000e12)
TYPICAL_ERROR, EXTRAPOLATED_ERROR, CALIBRATED_ERROR = 0.15, 0.3, 0.05
"""Half of the interval around a step time: on A100 and H100 in bf16, elsewhere, and after a calibration."""

CPU_SHARE = 0.4
"""Share of a large matrix product's rate that training on CPU reaches."""
MEMORY_SHARE = 0.8
"""Share of the memory's nominal bandwidth that elementwise kernels reach."""
COMPILED_TRAFFIC = 0.5
"""Memory traffic of compiled blocks over eager ones: chains of elementwise kernels become one."""
LOGITS_BYTES = {"fp32": 12, "bf16": 6, "chunked": 12}
OPTIMIZER_BYTES = {
    ("adamw", "fp32"): 32,
    ("adamw", "bf16"): 16,
    ("adamw_8bit", "fp32"): 20,
    ("adamw_8bit", "bf16"): 12,
}
"""Read and written per parameter: gradient twice (clipping), weight and moments both ways."""
HOST_MEMORY_BYTES_S = 200e9
"""Bandwidth of a node's memory, where an offloaded optimizer works."""

Calibration = Mapping[str, Any]
"""What a calibration of such hardware measured; flops_per_second is one rank's, recomputed ones too."""


@dataclass(frozen=True)
class StepTime:
    """One optimizer step; every field is none where the hardware's peak is unknown."""

    step_seconds: float | None = None
    step_seconds_low: float | None = None
    step_seconds_high: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    """Model FLOPs over the accelerators' peak; none on CPU, which has no published peak."""
    hfu: float | None = None
    """The same with recomputed FLOPs."""
    bound_by: str | None = None
    """Which part is longest: compute, memory, network, host or data."""
    parts_seconds: dict[str, float] | None = None
    """What adds up to step_seconds; communication only as far as it is exposed."""
    communication_seconds: float | None = None
    """Communication hidden or not."""
    calibrated: bool = False


def products_share(peak: float) -> float:
    """Share of the peak that large matrix products reach: 0.73 (312e12 / peak)^0.15, at most 0.73.

    73 % of an A100, 61 % of an H100: the faster the units, the more they wait for power and memory.
    """
    return PRODUCTS_SHARE * math.pow(min(1.0, REFERENCE_PEAK / peak), PRODUCTS_FALL)


def attention_share(peak: float) -> float:
    """Share of the peak that fused attention reaches: 0.58 (312e12 / peak)^0.52 of 12 L H Q T."""
    return ATTENTION_SHARE * math.pow(min(1.0, REFERENCE_PEAK / peak), ATTENTION_FALL)


def peak_flops_per_second(hardware: Hardware, compute: str) -> float | None:
    """Published dense peak of one accelerator in a format; none where there is none."""
    tflops: float | None = getattr(hardware.peak_tflops, compute)
    return None if tflops is None else tflops * 1e12


def step_time(
    shape: Shape,
    setup: Setup,
    hardware: Hardware,
    calibration: Calibration | None = None,
    data_seconds: float = 0.0,
) -> StepTime:
    """Time of one optimizer step.

    data_seconds: what the data loader takes for a step's rows; it works ahead, so only a loader slower than
    the step delays it. A calibration replaces the shares of the peak and the memory traffic.
    """
    micro = _micro_batch_seconds(shape, setup, hardware, calibration)
    if micro is None:
        return StepTime()
    turns = setup.accumulation + setup.pipeline_parallel - 1
    parts = {name: turns * seconds for name, seconds in micro.items()}
    moved = communication(shape, setup, hardware)
    shadow_seconds = moved.hiding_share * setup.accumulation * sum(micro.values())
    hidden_seconds = min((1 - EXPOSED_SHARE) * moved.beside_compute, shadow_seconds)
    parts["network"] += moved.beside_compute - hidden_seconds + moved.alone
    if calibration is None:  # timed steps end with the optimizer's
        parts["memory"] += _optimizer_seconds(shape, setup, hardware)
    parts["host"] = _host_seconds(shape, setup, hardware)
    parts["data"] = max(0.0, data_seconds - sum(parts.values()))
    return _step(shape, setup, hardware, parts, moved.beside_compute + moved.alone, calibration)


def _micro_batch_seconds(
    shape: Shape, setup: Setup, hardware: Hardware, calibration: Calibration | None
) -> dict[str, float] | None:
    """Forward and backward of one micro batch on one rank; none where the rank's speed is unknown."""
    model_parallel = setup.tensor_parallel * setup.pipeline_parallel
    tokens = setup.micro_batch * shape.tokens_per_row / (setup.context_parallel * model_parallel)
    products, attention = _flops_per_token(shape, setup)
    network = tensor_parallel_seconds(shape, setup, hardware)
    rate = _measured_flops_per_second(setup, hardware, calibration)
    if rate is not None:
        return {"compute": tokens * (products + attention) / rate, "memory": 0.0, "network": network}
    peak = peak_flops_per_second(hardware, setup.compute)
    if peak is None:
        return None
    speed = peak * (hardware.efficiency or products_share(peak))
    attention_peak, head_seconds = peak, 0.0
    if setup.compute == "fp8":  # attention and the head stay in bf16
        attention_peak = peak_flops_per_second(hardware, "bf16") or peak / 2
        head = 6 * shape.parameters_head
        head_seconds = head / (attention_peak * (hardware.efficiency or products_share(attention_peak)))
        products, speed = products - head, speed * FP8_SHARE
    compute = products / speed + head_seconds
    compute += attention / (attention_peak * attention_share(attention_peak))
    traffic = _traffic_bytes_per_token(shape, setup)
    return {
        "compute": tokens * compute,
        "memory": tokens * traffic / memory_bytes_s(hardware),
        "network": network,
    }


def _flops_per_token(shape: Shape, setup: Setup) -> tuple[float, float]:
    """FLOPs that the hardware spends on a token: in matrix products, and in attention."""
    attention: float = flops_per_token(shape) - 6 * shape.parameters_multiplied
    products = trained_flops_per_token(shape, trained_share(shape, setup)) - attention
    again = recomputed_flops_per_token(shape, setup.checkpointing)
    attention_again = attention / 3 if setup.checkpointing == "full" else 0.0
    return products + again - attention_again, attention + attention_again


def _measured_flops_per_second(
    setup: Setup, hardware: Hardware, calibration: Calibration | None
) -> float | None:
    """Rate of one rank that was measured rather than published: calibrated, or timed on CPU."""
    if calibration is not None:
        return float(calibration["flops_per_second"])
    if on_gpu(hardware) or peak_flops_per_second(hardware, setup.compute) is not None:
        return None
    return (hardware.efficiency or CPU_SHARE) * machine_flops_per_second() / setup.gpus_per_node


def _traffic_bytes_per_token(shape: Shape, setup: Setup) -> float:
    """MOVES x (L b (8h + 4aq + 4f) + 12 V): what blocks and loss would keep, each byte moved so often.

    Of an encoder-decoder the mean over both.

    h hidden, a heads of size q, f feed-forward, V vocabulary, b bytes of the compute format (fp8 casts
    from bf16). Without gates 4h + 4aq + 5f. Full checkpointing repeats forward, a third.
    """
    hidden, ffn = (8, 4) if shape.gated else (4, 5)
    width = hidden * shape.hidden + 4 * shape.heads * shape.head_dim + ffn * shape.ffn_active
    blocks: float = shape.layers * max(BYTES[setup.compute], 2) * width
    if setup.checkpointing == "full":
        blocks *= 4 / 3
    if setup.compile:
        blocks *= COMPILED_TRAFFIC
    return MOVES * (blocks + LOGITS_BYTES[setup.logits] * shape.vocabulary) / shape.stacks


def _optimizer_seconds(shape: Shape, setup: Setup, hardware: Hardware) -> float:
    """Bytes that AdamW reads and writes for a rank's share of the weights, over the memory's bandwidth."""
    if setup.offload != "none":
        return 0.0
    moved = OPTIMIZER_BYTES[setup.optimizer, setup.weights] * _own_parameters(shape, setup)
    return moved / memory_bytes_s(hardware)


def _host_seconds(shape: Shape, setup: Setup, hardware: Hardware) -> float:
    """Offload: gradients down, weights up, AdamW in host memory; all: weights up in every pass as well."""
    if setup.offload == "none" or hardware.host_gb_s is None:
        return 0.0
    own = _own_parameters(shape, setup)
    weights, gradients = min(BYTES[setup.compute], BYTES[setup.weights]), BYTES[setup.reduce]
    passes = 2 * setup.accumulation if setup.offload == "all" else 0
    over_link = (weights * (1 + passes) + gradients) * own
    in_host = OPTIMIZER_BYTES[setup.optimizer, setup.weights] * own * setup.gpus_per_node
    return over_link / (LINK_SHARE * hardware.host_gb_s * 1e9) + in_host / HOST_MEMORY_BYTES_S


def _own_parameters(shape: Shape, setup: Setup) -> float:
    """Trained weights whose optimizer state lies on one rank."""
    split = setup.shards * setup.tensor_parallel * setup.pipeline_parallel
    return shape.parameters * trained_share(shape, setup) / split


def memory_bytes_s(hardware: Hardware) -> float:
    """Reached bandwidth; endless where unknown, so that nothing is charged."""
    return MEMORY_SHARE * hardware.memory_gb_s * 1e9 if hardware.memory_gb_s else float("inf")


def _step(
    shape: Shape,
    setup: Setup,
    hardware: Hardware,
    parts: dict[str, float],
    communication_seconds: float,
    calibration: Calibration | None,
) -> StepTime:
    seconds = sum(parts.values())
    tokens = setup.data_parallel * setup.micro_batch * setup.accumulation * shape.tokens_per_row
    peak = peak_flops_per_second(hardware, setup.compute)
    achieved = tokens / seconds / setup.world_size
    model = trained_flops_per_token(shape, trained_share(shape, setup))
    spent = model + recomputed_flops_per_token(shape, setup.checkpointing)
    error = CALIBRATED_ERROR if calibration else _error(peak)
    return StepTime(
        step_seconds=seconds,
        step_seconds_low=seconds * (1 - error),
        step_seconds_high=seconds * (1 + error),
        tokens_per_second=tokens / seconds,
        mfu=achieved * model / peak if peak else None,
        hfu=achieved * spent / peak if peak else None,
        bound_by=max(parts, key=lambda name: parts[name]),
        parts_seconds=parts,
        communication_seconds=communication_seconds,
        calibrated=calibration is not None,
    )


def _error(peak: float | None) -> float:
    """Half of the interval around a predicted step, relative."""
    low, high = FITTED_PEAKS
    return TYPICAL_ERROR if peak is not None and low <= peak <= high else EXTRAPOLATED_ERROR


@dataclass(frozen=True)
class Time:
    """Pace of a whole run; every field is none where the speed is unknown."""

    step_seconds: float | None = None
    step_seconds_low: float | None = None
    step_seconds_high: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    hfu: float | None = None
    days: float | None = None
    seconds: float | None = None
    bound_by: str | None = None


def run_time(step: StepTime, steps: int, productive_share: float, goodput: float = 1.0) -> Time:
    """Wall time of a run: step time x steps / (productive share x goodput).

    productive_share: what is not start-up, evaluation and waiting for people; goodput: what failures and
    checkpoints leave. Whole-run efficiency is below that of a step by both.
    """
    if step.step_seconds is None:
        return Time()
    seconds = step.step_seconds * steps / (productive_share * goodput)
    return Time(
        step_seconds=step.step_seconds,
        step_seconds_low=step.step_seconds_low,
        step_seconds_high=step.step_seconds_high,
        tokens_per_second=step.tokens_per_second,
        mfu=step.mfu,
        hfu=step.hfu,
        days=seconds / SECONDS_PER_DAY,
        seconds=seconds,
        bound_by=step.bound_by,
    )


def days_of_tokens(tokens: float, tokens_per_second: float) -> float:
    """D / rate."""
    return tokens / tokens_per_second / SECONDS_PER_DAY


def days_of_flops(flops: float, accelerators: int, flops_per_second: float) -> float:
    """C / (n X): n accelerators that reach X each. With recomputation C is 8 N D instead of 6 N D."""
    return flops / (accelerators * flops_per_second) / SECONDS_PER_DAY


def days_of_gpu_hours(gpu_hours: float, accelerators: int) -> float:
    """Accelerator-hours shared by n."""
    return gpu_hours / accelerators / 24
