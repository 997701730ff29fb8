"""Every rank holds all states; gradients are averaged in buckets during the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from configs.schema import Config
from trainer.distributed import World
from trainer.optimizer import build_optimizer, clip_and_step, logical_state


def replicated(module: nn.Module, config: Config) -> DistributedDataParallel:
    """A module whose backward pass averages gradients over all ranks; gradients are views of its buckets."""
    return DistributedDataParallel(
        module,
        bucket_cap_mb=config.sharding.bucket_mib,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
    )


class Ddp:
    def __init__(
        self,
        module: nn.Module,
        config: Config,
        world: World,
        replicate: Callable[[nn.Module, Config], Any] = replicated,
    ) -> None:
        """replicate: makes a module's stand-in, which may be called and has DDP's no_sync."""
        # A module on the CPU is where it belongs, and fake tensors cannot be moved in place.
        self.module = module if world.device.type == "cpu" else module.to(world.device)
        self._replica = replicate(self.module, config)
        self.optimizer = build_optimizer(self.module, config.optimizer)
        self._clip_norm = config.optimizer.clip_norm
        self._autocast = torch.autocast(
            world.device.type, torch.bfloat16, enabled=config.precision.compute == "bf16"
        )

    def logits(self, inputs: Tensor) -> Tensor:
        with self._autocast:
            logits: Tensor = self._replica(input_ids=inputs, use_cache=False).logits
        return logits

    def gradients(self, *, complete: bool) -> AbstractContextManager[None]:
        if complete:
            return nullcontext()
        unsynchronized: AbstractContextManager[None] = self._replica.no_sync()
        return unsynchronized

    def step(self, lr: float) -> Tensor:
        return clip_and_step(self.optimizer, lr, self._clip_norm)

    def discard_gradients(self) -> None:
        self.optimizer.zero_grad()

    def state(self, steps_done: int) -> dict[str, Tensor]:
        return logical_state(self.module.named_parameters(), self.optimizer, steps_done)
