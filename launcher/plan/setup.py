"""How is the model trained? What memory and time depend on besides the model's shape and the machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from configs.schema import Config

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp_grad_op", "hsdp"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp_grad_op", "hsdp")
Checkpointing = Literal["none", "selective", "full"]
Offload = Literal["none", "optimizer", "all"]
Format = Literal["fp32", "bf16", "fp16", "fp8"]

BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
"""Bytes of one number."""


@dataclass(frozen=True)
class Setup:
    """One way to run a shape. Ranks are accelerators, or workers on a machine without them."""

    strategy: Strategy
    world_size: int
    gpus_per_node: int
    micro_batch: int
    """Sequences per forward pass on one data-parallel rank."""
    accumulation: int = 1
    shard_degree: int | None = None
    """Ranks that one copy of the states is split over; only hsdp; none means those of a node."""
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1
    checkpointing: Checkpointing = "none"
    checkpointed_every: int = 1
    """Of how many blocks one is checkpointed, the last; the others keep everything. Memory only."""
    compute: Format = "bf16"
    weights: Literal["fp32", "bf16"] = "fp32"
    """Format of stored weights, gradients and moments."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    foreach: bool = False
    """Whether the optimizer works on lists of tensors, which takes a temporary copy."""
    logits: Literal["fp32", "bf16", "chunked"] = "fp32"
    offload: Offload = "none"
    reshard_after_forward: bool = True
    bucket_mib: float = 25.0
    bucket_parameters: float = 5e8
    prefetch_parameters: float = 5e7
    live_parameters: float = 1e9
    secondary_degree: int | None = None
    """Ranks that a second copy of the weights is split over; only zero3."""
    lora_rank: int | None = None
    frozen_blocks: int = 0
    compile: bool = False
    asynchronous: bool = False
    """Whether a checkpoint is copied in host memory and written from there."""
    fused_norm: bool = False
    """Whether RMSNorm is one kernel, which keeps no fp32 copy: 8h bytes per token and block less."""
    repeated_kv: bool = False
    """Whether attention repeats keys and values for every query head, as other trainers do."""

    root_resharded: bool = False
    """Whether embedding and head are freed after forward, as other trainers do; strategy fsdp."""

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation; fp8 products keep their inputs in bf16."""
        return 4 if self.compute == "fp32" else 2

    @property
    def autocast(self) -> bool:
        """Whether products cast inputs and weights one by one, as under ddp; else whole blocks are cast."""
        return self.strategy == "ddp" and self.compute != "fp32" and self.weights == "fp32"

    @property
    def data_parallel(self) -> int:
        """Copies of the model that see different rows."""
        return self.world_size // (self.tensor_parallel * self.pipeline_parallel * self.context_parallel)

    @property
    def state_ranks(self) -> int:
        """Ranks over which data parallelism could split the states: also those that split a row."""
        return self.data_parallel * self.context_parallel

    @property
    def ranks_of_a_node(self) -> int:
        """Of those that split the states; tensor parallelism takes neighbours first."""
        return max(1, self.gpus_per_node // (self.tensor_parallel * self.pipeline_parallel))

    @property
    def shards(self) -> int:
        """Ranks that the strategy splits one copy of the states over."""
        match self.strategy:
            case "ddp":
                return 1
            case "hsdp":
                return self.shard_degree or math.gcd(self.ranks_of_a_node, self.state_ranks)
            case _:
                return self.state_ranks


def setup_of(config: Config, strategy: Strategy | None = None) -> Setup:
    """The setup that a configuration describes, under another strategy if one is given.

    Raises ValueError for sharding=auto without one: it must be resolved before.
    """
    if strategy is None:
        if config.sharding.strategy == "auto":
            raise ValueError("sharding.strategy=auto has no setup: resolve it first")
        strategy = config.sharding.strategy
    return Setup(
        strategy=strategy,
        world_size=config.world_size,
        gpus_per_node=config.gpus_per_node,
        micro_batch=config.micro_batch,
        accumulation=config.accumulation,
        shard_degree=config.sharding.shard_degree,
        tensor_parallel=config.plan.tensor_parallel,
        pipeline_parallel=config.plan.pipeline_parallel,
        context_parallel=config.plan.context_parallel,
        checkpointing=config.activation_checkpointing,
        compute=config.precision.compute,
        weights=config.precision.weights,
        reduce=config.sharding.reduce_dtype,
        optimizer=config.optimizer.kind,
        foreach=config.optimizer.implementation == "foreach",
        logits=config.objective.logits,
        offload=config.sharding.offload,
        reshard_after_forward=config.sharding.reshard_after_forward,
        bucket_mib=config.sharding.bucket_mib,
        bucket_parameters=config.sharding.bucket_parameters,
        prefetch_parameters=config.sharding.prefetch_parameters,
        live_parameters=config.sharding.live_parameters,
        secondary_degree=config.sharding.secondary_degree if strategy == "zero3" else None,
        lora_rank=config.model.lora_rank,
        frozen_blocks=config.model.frozen_blocks,
        compile=config.compile,
        asynchronous=config.checkpoint.asynchronous,
    )
