"""Strategies: how model states are split over ranks, behind one small protocol."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from configs.schema import Config, ConfigError
from trainer.distributed import World
from trainer.sharding.logical import Logical


@dataclass(frozen=True)
class Progress:
    """What belongs to the logical state and is a number, the same on every rank."""

    updates: int = 0
    """Optimizer steps that changed the weights; fewer than steps where fp16 overflowed."""
    loss_scale: float | None = None
    """Factor that keeps fp16 gradients from vanishing; none in other formats."""
    steps_at_scale: int = 0
    """Updates since the loss scale last changed."""


class Strategy(Protocol):
    """A model spread over the ranks.

    Gradients are averaged over ranks, so the loop scales its loss by the world size to get sums.
    """

    module: nn.Module
    """The transformers module whose parameters are spread."""

    def logits(self, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
        """Forward pass: ids [rows, T] to logits [rows, T, vocabulary].

        positions: [rows, T], counting from 0 in each document of a row; a token attends to none but its
        own. None for rows that are one text.
        """

    def gradients(self, *, complete: bool) -> AbstractContextManager[None]:
        """Context of one forward and backward pass; after the complete one all ranks' gradients are in."""

    def backward(self, loss: Tensor) -> None:
        """Backward pass of a loss, scaled where the format needs it; only within `gradients`."""

    def step(self, lr: float) -> Tensor:
        """Clip by the global norm, update, clear gradients. Returns the norm before clipping (0-d, fp32).

        A norm that is not finite changes nothing in fp16: the next steps use a smaller loss scale.
        """

    def discard_gradients(self) -> None:
        """Forget gradients that have been accumulated."""

    def state(self) -> dict[str, Logical]:
        """Live logical state by name: weight/NAME of every parameter, exp_avg/NAME and exp_avg_sq/NAME of
        every trained one, fp32, as this rank holds them. What is written into the pieces counts once
        `loaded` is called."""

    def progress(self) -> Progress:
        """The numbers that belong to the state."""

    def loaded(self, progress: Progress) -> None:
        """Go on from what has been written into `state`: fresh copies in other formats, step counts."""


def shard(module: nn.Module, config: Config, world: World) -> Strategy:
    """Spread a model by the configured strategy; its parameters may be on the meta device, without values.

    The parameters' values are undefined until `state` is filled and `loaded` called. Raises ConfigError.
    """
    match config.sharding.strategy:
        case "ddp":
            from trainer.sharding.ddp import Ddp

            return Ddp(module, config, world)
        case "fsdp" | "fsdp_grad_op" | "hsdp":
            from trainer.sharding.fsdp import Fsdp

            return Fsdp(module, config, world)
        case "zero1" | "zero2" | "zero3":
            from trainer.sharding.zero import Zero

            return Zero(module, config, world)
        case "auto":
            raise ConfigError("sharding.strategy=auto: the plan chooses a strategy, resolve it first")
