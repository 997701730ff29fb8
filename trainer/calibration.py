"""A few real steps of the user's model on this machine's devices: how fast, and how much is reserved?

    python -P -m trainer.calibration CONFIG.yaml

prints one JSON object. One worker per device, or as many as configured on a machine without GPUs, with the
configured strategy, formats and micro batch. A model that is too large or too slow for one machine is cut to
its first blocks: they are all alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from cluster import exit_codes
from cluster.environment import local_placement
from cluster.signals import die_with_parent
from configs.load import first_line, load
from configs.schema import Config, ConfigError
from trainer.adapters import choose_trained
from trainer.distributed import World
from trainer.memory_trace import trace
from trainer.model import architecture_of, blocks, prepared
from trainer.rehearsal import pass_on_zeros
from trainer.sharding import Progress, shard
from trainer.skeleton import skeleton

WARM_UP_STEPS, LEAST_STEPS, MOST_STEPS = 1, 2, 20
ENOUGH_SECONDS = 10.0
MEMORY_SHARE = 0.8
"""Of the free memory of a device; on CPU of what the system calls available."""
SOME_WEIGHT = 0.02
"""Speed does not depend on the numbers, unless they are denormal or not finite."""
CPU_STEP_FLOPS = 2e11
"""Of all workers of a machine without GPUs; some seconds of work."""
PROBE_BYTES = 2**26
PROBES = 5
POLL_SECONDS = 0.1


def blocks_that_fit(config: Config) -> int:
    """Blocks of the model that can be stepped here: all, or all halved until they fit.

    Raises ConfigError when one block is too much.
    """
    layers = whole = int(architecture_of(config.model).num_hidden_layers)
    while True:
        architecture = shortened(config, layers)
        with torch.device("meta"):
            module: nn.Module = AutoModelForCausalLM.from_config(architecture)
        parameters = sum(parameter.numel() for parameter in module.parameters())
        flops = 6 * parameters * config.micro_batch * config.model.sequence_length * config.gpus_per_node
        if layers == 1 or torch.cuda.is_available() or flops <= CPU_STEP_FLOPS:
            needed, free = trace(config, architecture)["peak_gib"], _free_gib(config)
            if needed <= free:
                return layers
            if layers == 1:
                raise ConfigError(
                    f"micro_batch={config.micro_batch}: a step of 1 of {whole} blocks needs {needed:.1f} GiB "
                    f"of {free:.1f} free; lower micro_batch or model.sequence_length"
                )
        layers //= 2


def shortened(config: Config, layers: int) -> PreTrainedConfig:
    """The architecture with its first blocks only."""
    architecture = architecture_of(config.model)
    architecture.num_hidden_layers = layers
    if getattr(architecture, "layer_types", None):
        architecture.layer_types = architecture.layer_types[:layers]
    return architecture


def measure(config: Config, layers: int) -> dict[str, Any]:
    """What one worker measures; the same on all. Needs the environment that an agent gives its workers."""
    world = World.join()
    seconds = _step_seconds(config, layers, world)
    timed = sorted(seconds[WARM_UP_STEPS:])
    on_gpu = world.device.type == "cuda"
    answer = {
        "device_name": torch.cuda.get_device_name(world.device) if on_gpu else None,
        "workers": world.size,
        "strategy": config.sharding.strategy,
        "layers": layers,
        "step_seconds": timed[len(timed) // 2],
        "tokens_per_step": config.micro_batch * config.model.sequence_length,
        "all_reduce_gb_s": _all_reduce_gb_s(world),
        "reserved_over_active": (
            torch.cuda.max_memory_reserved() / torch.cuda.max_memory_allocated() if on_gpu else None
        ),
        "torch": torch.__version__,
    }
    world.leave()
    return answer


def _step_seconds(config: Config, layers: int, world: World) -> list[float]:
    """Seconds of each step. The model is gone afterwards: it must not outlive the process group."""
    module = skeleton(shortened(config, layers))[0]
    choose_trained(module, config.model, blocks(module))
    strategy = shard(prepared(module, config), config, world)
    for tensor in strategy.state().values():
        for piece in tensor.pieces:
            piece.tensor.fill_(SOME_WEIGHT)
    strategy.loaded(Progress())
    seconds: list[float] = []
    while len(seconds) < WARM_UP_STEPS + LEAST_STEPS or (
        len(seconds) < MOST_STEPS and world.from_main(sum(seconds[WARM_UP_STEPS:])) < ENOUGH_SECONDS
    ):
        _wait(world)
        began = time.perf_counter()
        pass_on_zeros(strategy, config, world)
        strategy.step(config.optimizer.lr)
        _wait(world)
        seconds.append(time.perf_counter() - began)
    return seconds


def _wait(world: World) -> None:
    """Until all ranks have done what they were given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    world.barrier()


def _all_reduce_gb_s(world: World) -> float | None:
    """GB/s that a rank sends, and receives, while all sum a tensor in a ring; none with one rank.

    A ring sends 2 (n - 1) / n of the tensor's bytes.
    """
    if world.size == 1:
        return None
    tensor = torch.ones(PROBE_BYTES // 4, device=world.device)
    best = float("inf")
    for _ in range(PROBES):
        _wait(world)
        began = time.perf_counter()
        dist.all_reduce(tensor)
        _wait(world)
        best = min(best, time.perf_counter() - began)
    return 2 * (world.size - 1) / world.size * PROBE_BYTES / best / 1e9


def _free_gib(config: Config) -> float:
    """Memory that one worker may take."""
    if torch.cuda.is_available():
        return MEMORY_SHARE * float(torch.cuda.mem_get_info()[0]) / 2**30
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return MEMORY_SHARE * pages / config.gpus_per_node / 2**30


def on_this_machine(config: Config) -> Config:
    """The run on one node, a worker per device. Raises ConfigError when the hardware is another."""
    workers, device = config.gpus_per_node, None
    if torch.cuda.is_available():
        workers, device = min(workers, torch.cuda.device_count()), torch.cuda.get_device_name(0)
    if config.hardware.device_name != device:
        raise ConfigError(
            f"hardware={config.hardware.name}: this machine has {device or 'no GPU'}, "
            f"choose {'its preset' if device else 'hardware=cpu'}"
        )
    return config.model_copy(
        update={"nodes": 1, "gpus_per_node": workers, "global_batch": config.micro_batch * workers}
    )


def measure_all(file: Path) -> dict[str, Any]:
    """Choose the size, then let one process per worker measure."""
    config = on_this_machine(load(file))
    layers, placement = blocks_that_fit(config), local_placement()
    command = [sys.executable, "-P", "-m", "trainer.calibration", str(file), str(layers)]
    workers = [
        subprocess.Popen(
            command,
            env=placement.worker_environment(rank, config.gpus_per_node, attempt=1),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(config.gpus_per_node)
    ]
    codes: list[int | None] = [None]
    while None in codes and not any(codes):  # one that failed leaves the others waiting for it
        time.sleep(POLL_SECONDS)
        codes = [worker.poll() for worker in workers]
    for worker, code in zip(workers, codes, strict=True):
        if code:
            for other in workers:
                other.kill()
            lines = worker.communicate()[1].strip().splitlines() or [f"worker ended with {code}"]
            raise ConfigError(f"calibration failed: {lines[-1].removeprefix('trainyard: ')}")
    answer: dict[str, Any] = json.loads(workers[0].communicate()[0].splitlines()[-1])
    return answer


def main() -> int:
    warnings.simplefilter("ignore")
    die_with_parent()
    file = Path(sys.argv[1])
    try:
        layers = int(sys.argv[2]) if len(sys.argv) > 2 else None  # only a worker is told
        answer = measure_all(file) if layers is None else measure(on_this_machine(load(file)), layers)
    except ConfigError as error:
        print(f"trainyard: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except Exception as error:  # of torch's many kinds, out of memory among them
        print(f"trainyard: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
        return exit_codes.MISSING_FROM_ENVIRONMENT
    print(json.dumps(answer))
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
