"""FSDP2: parameters, gradients and optimizer state split over all ranks, gathered block by block."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from configs.schema import Config
from trainer.distributed import World
from trainer.model import blocks
from trainer.optimizer import build_optimizer, clip_and_step, logical_state

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Fsdp:
    def __init__(self, module: nn.Module, config: Config, world: World) -> None:
        split = partial(
            fully_shard,
            mesh=init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",)),
            mp_policy=MixedPrecisionPolicy(
                param_dtype=DTYPES[config.precision.compute],
                reduce_dtype=DTYPES[config.sharding.reduce_dtype],
            ),
        )
        # Each call moves what it splits to the device, so the whole model is never there.
        free = config.sharding.reshard_after_forward
        for block in blocks(module):
            split(block, reshard_after_forward=free)
        # Embedding and head are needed again at once: None keeps them, which the backward pass begins with.
        split(module, reshard_after_forward=None if free else False)
        self.module = module
        self._optimizer = build_optimizer(module, config.optimizer)
        self._clip_norm = config.optimizer.clip_norm

    def logits(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.module(input_ids=inputs, use_cache=False).logits
        return logits

    def gradients(self, *, complete: bool) -> AbstractContextManager[None]:
        """Every backward pass scatters its gradients: held whole they would take 4 bytes a parameter."""
        return nullcontext()

    def step(self, lr: float) -> Tensor:
        return clip_and_step(self._optimizer, lr, self._clip_norm)

    def discard_gradients(self) -> None:
        self._optimizer.zero_grad()

    def state(self, steps_done: int) -> dict[str, Tensor]:
        return logical_state(self.module.named_parameters(), self._optimizer, steps_done)
