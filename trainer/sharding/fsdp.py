"""FSDP2: parameters, gradients and optimizer state split over all ranks, gathered block by block."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard

from configs.schema import Config, ConfigError
from trainer.distributed import World
from trainer.model import blocks, forward
from trainer.optimizer import Updater
from trainer.sharding import Progress
from trainer.sharding.logical import Logical, logical

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        sharding = config.sharding
        mesh = mesh or mesh_of(config, world)
        offloaded = sharding.offload == "all"
        pin_memory = sharding.pin_memory and world.device.type == "cuda"
        split = partial(
            fully_shard,
            mesh=mesh,
            shard_placement_fn=partial(split_dimension, ranks=mesh.size(-1)),
            mp_policy=MixedPrecisionPolicy(
                param_dtype=DTYPES[config.precision.compute], reduce_dtype=DTYPES[sharding.reduce_dtype]
            ),
            offload_policy=CPUOffloadPolicy(pin_memory) if offloaded else OffloadPolicy(),
        )
        free = sharding.strategy != "fsdp_grad_op" and sharding.reshard_after_forward
        units: list[Any] = [split(block, reshard_after_forward=free) for block in blocks(module)]
        # Embedding and head are needed again at once: None keeps them, which the backward pass begins with.
        self._root: Any = split(module, reshard_after_forward=None if free else False)
        _materialise(module, torch.device("cpu") if offloaded else world.device)
        _prefetch(units, sharding.prefetch_blocks)
        self.module = module
        self._updater = Updater(module, config)
        self.optimizer = self._updater.optimizer

    def logits(self, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
        return forward(self.module, inputs, positions)

    def gradients(self, *, complete: bool) -> AbstractContextManager[None]:
        """Every backward pass scatters its gradients: held whole they would take 4 bytes a parameter.

        The copies of hsdp are summed in the complete one only.
        """
        self._root.set_requires_all_reduce(complete)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._updater.backward(loss)

    def step(self, lr: float) -> Tensor:
        return self._updater.step(lr)

    def discard_gradients(self) -> None:
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Logical]:
        for part in self.module.modules():  # a forward pass alone, as in an evaluation, leaves some gathered
            if isinstance(part, FSDPModule):
                part.reshard()
        return {name: logical(tensor) for name, tensor in self._updater.tensors()}

    def progress(self) -> Progress:
        return self._updater.progress()

    def loaded(self, progress: Progress) -> None:
        self._updater.loaded(progress)


def _materialise(module: nn.Module, device: torch.device) -> None:
    """Give parts of parameters that are on the meta device room on another one."""
    module._apply(lambda part: torch.empty_like(part, device=device) if part.is_meta else part)


def _prefetch(units: list[Any], count: int) -> None:
    """Gather so many blocks ahead of their use; one is what FSDP does by itself."""
    if count == 1:
        return
    for number, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[number + 1 : number + 1 + count])
        unit.set_modules_to_backward_prefetch(units[max(0, number - count) : number][::-1])
