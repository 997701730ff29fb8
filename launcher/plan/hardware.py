"""Which accelerator is it? The catalogue in configs/hardware, and the speed of this machine."""

from __future__ import annotations

import re
import time
from functools import cache
from pathlib import Path

import yaml

from configs.schema import ConfigError, Hardware

CATALOGUE = Path(__file__).parents[2] / "configs" / "hardware"
USABLE = 0.989
"""Share of the memory in a card's name that a program gets, where no preset says: 79.1 GiB of 80."""
COMMON = {"v100": "v100-sxm2-32gb", "a100": "a100-sxm-80gb", "h100": "h100-sxm-80gb"}
"""What a name without form factor and memory means."""


@cache
def catalogue() -> dict[str, Hardware]:
    """Every preset by name."""
    return {
        file.stem: Hardware.model_validate({**yaml.safe_load(file.read_text()), "name": file.stem})
        for file in sorted(CATALOGUE.glob("*.yaml"))
    }


def hardware_named(text: str) -> Hardware:
    """The preset that a name like A100-80GB, h100_80gb, "H100 PCIe" or V100 means.

    A memory size that no preset of the family has gives the common preset with that memory.
    Raises ConfigError for a family that is not in the catalogue.
    """
    words = re.findall(r"[a-z0-9]+", text.lower())
    joined = "".join(word for word in words if word not in ("nvidia", "amd", "geforce", "instinct"))
    family = next((known for known in _families() if joined.startswith(known)), None)
    if family is None:
        raise ConfigError(f"hardware={text}: no such preset; allowed: {', '.join(catalogue())}")
    gigabytes = re.search(r"(\d+)gb", joined.removeprefix(family))
    common = COMMON.get(family)
    members = [name for name in catalogue() if name.split("-")[0] == family and _is_pcie(name, words)]
    nearest = common if common in members else members[0]
    if gigabytes is None or gigabytes[0] in nearest:
        return catalogue()[nearest]
    for name in members:
        if name.endswith(f"-{gigabytes[0]}"):
            return catalogue()[name]
    return catalogue()[nearest].model_copy(update={"name": text, "memory_gib": int(gigabytes[1]) * USABLE})


def _is_pcie(name: str, words: list[str]) -> bool:
    """Whether a preset has the form factor that the words ask for; PCIe only where it is asked for."""
    return ("pcie" in name) == ("pcie" in words)


def _families() -> list[str]:
    """First words of the presets' names, longest first."""
    return sorted({name.split("-")[0] for name in catalogue()}, key=len, reverse=True)


def on_gpu(hardware: Hardware) -> bool:
    """Whether plans are made for an accelerator rather than for the processors of a machine."""
    return hardware.device_name is not None


@cache
def machine_flops_per_second() -> float:
    """Fastest of several float32 matrix products on all cores of this machine."""
    import numpy as np  # a third of a plan's start-up, and only plans for this machine need it

    size, tries = 1024, 4
    matrix = np.ones((size, size), np.float32)
    fastest_seconds = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        matrix @ matrix
        fastest_seconds = min(fastest_seconds, time.perf_counter() - start)
    return 2 * size**3 / fastest_seconds
