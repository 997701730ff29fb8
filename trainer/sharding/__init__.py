"""Strategies: how model states are split over ranks, behind one small protocol."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from configs.schema import Config, ConfigError
from trainer.distributed import World


class Strategy(Protocol):
    """A model spread over the ranks.

    Gradients are averaged over ranks, so the loop scales its loss by the world size to get sums.
    """

    module: nn.Module
    """The transformers module whose parameters are spread."""

    def logits(self, inputs: Tensor) -> Tensor:
        """Forward pass: ids [rows, T] to logits [rows, T, vocabulary]."""

    def gradients(self, *, complete: bool) -> AbstractContextManager[None]:
        """Context of one forward and backward pass; after the complete one all ranks' gradients are in."""

    def step(self, lr: float) -> Tensor:
        """Clip by the global norm, update, clear gradients. Returns the norm before clipping (0-d)."""

    def discard_gradients(self) -> None:
        """Forget gradients that have been accumulated."""

    def state(self, steps_done: int) -> dict[str, Tensor]:
        """Live logical state by fully-qualified name: fp32 weights and optimizer moments, sharded as held."""


def shard(module: nn.Module, config: Config, world: World) -> Strategy:
    """Spread a model that is whole on every rank's CPU by the configured strategy. Raises ConfigError."""
    match config.sharding.strategy:
        case "ddp":
            from trainer.sharding.ddp import Ddp

            return Ddp(module, config, world)
        case "fsdp" | "fsdp_grad_op":
            from trainer.sharding.fsdp import Fsdp

            return Fsdp(module, config, world)
        case other:
            raise ConfigError(f"sharding.strategy={other}: not trained yet, use ddp, fsdp or fsdp_grad_op")
