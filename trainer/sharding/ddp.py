"""Every rank holds all states; gradients are averaged in buckets during the backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from configs.schema import Config
from trainer.distributed import World
from trainer.optimizer import build_optimizer, clip_and_step, logical_state


class Ddp:
    def __init__(self, module: nn.Module, config: Config, world: World) -> None:
        self.module = module.to(world.device)
        self._wrapped = DistributedDataParallel(
            self.module,
            bucket_cap_mb=config.sharding.bucket_mib,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
        )
        self._optimizer = build_optimizer(self.module, config.optimizer)
        self._clip_norm = config.optimizer.clip_norm
        self._autocast = torch.autocast(
            world.device.type, torch.bfloat16, enabled=config.precision.compute == "bf16"
        )

    def logits(self, inputs: Tensor) -> Tensor:
        with self._autocast:
            logits: Tensor = self._wrapped(input_ids=inputs, use_cache=False).logits
        return logits

    def gradients(self, *, complete: bool) -> AbstractContextManager[None]:
        return nullcontext() if complete else self._wrapped.no_sync()

    def step(self, lr: float) -> Tensor:
        return clip_and_step(self._optimizer, lr, self._clip_norm)

    def discard_gradients(self) -> None:
        self._optimizer.zero_grad()

    def state(self, steps_done: int) -> dict[str, Tensor]:
        return logical_state(self.module.named_parameters(), self._optimizer, steps_done)
