"""Models without weights: built on the meta device, with a record of how their weights would have come about.

A model is constructed as ever, but each parameter loses its numbers as soon as a module takes it; buffers
keep theirs. Meanwhile it is written down what constructors and transformers' initialisation do to the
parameters. Done again in that order, on one parameter at a time, it draws the same random numbers as a
model that is built in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

OVERWRITING = {"normal_", "uniform_", "fill_", "zero_", "copy_"}


@dataclass(frozen=True)
class Write:
    """An in-place operation on a parameter, or on a part of it."""

    view: Tensor
    """What was written to, on the meta device."""
    operator: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def storage(self) -> int:
        return storage_of(self.view)

    @property
    def draws(self) -> bool:
        return torch.Tag.nondeterministic_seeded in self.operator.tags

    @property
    def overwrites(self) -> bool:
        """Whether nothing is left of what was there before."""
        every = self.view.numel() * self.view.element_size() == self.view.untyped_storage().nbytes()
        return every and self.operator.overloadpacket.__name__ in OVERWRITING

    def repeat(self, numbers: Tensor, generator: torch.Generator) -> None:
        """Do it again. numbers: 1-d, all of the parameter."""
        view = numbers.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset())
        drawn = {"generator": generator} if self.draws else {}
        self.operator(view, *self.arguments, **self.options | drawn)


@dataclass
class Recording:
    """What was done to the parameters of a skeleton, in order."""

    writes: list[Write] = field(default_factory=list)
    given: dict[int, Tensor] = field(default_factory=dict)
    """Numbers that a parameter was made with, unless they have been overwritten, by storage."""
    taken: list[Tensor] = field(default_factory=list)
    """Every parameter there ever was; as long as they live no two storages have the same key."""
    repeatable: bool = True
    """Whether all random numbers were drawn in a way that can be repeated."""

    def replay(self, parameters: dict[str, Tensor], seed: int) -> Iterator[tuple[str, Tensor]]:
        """Name and numbers of each parameter, one at a time. seed: of the random numbers."""
        names = {storage_of(parameter): name for name, parameter in parameters.items()}
        first: dict[int, int] = {}  # writes before an overwriting one only move the random numbers on
        last: dict[int, int] = {}
        for number, write in enumerate(self.writes):
            last[write.storage] = number
            if write.overwrites or write.storage not in first:
                first[write.storage] = number
        for storage in names.keys() - last.keys():
            yield names[storage], self.given[storage]
        generator = torch.Generator().manual_seed(seed)
        numbers: dict[int, Tensor] = {}
        for number, write in enumerate(self.writes):
            storage = write.storage
            if number < first[storage]:
                if write.draws:
                    write.repeat(_flat(write.view), generator)
                continue
            if number == first[storage]:
                given = self.given.get(storage)
                numbers[storage] = _flat(write.view) if given is None else given.flatten().clone()
            write.repeat(numbers[storage], generator)
            if number == last[storage]:
                whole = numbers.pop(storage)
                if storage in names:
                    yield names[storage], whole.view(parameters[names[storage]].shape)


class _Recorder(TorchDispatchMode):
    """Writes down what happens to tensors on the meta device."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        target = func._schema.arguments[0].alias_info if func._schema.arguments else None
        if target is not None and target.is_write and args[0].is_meta:
            others = [value for value in (*args[1:], *options.values()) if isinstance(value, Tensor)]
            self._recording.repeatable &= not any(value.is_meta for value in others)
            write = Write(args[0].detach(), func, args[1:], options)
            self._recording.writes.append(write)
            if write.overwrites:
                self._recording.given.pop(write.storage, None)
        elif torch.Tag.nondeterministic_seeded in func.tags:
            self._recording.repeatable = False
        return result


@contextmanager
def _without_numbers(recording: Recording) -> Iterator[None]:
    """Parameters that a module is given are replaced by ones on the meta device."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            numbers = parameter.data
            parameter = nn.Parameter(torch.empty_like(numbers, device="meta"), parameter.requires_grad)
            recording.taken.append(parameter)
            recording.given[storage_of(parameter)] = numbers
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def skeleton(architecture: PreTrainedConfig) -> tuple[PreTrainedModel, Recording]:
    """A causal language model whose parameters are on the meta device, fp32, and buffers on the CPU."""
    recording = Recording()
    with _without_numbers(recording), _Recorder(recording):
        module: PreTrainedModel = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
    return module, recording


def materialise(module: nn.Module, device: torch.device) -> None:
    """Move to a device; parameters without numbers get room there, shared ones stay shared."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta:
                if parameter not in made:
                    numbers = torch.empty_like(parameter, device=device)
                    made[parameter] = nn.Parameter(numbers, parameter.requires_grad)
                setattr(owner, name, made[parameter])
    if device.type != "cpu":  # where it is already, and fake tensors cannot be moved in place
        module.to(device)


def storage_of(tensor: Tensor) -> int:
    """A key that tensors have in common if they share their numbers."""
    key: int = tensor.untyped_storage()._cdata
    return key


def _flat(view: Tensor) -> Tensor:
    """Room for all numbers of the parameter that is seen in a view."""
    return torch.empty(view.untyped_storage().nbytes() // view.element_size(), dtype=view.dtype)
