"""Parameters that DeepSpeed's optimizer does not hold, because they are not trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed import World


@dataclass(frozen=True)
class Frozen:
    """A rank's share of a parameter: consecutive numbers in fp32, on the host unless the model is fp32.

    DeepSpeed keeps frozen parameters in the compute format only: whole (zero1, zero2) or split (zero3).
    """

    parameter: Any
    start: int
    held: Tensor
    """The share as DeepSpeed has it, in the compute format."""
    numbers: Tensor
    """The share in fp32; `held` itself where that is fp32."""

    @classmethod
    def part_of(cls, parameter: Any, world: World) -> Frozen:
        size = _share(parameter, world)
        start = world.rank * size
        if (own := getattr(parameter, "ds_tensor", None)) is not None:
            held = own.detach()[: max(0, parameter.ds_numel - start)]
        else:
            held = parameter.detach().view(-1)[start : start + size]
        exact = held.dtype == torch.float32
        numbers = held if exact else torch.empty(held.shape, dtype=torch.float32, device="cpu")
        return cls(parameter, start, held, numbers)

    def spread(self, world: World) -> None:
        """Bring what has been written into `numbers` to where DeepSpeed, on all ranks, has it."""
        if self.numbers is not self.held:
            self.held.copy_(self.numbers)
        if hasattr(self.parameter, "ds_tensor"):
            return
        share = self.held.new_zeros(_share(self.parameter, world))
        share[: len(self.held)] = self.held
        whole = share.new_empty(world.size * len(share))
        dist.all_gather(list(whole.chunk(world.size)), share)
        self.parameter.detach().view(-1).copy_(whole[: self.parameter.numel()])


def _share(parameter: Any, world: World) -> int:
    """Numbers that a rank holds; the last ranks may hold fewer."""
    numbers: int = getattr(parameter, "ds_numel", parameter.numel())
    return -(-numbers // world.size)
