"""Speed of the last steps: seconds, tokens per second, MFU and memory."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
import yaml

from configs.compose import ROOT
from configs.schema import Config
from trainer.distributed import World


class Throughput:
    """Collects times between two rows of metrics.jsonl."""

    def __init__(self, config: Config, world: World, flops_per_token: float) -> None:
        self._positions_per_step = config.global_batch * config.model.sequence_length
        self._flops_per_token = flops_per_token
        self._world = world
        self._peak_flops = peak_flops(world.device, config.precision.compute)
        self.restart()

    def restart(self) -> None:
        """Begin a new interval, leaving out what came since the last one (evaluation, saving)."""
        self._began = time.perf_counter()
        self.data_seconds = 0.0
        self.steps = 0
        self._tokens = 0

    def add_step(self, tokens: int) -> None:
        """Count a step on so many target tokens of all ranks."""
        self.steps += 1
        self._tokens += tokens

    def row(self) -> dict[str, Any]:
        """Means over the interval's steps. MFU counts 6 N + 12 L H Q T and is null for an unknown peak.

        Utilisation is the share of computed positions that had a target: less than 1 where rows are padded
        or documents are masked. tokens_per_second counts targets, MFU all positions.
        """
        step_seconds = (time.perf_counter() - self._began) / self.steps
        positions_per_second = self._positions_per_step / step_seconds
        utilisation = self._tokens / (self.steps * self._positions_per_step)
        mfu = None
        if self._peak_flops is not None:
            mfu = self._flops_per_token * positions_per_second / (self._world.size * self._peak_flops)
        return {
            "tokens_per_second": utilisation * positions_per_second,
            "utilisation": utilisation,
            "step_seconds": step_seconds,
            "data_seconds": self.data_seconds / self.steps,
            "mfu": mfu,
            "memory_gib": _peak_memory_bytes(self._world.device) / 2**30,
        }


def peak_flops(device: torch.device, compute: str) -> float | None:
    """Dense peak FLOP/s of the device in a number format, None if it is in no hardware preset."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for file in (ROOT / "hardware").glob("*.yaml"):
        preset = yaml.safe_load(file.read_text())
        if preset.get("device_name") == name:
            tflops = preset.get("peak_tflops", {}).get(compute)
            return None if tflops is None else tflops * 1e12
    return None


def _peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank has held: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
