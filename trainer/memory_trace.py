"""One training step without weights or GPUs: how much memory does the user's own model take?

    python -P -m trainer.memory_trace CONFIG.yaml

prints one JSON object. The model is built, sharded and stepped by the trainer's code, on tensors that have
a size but no bytes (FakeTensorMode) and ranks that are not there (a fake process group), under torch's
memory trackers. A fake tensor lies on the CPU: its sizes are those of a GPU, where attention is one kernel
that keeps no score matrix, but for the allocator's rounding to 512 bytes.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, PreTrainedConfig, masking_utils

from cluster import exit_codes
from configs.load import first_line, load
from configs.schema import Config, ConfigError
from trainer.distributed import World
from trainer.model import architecture_of, prepared
from trainer.rehearsal import pass_on_zeros
from trainer.sharding.ddp import Ddp
from trainer.sharding.fsdp import Fsdp, mesh_of

CATEGORIES = {
    "Parameter": "weights",
    "Sharded Param": "weights",
    "Buffer": "weights",
    "Gradient": "gradients",
    "Sharded Grad": "gradients",
    "Other": "gradients",
    "Optstate": "optimizer",
    "OptState": "optimizer",
    "Unsharded Param": "working",
    "Unsharded Grad": "working",
    "All Gather": "working",
    "Reduce Scatter": "working",
    "Activation": "activations",
    "Inputs": "activations",
    "Temp": "backward",
}
"""The trackers' words -> ours. Other are DDP's buckets, which gradients are views of; backward is what the
backward pass makes and frees, logits' gradients among it."""


def trace(config: Config, architecture: PreTrainedConfig | None = None) -> dict[str, Any]:
    """Peak of one step of one rank, GiB in all and by category, and in which part of the step it is.

    architecture: another than the configured model's.
    Raises ConfigError for a configuration that the trainer does not train.
    """
    began = time.monotonic()
    _check(config)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.world_size)
    world = World(0, config.world_size, torch.device("cpu"), dist.group.WORLD)  # type: ignore[arg-type]
    try:
        peak, moment = _traced(config, architecture or architecture_of(config.model), world)
    finally:
        world.leave()
    by_category = Counter[str]()
    for word, count in peak.items():
        by_category[CATEGORIES[word]] += count
    return {
        "strategy": config.sharding.strategy,
        "world_size": config.world_size,
        "peak_gib": by_category.total() / 2**30,
        "by_category_gib": {name: count / 2**30 for name, count in by_category.items() if count},
        "moment": moment,
        "seconds": time.monotonic() - began,
        "torch": torch.__version__,
    }


def _check(config: Config) -> None:
    """Refuse what the trainer has no code for; it has all that hsdp needs."""
    strategy = config.sharding.strategy
    if strategy not in ("ddp", "fsdp", "fsdp_grad_op", "hsdp"):
        raise ConfigError(
            f"sharding.strategy={strategy}: cannot be traced, choose ddp, fsdp, fsdp_grad_op or hsdp"
        )
    allowed: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "sharding.offload": (config.sharding.offload, ("none",)),
        "precision.compute": (config.precision.compute, ("fp32", "bf16")),
        "precision.weights": (config.precision.weights, ("fp32",)),
        "optimizer.kind": (config.optimizer.kind, ("adamw",)),
        "objective.logits": (config.objective.logits, ("fp32", "bf16")),
        "model.lora_rank": (config.model.lora_rank, (None,)),
        "model.frozen_blocks": (config.model.frozen_blocks, (0,)),
        "plan.tensor_parallel": (config.plan.tensor_parallel, (1,)),
        "plan.pipeline_parallel": (config.plan.pipeline_parallel, (1,)),
        "plan.context_parallel": (config.plan.context_parallel, (1,)),
    }
    for key, (value, values) in allowed.items():
        if value not in values:
            choices = " or ".join("none" if choice is None else str(choice) for choice in values)
            raise ConfigError(f"{key}={value}: cannot be traced, choose {choices}")


def _traced(config: Config, architecture: PreTrainedConfig, world: World) -> tuple[dict[str, int], str]:
    """Bytes by the tracker's categories at the peak of a step, and in which part of the step it is."""
    mesh = mesh_of(config, world)  # holds ranks' numbers, so its tensors must be real
    with _rows_are_full(), FakeTensorMode(allow_non_fake_inputs=True):
        module = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
        prepared(module, config.model_copy(update={"compile": False}))
        strategy: Ddp | Fsdp
        tracker: MemTracker
        if config.sharding.strategy == "ddp":
            buckets = _Buckets(module)
            strategy = Ddp(module, config, world, lambda *_: buckets)
            tracker = MemTracker()
            tracker.track_external(*buckets.views.values())
        else:
            strategy = Fsdp(module, config, world, mesh)
            tracker = FSDPMemTracker(module, strategy.optimizer)
        # The first optimizer step makes the moments, and DTensor's bookkeeping would be counted.
        _step(strategy, config, world, tracker)
        tracker.track_external(module, strategy.optimizer)
        with tracker:
            moment = _step(strategy, config, world, tracker)
        snapshot = tracker.get_tracker_snapshot("peak")[world.device]
    return {getattr(key, "value", key): count for key, count in snapshot.items() if key != "Total"}, moment


@contextmanager
def _rows_are_full() -> Iterator[None]:
    """Tell transformers what it else reads from positions and masks: a row is one sequence, not padded.

    Knowing it, it leaves the causal mask to the attention kernel; without, it makes one of T x T.
    """
    packed, skips = masking_utils.find_packed_sequence_indices, masking_utils._ignore_causal_mask_sdpa
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    masking_utils._ignore_causal_mask_sdpa = lambda padding, *sizes, **others: skips(None, *sizes, **others)
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = packed
        masking_utils._ignore_causal_mask_sdpa = skips


class _Buckets:
    """What DDP does with memory; its own reducer, written in C++, reads tensors' bytes.

    Buckets as large as all gradients stay. A gradient moves into its bucket as soon as it is complete;
    one that is still to be added to, under no_sync, lies outside.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._complete = True
        self.views: dict[Tensor, Tensor] = {
            parameter: torch.empty_like(parameter) for parameter in module.parameters()
        }
        for parameter in self.views:
            parameter.register_post_accumulate_grad_hook(self._move)

    def __call__(self, **inputs: Any) -> Any:
        return self._module(**inputs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self._complete = False
        yield
        self._complete = True

    def _move(self, parameter: Tensor) -> None:
        if self._complete:
            assert parameter.grad is not None
            self.views[parameter].copy_(parameter.grad)
            parameter.grad = self.views[parameter]


def _step(strategy: Ddp | Fsdp, config: Config, world: World, tracker: MemTracker) -> str:
    """One step of at most two micro batches (a third meets what the second does); says where the peak is."""
    micro_batches = min(2, config.accumulation)
    for number in range(micro_batches):
        tracker.reset_mod_stats()
        pass_on_zeros(strategy, config, world, complete=number + 1 == micro_batches)
    peak = tracker.get_tracker_snapshot("peak")
    strategy.step(config.optimizer.lr)
    return "backward" if tracker.get_tracker_snapshot("peak") == peak else "optimizer"


def main() -> int:
    warnings.simplefilter("ignore")
    try:
        answer = trace(load(Path(sys.argv[1])))
    except ConfigError as error:
        print(f"trainyard: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except Exception as error:  # whatever a model's own code does with tensors that have no bytes
        print(f"trainyard: cannot be traced: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    print(json.dumps(answer))
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
