"""Every rank holds all states; gradients are averaged in buckets during the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from configs.schema import Config
from trainer.distributed import World
from trainer.model import forward
from trainer.optimizer import Updater
from trainer.sharding import Progress
from trainer.sharding.logical import Logical, logical
from trainer.skeleton import materialise

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def replicated(module: nn.Module, config: Config) -> DistributedDataParallel:
    """A module whose backward pass averages gradients over all ranks; gradients are views of its buckets."""
    replica = DistributedDataParallel(
        module,
        bucket_cap_mb=config.sharding.bucket_mib,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
        init_sync=False,  # ranks fill their weights themselves, with the same numbers
        static_graph=True,
    )
    if config.sharding.reduce_dtype == "bf16":
        # By its own name DDP would refuse the hook where there is no NCCL.
        replica.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    return replica


class Ddp:
    def __init__(
        self,
        module: nn.Module,
        config: Config,
        world: World,
        replicate: Callable[[nn.Module, Config], Any] = replicated,
    ) -> None:
        """replicate: makes a module's stand-in, which may be called and has DDP's no_sync."""
        materialise(module, world.device)
        self.module = module
        self._replica = replicate(module, config)
        self._updater = Updater(module, config)
        self.optimizer = self._updater.optimizer
        self._world = world
        format = AUTOCAST.get(config.precision.compute)
        self._autocast = torch.autocast(world.device.type, format, enabled=format is not None)

    def logits(self, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
        with self._autocast:
            return forward(self._replica, inputs, positions)

    def gradients(self, *, complete: bool) -> AbstractContextManager[None]:
        if complete:
            return nullcontext()
        unsynchronized: AbstractContextManager[None] = self._replica.no_sync()
        return unsynchronized

    def backward(self, loss: Tensor) -> None:
        self._updater.backward(loss)

    def step(self, lr: float) -> Tensor:
        return self._updater.step(lr)

    def discard_gradients(self) -> None:
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Logical]:
        rank, ranks = self._world.rank, self._world.size
        return {name: logical(tensor, rank, ranks) for name, tensor in self._updater.tensors()}

    def progress(self) -> Progress:
        return self._updater.progress()

    def loaded(self, progress: Progress) -> None:
        self._updater.loaded(progress)
