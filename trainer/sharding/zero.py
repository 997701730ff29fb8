"""DeepSpeed ZeRO: optimizer states, then gradients, then weights in flat partitions, one per rank.

DeepSpeed strings the parameters of an optimizer group together and gives each rank an equal part (zero1,
zero2), or cuts every parameter into equal parts (zero3). Either way a rank holds consecutive numbers of a
parameter in fp32, and they are copied to the compute format after every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import Config
from trainer.distributed import World
from trainer.loss_scale import loss_scale_of
from trainer.model import forward
from trainer.optimizer import build_optimizer, set_updates
from trainer.sharding import Progress
from trainer.sharding.logical import Logical, flat_range
from trainer.sharding.zero_engine import materialize, refuse, settings_of, start
from trainer.sharding.zero_frozen import Frozen


@dataclass(frozen=True)
class Run:
    """Consecutive numbers of a parameter: where they begin in it, and which part of a partition they are."""

    start: int
    partition: Tensor
    part: slice

    def of(self, tensor: Tensor) -> Tensor:
        """This run's numbers in a tensor that is laid out as the partition is."""
        return tensor.detach()[self.part]


class Zero:
    def __init__(self, module: nn.Module, config: Config, world: World) -> None:
        refuse(config, world)
        self.module = module
        self._world = world
        settings = settings_of(config, sum(parameter.numel() for parameter in module.parameters()))
        # Groups are made while parameters still have their shapes: matrices decay, vectors do not.
        self.optimizer = build_optimizer(module, config.optimizer)
        materialize(module, config, world.device, settings)
        self._engine = start(module, self.optimizer, settings)
        self._splits_weights = config.sharding.strategy == "zero3"
        self._runs = dict(self._trained())
        for partition in {run.partition for run in self._runs.values() if run}:
            self.optimizer.state[partition] = {
                "step": torch.zeros((), dtype=torch.float32, device=partition.device),
                "exp_avg": torch.zeros_like(partition),
                "exp_avg_sq": torch.zeros_like(partition),
            }
        self._frozen = {
            name: Frozen.part_of(parameter, world)
            for name, parameter in module.named_parameters()
            if not parameter.requires_grad
        }
        self._updates = 0
        self._diverged = False
        self._scale = loss_scale_of(config.precision)
        self._set_scale()

    def logits(self, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
        return forward(self._engine, inputs, positions)

    def gradients(self, *, complete: bool) -> AbstractContextManager[None]:
        """zero1 reduces in the complete pass; zero2 and zero3 in every pass, as a rank keeps a part only."""
        self._engine.set_gradient_accumulation_boundary(complete)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        finite: bool = self._engine.was_step_applied()
        self._updates += finite
        if self._scale is not None:
            self._scale.update(finite)
            self._set_scale()
        norm = torch.as_tensor(
            self._engine.get_global_grad_norm(), dtype=torch.float32, device=self._world.device
        )
        # DeepSpeed leaves out a step whose norm is not finite, in any format; but a run without a loss scale
        # has diverged then, and the norm says so until that is noticed.
        self._diverged |= self._scale is None and not finite
        return torch.full_like(norm, torch.inf) if self._diverged or not finite else norm

    def discard_gradients(self) -> None:
        partitions = self._engine.optimizer
        partitions.zero_grad()
        for name in ("averaged_gradients", "all_grad_tensors"):
            gradients = getattr(partitions, name, {})
            gradients.update(dict.fromkeys(gradients))
        if getattr(partitions, "cpu_offload", False):
            partitions.reset_cpu_buffers()
            # Passes since the last step: in host memory the first replaces gradients, others add to them.
            partitions.micro_step_id = -1

    def state(self) -> dict[str, Logical]:
        state = {}
        for name, parameter in self.module.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if (frozen := self._frozen.get(name)) is not None:
                pieces = flat_range(shape, frozen.start, frozen.numbers)
                state[f"weight/{name}"] = Logical(shape, tuple(pieces))
                continue
            run = self._runs[name]
            tensors = self.optimizer.state[run.partition] | {"weight": run.partition} if run else {}
            for key in ("weight", "exp_avg", "exp_avg_sq"):
                pieces = flat_range(shape, run.start, run.of(tensors[key])) if run else []
                state[f"{key}/{name}"] = Logical(shape, tuple(pieces))
        return state

    def progress(self) -> Progress:
        if self._scale is None:
            return Progress(self._updates)
        return Progress(self._updates, self._scale.scale, self._scale.steps_at_scale)

    @torch.no_grad()
    def loaded(self, progress: Progress) -> None:
        self._updates = progress.updates
        set_updates(self.optimizer, progress.updates)
        if self._scale is not None:
            self._scale.loaded(progress)
            self._set_scale()
        if self._splits_weights:
            self._copy_to_parameters()
        else:
            self._engine.optimizer.update_lp_params()
        for frozen in self._frozen.values():
            frozen.spread(self._world)

    def _set_scale(self) -> None:
        if self._scale is not None:
            self._engine.optimizer.override_loss_scale(self._scale.scale)

    def _copy_to_parameters(self) -> None:
        """zero3: from the partitions to what parameters are gathered from, of which no old copy stays."""
        self._engine.optimizer.empty_partition_cache()
        for name, parameter in _parameters(self.module):
            parameter.ds_secondary_tensor = None
            if (run := self._runs.get(name)) is not None:
                numbers = run.of(run.partition)
                parameter.ds_tensor[: len(numbers)].copy_(numbers)

    def _trained(self) -> Iterator[tuple[str, Run | None]]:
        """This rank's run of every trained parameter; none where it holds nothing of it."""
        for name, parameter in _parameters(self.module):
            if parameter.requires_grad:
                yield name, self._own_part(parameter) if self._splits_weights else self._mapped(parameter)

    def _own_part(self, parameter: Any) -> Run | None:
        """zero3: each rank has as many numbers of a parameter, if it has so many; the rest is padding."""
        partitions = self._engine.optimizer
        number, begin, size = partitions.grad_position[partitions.get_param_id(parameter)]
        start = self._world.rank * size
        size = min(size, parameter.ds_numel - start)
        if size <= 0:
            return None
        return Run(start, partitions.fp32_partitioned_groups_flat[number], slice(begin, begin + size))

    def _mapped(self, parameter: Any) -> Run | None:
        """zero1, zero2: where a parameter overlaps with this rank's partition of its group."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        (partition,) = self.optimizer.param_groups[mapping.param_group_index]["params"]
        there = mapping.get_hp_fragment_address()
        return Run(
            mapping.lp_fragment_address.start, partition, slice(there.start, there.start + there.numel)
        )


def _parameters(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and parameters, to which DeepSpeed has added attributes."""
    return module.named_parameters()
