"""Weights of a Hugging Face checkpoint, read slice by slice where its files allow it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.utils.hub import cached_file

from configs.schema import ConfigError
from trainer.sharding.logical import Sliceable

CASTABLE = ("F64", "F32", "BF16", "F16")
"""Number formats, in safetensors' words, that become fp32 by a cast alone."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor of a checkpoint is, and what it is like."""

    file: str
    shape: torch.Size
    format: str


@dataclass(frozen=True)
class _Stored:
    """A tensor in an open file: what is indexed is read."""

    slices: Any

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        read: Tensor = self.slices[index]
        return read


def pretrained_weights(path: str, plain: PreTrainedModel) -> Iterator[tuple[str, Sliceable]]:
    """Name and numbers of each parameter of a model without adapters. path: directory or hub id.

    Read from safetensors as they are asked for, if the tensors there are the model's. If transformers has
    to rename, stack or split them, or the files are of another kind, it loads the whole model.
    Raises ConfigError when the files cannot be read or a weight is not there.
    """
    yield from _tensors(path, plain, dict(plain.named_parameters(remove_duplicate=False)))


def load_buffers(path: str, plain: PreTrainedModel) -> None:
    """Fill the buffers that a checkpoint holds. Most are functions of the configuration and not in it.

    Raises ConfigError as `pretrained_weights` does.
    """
    state = plain.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in plain.named_buffers() if name in state}
    if buffers:
        for name, whole in _tensors(path, plain, buffers):
            buffers[name].copy_(whole[tuple(slice(0, size) for size in buffers[name].shape)])


def _tensors(path: str, plain: PreTrainedModel, wanted: dict[str, Tensor]) -> Iterator[tuple[str, Sliceable]]:
    """First name and numbers of each wanted tensor, which may have several names."""
    try:
        places = _places(path)
        keys = _keys(places, plain, wanted)
        if keys is None:
            yield from _loaded(path, wanted)
            return
        _check_ties(path, places, keys, wanted)
        for file in sorted({places[key].file for key in keys.values()}):
            with safe_open(file, framework="pt") as opened:
                for name, key in keys.items():
                    if places[key].file == file:
                        scalar = not places[key].shape
                        yield name, opened.get_tensor(key) if scalar else _Stored(opened.get_slice(key))
    except ConfigError:
        raise
    except Exception as error:  # transformers, safetensors and torch raise many kinds
        text = str(error).strip().splitlines()
        shown = text[0][:200] if text else type(error).__name__
        raise ConfigError(f"model.path={path}: cannot be loaded: {shown}") from None


def _places(path: str) -> dict[str, _Place]:
    """Every tensor in a checkpoint's safetensors files; nothing if it has none."""
    files: set[str | None] = set()
    with suppress(OSError):
        files = {cached_file(path, "model.safetensors")}
    if not files:
        with suppress(OSError):
            index = json.loads(Path(cached_file(path, "model.safetensors.index.json") or "").read_text())
            files = {cached_file(path, name) for name in set(index["weight_map"].values())}
    places: dict[str, _Place] = {}
    for file in filter(None, files):
        with safe_open(file, framework="pt") as opened:
            for key in list(opened.keys()):
                stored = opened.get_slice(key)
                places[key] = _Place(file, torch.Size(stored.get_shape()), stored.get_dtype())
    return places


def _keys(
    places: dict[str, _Place], plain: PreTrainedModel, wanted: dict[str, Tensor]
) -> dict[str, str] | None:
    """The checkpoint's name of each wanted tensor, or None if they are not the same one by one."""
    converted = [
        re.compile(pattern.replace("*", ".*"))
        for transform in get_model_conversion_mapping(plain)
        if isinstance(transform, WeightConverter)
        for pattern in transform.source_patterns
    ]
    first_names: dict[int, str] = {}
    keys: dict[str, str] = {}
    for name, tensor in wanted.items():
        first = first_names.setdefault(id(tensor), name)
        for key in (name, name.removeprefix(f"{plain.base_model_prefix}.")):
            place = places.get(key)
            if first in keys or place is None:
                continue
            if place.shape != tensor.shape or place.format not in CASTABLE:
                return None
            if any(pattern.search(key) for pattern in converted):
                return None
            keys[first] = key
    return keys if keys.keys() == set(first_names.values()) else None


def _check_ties(
    path: str, places: dict[str, _Place], keys: dict[str, str], wanted: dict[str, Tensor]
) -> None:
    """Raise ConfigError if a tensor that the model shares is there twice and not the same."""
    first_names: dict[int, str] = {}
    for name, tensor in wanted.items():
        key = keys[first_names.setdefault(id(tensor), name)]
        if name != key and name in places and not torch.equal(_whole(places, name), _whole(places, key)):
            raise ConfigError(
                f"model.path={path}: its config.json ties {key} and {name}, which differ in its files; "
                "set tie_word_embeddings to false there"
            )


def _whole(places: dict[str, _Place], key: str) -> Tensor:
    with safe_open(places[key].file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
    return tensor


def _loaded(path: str, wanted: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same from a model that transformers has loaded whole."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    module: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise ConfigError(f"model.path={path}: has no weights for {missing[0]}")
    state = module.state_dict()
    first_names = {id(tensor): name for name, tensor in reversed(wanted.items())}
    for name in first_names.values():
        yield name, state[name]
