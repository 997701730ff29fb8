"""The process group: who this rank is, and what ranks tell each other on the host."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This rank among all ranks, its device, and a gloo group for small host messages.

    The host group is separate from the one that moves gradients, so that a message about stopping
    or saving never waits for the device.
    """

    rank: int
    size: int
    device: torch.device
    host: dist.ProcessGroup

    @classmethod
    def join(cls) -> World:
        """Join the process group that the agent's environment variables describe."""
        local_rank = int(os.environ["LOCAL_RANK"])
        if torch.cuda.is_available():
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
        else:
            device = torch.device("cpu")
            dist.init_process_group("gloo", timeout=TIMEOUT)
        host = dist.new_group(backend="gloo", timeout=TIMEOUT)
        assert host is not None
        return cls(dist.get_rank(), dist.get_world_size(), device, host)

    @property
    def main(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a host tensor to the device; on a GPU without making the host wait."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def sum(self, *numbers: int) -> list[int]:
        """Sums over all ranks of whole numbers, on the host."""
        tensor = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(tensor, group=self.host)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host)
        return box[0]

    def barrier(self) -> None:
        dist.barrier(group=self.host)

    def leave(self) -> None:
        dist.destroy_process_group()
