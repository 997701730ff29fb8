"""A forward and a backward pass on zeros, as the loop does them."""

from __future__ import annotations

import torch

from configs.schema import Config
from trainer import objective
from trainer.distributed import World
from trainer.sharding import Strategy


def pass_on_zeros(strategy: Strategy, config: Config, world: World, *, complete: bool = True) -> None:
    """One micro batch; gradients are left in place. complete: the last micro batch of a step."""
    shape = (config.micro_batch, config.model.sequence_length)
    inputs = torch.zeros(shape, dtype=torch.int64, device=world.device)
    upcast = config.objective.logits == "fp32"
    with strategy.gradients(complete=complete):
        loss = objective.loss_sum(strategy.logits(inputs), inputs, upcast=upcast)
        strategy.backward(loss / inputs.numel())
