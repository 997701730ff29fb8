"""Does a rank's memory suffice? The peak of a training step, by strategy.

A step passes through regimes: the loss, the first and the last block's backward, the gradients of
embedding and head, the optimizer. Each is a sum of components; the largest sum is the peak. The forms
of fully sharded training in bf16 were fitted to traces of FSDP2: median deviation 0.01 %, worst 4.7 %;
those of fp32, accumulation, kept gathered weights and DDP are derived the same way, not traced.
N parameters, n of a block, R outside the blocks, d ranks, A activations of one of L blocks (A_none
without checkpointing), T tokens of a micro batch, h hidden, V vocabulary.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from configs.schema import Config, Hardware
from launcher.plan.activations import block_activation_bytes, final_norm_bytes, logits_bytes
from launcher.plan.shape import Shape

Strategy = Literal["ddp", "fsdp"]
Bytes = dict[str, float]

GIB = 2**30
ALLOCATOR_FACTOR = 1.2
"""Reserved over active bytes of torch's CUDA allocator in eager training: 1.19 to 1.24 published."""
OUTSIDE_ALLOCATOR_GIB = 2.0
"""CUDA context and NCCL buffers."""
RUNTIME_GIB = 0.6
"""Python and torch, which the resident memory of a worker on CPU contains."""
TIGHT = 0.9


@dataclass(frozen=True)
class Memory:
    """Peak of one rank. components_gib add up to active_gib."""

    components_gib: dict[str, float]
    active_gib: float
    reserved_gib: float
    device_gib: float
    limit_gib: float

    @property
    def verdict(self) -> str:
        """fits, tight (above 90 % of the limit) or does not fit."""
        if self.device_gib > self.limit_gib:
            return "does not fit"
        return "tight" if self.device_gib > TIGHT * self.limit_gib else "fits"


def memory(shape: Shape, config: Config, strategy: Strategy) -> Memory:
    """Peak memory of one rank under a strategy, GiB."""
    regimes = _ddp(shape, config) if strategy == "ddp" else _fsdp(shape, config)
    peak = max(regimes, key=lambda regime: sum(regime.values()))
    components = {name: count / GIB for name, count in peak.items()}
    if on_gpu(config.hardware):
        factor, outside = ALLOCATOR_FACTOR, OUTSIDE_ALLOCATOR_GIB
    else:
        factor, outside = 1.0, 0.0
        components["runtime"] = RUNTIME_GIB
    active = sum(components.values())
    return Memory(
        components_gib=components,
        active_gib=active,
        reserved_gib=active * factor,
        device_gib=active * factor + outside,
        limit_gib=config.hardware.memory_gib or _machine_memory_gib() / config.gpus_per_node,
    )


def on_gpu(hardware: Hardware) -> bool:
    """Whether plans are made for an accelerator rather than for the processors of a machine."""
    return hardware.device_name is not None


def _ddp(shape: Shape, config: Config) -> list[Bytes]:
    """Everything on every rank: 16N, of which the gradients are views of DDP's buckets, not copies.

    loss  16N + 2N + LA + 8Th + 12TV;  first backward  16N + 2N + LA + A_none - A + 6Vh.
    In bf16, autocast keeps a cast of every weight until backward has used it: 2N. A gradient passes
    through its format and fp32 on the way to its bucket; the head's, the largest, takes 6Vh.
    """
    bf16 = config.precision.compute == "bf16"
    b, tokens = (2 if bf16 else 4), config.micro_batch * shape.sequence_length
    one = block_activation_bytes(shape, tokens, b, config.activation_checkpointing, autocast=bf16)
    one_whole = block_activation_bytes(shape, tokens, b, "none", autocast=bf16)
    kept = shape.layers * one
    casts = 2 * shape.parameters if bf16 else 0
    in_transit = (6 if bf16 else 4) * shape.vocabulary * shape.hidden
    final_norm, logits = final_norm_bytes(shape, tokens, b), logits_bytes(shape, tokens)
    return [
        _regime(shape.parameters, casts, kept + final_norm, logits),
        _regime(shape.parameters, casts + in_transit, kept + one_whole - one),
    ]


def _fsdp(shape: Shape, config: Config) -> list[Bytes]:
    """FSDP2 / ZeRO-3 over all ranks; in bf16 with gradients reduced in fp32:

    loss            12N/d + 2n + LA + 8Th + 12TV
    first backward  12N/d + LA + A_none - A + 10n + 2R
    last backward   16N/d + A_none + 10n + 2R
    root            12N/d + 4(N - R)/d + 6R
    optimizer       16N/d with the fused AdamW, so never the peak

    10n are two gathered blocks (2n each), one's gradients (2n) and their fp32 copy to reduce (4n).
    Accumulation keeps the gradients, 4N/d, over the whole step. Without resharding after forward the
    gathered weights of all blocks, 2N, stay until their backward.
    """
    b = 2 if config.precision.compute == "bf16" else 4
    reduced = 2 if config.sharding.reduce_dtype == "bf16" else 4
    tokens = config.micro_batch * shape.sequence_length
    one = block_activation_bytes(shape, tokens, b, config.activation_checkpointing)
    one_whole = block_activation_bytes(shape, tokens, b, "none")
    kept = shape.layers * one
    final_norm, logits = final_norm_bytes(shape, tokens, b), logits_bytes(shape, tokens)

    n, root, sharded = shape.parameters_layer, shape.parameters_root, shape.parameters / config.world_size
    accumulated = 1.0 if config.accumulation > 1 else 0.0
    all_but_root = 1 - root / shape.parameters
    reshard = config.sharding.reshard_after_forward
    at_loss = b * n if reshard else b * shape.parameters
    at_first = 2 * b * n + b * root if reshard else b * shape.parameters
    at_last = 2 * b * n + b * root
    in_reduction = (b + reduced) * n
    return [
        _regime(sharded, at_loss, kept + final_norm, logits, gradients=accumulated),
        _regime(sharded, at_first + in_reduction, kept + one_whole - one, gradients=accumulated),
        _regime(sharded, at_last + in_reduction, one_whole),
        _regime(sharded, (b + reduced) * root, gradients=max(accumulated, all_but_root)),
    ]


def _regime(
    parameters: float, working: float, activations: float = 0.0, logits: float = 0.0, gradients: float = 1.0
) -> Bytes:
    """Bytes by component, of a rank that holds so many parameters, and this share of their gradients.

    working: copies in use: gathered or cast weights, and gradients on their way to the reduction.
    """
    return {
        "weights": 4 * parameters,
        "gradients": 4 * parameters * gradients,
        "optimizer": 8 * parameters,
        "working": working,
        "activations": activations,
        "logits": logits,
    }


def _machine_memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
