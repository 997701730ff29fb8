"""FSDP2: parameters, gradients and optimizer state split over all ranks, gathered block by block."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from configs.schema import Config, ConfigError
from trainer.distributed import World
from trainer.model import blocks
from trainer.optimizer import build_optimizer, clip_and_step, logical_state

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def mesh_of(config: Config, world: World) -> DeviceMesh:
    """All ranks in one row; with hsdp rows of shard_degree ranks, each with a copy of all states."""
    if config.sharding.strategy != "hsdp":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    row = config.sharding.shard_degree or config.gpus_per_node
    if world.size % row:
        raise ConfigError(f"sharding.shard_degree={row}: must divide the {world.size} ranks")
    sizes = (world.size // row, row)
    return init_device_mesh(world.device.type, sizes, mesh_dim_names=("replicate", "shard"))


def split_dimension(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """The dimension that ranks split a weight along; none means the first, its rows.

    A weight of several experts has the experts first: of fewer than ranks most would get nothing, and be
    sent as much padding as the others have weights.
    """
    if parameter.ndim < 3 or parameter.shape[0] % ranks == 0:
        return None
    divisible = [number for number in range(1, parameter.ndim) if parameter.shape[number] % ranks == 0]
    return Shard(divisible[0]) if divisible else None


class Fsdp:
    def __init__(
        self, module: nn.Module, config: Config, world: World, mesh: DeviceMesh | None = None
    ) -> None:
        mesh = mesh or mesh_of(config, world)
        split = partial(
            fully_shard,
            mesh=mesh,
            shard_placement_fn=partial(split_dimension, ranks=mesh.size(-1)),
            mp_policy=MixedPrecisionPolicy(
                param_dtype=DTYPES[config.precision.compute],
                reduce_dtype=DTYPES[config.sharding.reduce_dtype],
            ),
        )
        # Each call moves what it splits to the device, so the whole model is never there.
        free = config.sharding.strategy != "fsdp_grad_op" and config.sharding.reshard_after_forward
        for block in blocks(module):
            split(block, reshard_after_forward=free)
        # Embedding and head are needed again at once: None keeps them, which the backward pass begins with.
        split(module, reshard_after_forward=None if free else False)
        self.module = module
        self.optimizer = build_optimizer(module, config.optimizer)
        self._clip_norm = config.optimizer.clip_norm

    def logits(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.module(input_ids=inputs, use_cache=False).logits
        return logits

    def gradients(self, *, complete: bool) -> AbstractContextManager[None]:
        """Every backward pass scatters its gradients: held whole they would take 4 bytes a parameter."""
        return nullcontext()

    def step(self, lr: float) -> Tensor:
        return clip_and_step(self.optimizer, lr, self._clip_norm)

    def discard_gradients(self) -> None:
        self.optimizer.zero_grad()

    def state(self, steps_done: int) -> dict[str, Tensor]:
        return logical_state(self.module.named_parameters(), self.optimizer, steps_done)
