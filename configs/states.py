"""Keys about model states: how they are split over ranks, in which formats they are, how they are saved.

A part of schema.py, in a file of its own for its length.
"""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from configs.section import Quantity, Section, Size, Text


class Sharding(Section):
    """How model states are split over ranks."""

    strategy: Literal["ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp_grad_op", "hsdp", "auto"]
    """ddp replicates everything; zero1, zero2 and zero3 (DeepSpeed) split the optimizer, then gradients,
    then weights; fsdp (FSDP2) splits all three; fsdp_grad_op keeps gathered weights after forward; hsdp
    splits within groups of shard_degree ranks and replicates across them; auto lets the plan choose."""
    shard_degree: Size | None = None
    """Ranks that one copy of the states is split over; strategy hsdp; none means those of a node."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """States kept in host memory: the optimizer's (zero1, zero2, zero3), or weights and gradients as well
    (zero3, fsdp)."""
    pin_memory: bool = True
    """Whether offloaded states lie in page-locked memory, from which a GPU copies faster."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format in which gradients are summed over ranks."""
    bucket_mib: Quantity = 25.0
    """Size of a gradient bucket in MiB; strategy ddp."""
    bucket_parameters: Annotated[float, Field(ge=1, le=1e15)] = 5e8
    """Parameters whose gradients are summed, or weights gathered, at once; strategies zero1, zero2, zero3."""
    overlap: bool = True
    """Sum gradients during the backward pass, not after it; strategies zero1 (not in bf16), zero2, zero3."""
    reshard_after_forward: bool = True
    """Free gathered parameters between forward and backward; strategies fsdp and hsdp."""
    prefetch_blocks: Size = 1
    """Blocks whose parameters are gathered ahead of their use; strategies fsdp, fsdp_grad_op, hsdp."""
    prefetch_parameters: Annotated[float, Field(ge=0, le=1e15)] = 5e7
    """Parameters gathered ahead of their use; strategy zero3."""
    live_parameters: Annotated[float, Field(ge=0, le=1e15)] = 1e9
    """Most gathered parameters that are kept for reuse; strategy zero3."""
    whole_parameters: Annotated[float, Field(ge=0, le=1e15)] = 1e5
    """A parameter of at most so many numbers is kept whole on every rank; strategy zero3."""
    secondary_degree: Size | None = None
    """Ranks within which a second copy of the weights is split, for gathering in the backward pass without
    the network between nodes (ZeRO++ hpZ); strategy zero3; none means no second copy."""
    quantized_weights: bool = False
    """Gather weights in 8 bits (ZeRO++ qwZ); strategy zero3 on GPUs."""
    quantized_gradients: bool = False
    """Sum gradients in 4 bits (ZeRO++ qgZ); strategy zero3 on GPUs."""

    @model_validator(mode="after")
    def _check(self) -> Sharding:
        offers = {
            "zero1": ["optimizer"],
            "zero2": ["optimizer"],
            "zero3": ["optimizer", "all"],
            "fsdp": ["all"],
        }
        allowed = ["none", *offers.get(self.strategy, [])]
        if self.offload not in allowed:
            raise ValueError(
                f"sharding.offload={self.offload}: with sharding.strategy={self.strategy} "
                f"allowed: {', '.join(allowed)}"
            )
        for key in ("secondary_degree", "quantized_weights", "quantized_gradients"):
            if (value := getattr(self, key)) and self.strategy != "zero3":
                raise ValueError(f"sharding.{key}={value}: only with sharding=zero3 (ZeRO++)")
        return self


class Precision(Section):
    """Number formats."""

    compute: Literal["fp32", "bf16", "fp16", "fp8"]
    """Format of matrix products in forward and backward. fp8 is planned, not trained yet."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Format in which weights, gradients and moments are kept. bf16 is planned, not trained yet."""
    loss_scale: Annotated[float, Field(ge=1, le=2**32)] = 65536.0
    """Factor of the loss at the start, halved when gradients overflow; compute fp16."""
    loss_scale_steps: Size = 2000
    """Steps without overflow after which the factor is doubled; compute fp16."""


class Checkpoint(Section):
    """When the state of a run is saved, and how much of it is kept."""

    every_steps: Size | None = None
    """Steps between checkpoints; none means by time only."""
    every_minutes: Annotated[float, Field(gt=0, le=1e7)] | None = 30.0
    """Minutes between checkpoints; none means by steps only."""
    keep_last: Size = 3
    """Newest checkpoints that stay."""
    keep_every_steps: Size | None = None
    """Checkpoints at multiples of so many steps stay for good; none means no others than the newest."""
    keep_best: Text | None = None
    """Metric of the evaluation, such as eval/legal/loss, whose lowest value's checkpoint stays; none means
    that no checkpoint stays for its quality."""
    asynchronous: bool = True
    """Train on while a checkpoint is written; the loop waits only until it is copied in host memory."""
    directory: Text | None = None
    """Directory or fsspec address (s3://bucket/prefix) in which the run has a folder of its name for
    checkpoints; none means RUN/checkpoints."""
    durable: Text | None = None
    """Second directory or fsspec address that every checkpoint is copied to in the background, and read
    from where the first has none; none means no second place."""

    @model_validator(mode="after")
    def _check(self) -> Checkpoint:
        for key in ("directory", "durable"):
            address = getattr(self, key) or ""
            if "://" in address and ":" in urlsplit(address).netloc.rpartition("@")[0]:
                raise ValueError(f"checkpoint.{key}: holds a secret, which must come from the environment")
        return self
