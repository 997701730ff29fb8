"""What does a Hugging Face checkpoint say about itself? config.json and safetensors headers."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.load import first_line
from configs.schema import ConfigError
from launcher.plan.parameters import Parameters

HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
LOOKED_UP = re.compile(
    r"(embed_tokens|tok_embeddings|word_embeddings|embed_in|wte|embed_positions|wpe)\.weight$"
)
BUFFERS = ("inv_freq", "masked_bias")
LARGEST_TENSOR = 2**48
"""Weights; a hundred times all of the largest models."""
LONGEST_SHOWN = 60
"""Characters of a wrong value."""


@dataclass(frozen=True)
class ConfigFile:
    """A config.json: sizes and switches under the spellings of many architectures."""

    path: str
    """Where it is from, as the user wrote it; named in errors."""
    values: dict[str, Any]

    @property
    def model_type(self) -> str:
        return str(self.values.get("model_type"))

    def size(self, *keys: str, default: int | None = None) -> int:
        """The first of several spellings of a size. Raises ConfigError without any."""
        found = next((self.values[key] for key in keys if self.values.get(key) is not None), default)
        if found is None:
            raise ConfigError(f"model.path={self.path}: config.json {self._lacks(keys)}")
        if type(found) is not int or not 0 < found < 2**31:
            given = next((key for key in keys if self.values.get(key) is not None), keys[0])
            raise self.wrong(given, found, f"must be a whole number from 1 to {2**31 - 1}")
        return found

    def count(self, *keys: str, default: int = 0) -> int:
        """Like size, but nothing, null and 0 all mean that there are none."""
        return self.size(*keys) if any(self.values.get(key) for key in keys) else default

    def flag(self, key: str, default: bool = False) -> bool:
        """A switch; null means the default. Raises ConfigError for what is neither true nor false."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, value, "must be true or false")
        return value

    def indices(self, key: str) -> set[int]:
        """A list of blocks, the first is 0; null means none. Raises ConfigError for anything else."""
        value = self.values.get(key)
        if value is None:
            return set()
        if not isinstance(value, list) or any(type(index) is not int or index < 0 for index in value):
            raise self.wrong(key, value, "must be a list of whole numbers from 0")
        return set(value)

    def wrong(self, key: str, value: Any, allowed: str) -> ConfigError:
        """The one line that refuses a value of config.json, which may be of any length."""
        text = str(value)
        shown = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
        return ConfigError(f"model.path={self.path}: config.json has {key}={shown}, {allowed}")

    def _lacks(self, keys: tuple[str, ...]) -> str:
        if isinstance(self.values.get("text_config"), dict):
            return f"lacks {keys[0]}: a multimodal model, give the directory of its text model"
        return f"lacks {' or '.join(keys)}"


def read_config(path: str) -> ConfigFile:
    """config.json of a local directory or a hub id. Raises ConfigError."""
    directory = Path(path)
    file = directory / "config.json" if directory.is_dir() else _download(path)
    if not file.is_file():
        raise ConfigError(f"model.path={path}: no config.json there, give a Hugging Face model directory")
    try:
        values = json.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"model.path={path}: config.json is not readable: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"model.path={path}: config.json must hold an object")
    return ConfigFile(path, values)


def has_weights(path: str) -> bool:
    """Whether a directory holds more than an architecture; a hub id is taken to."""
    directory = Path(path)
    return not directory.is_dir() or any(
        next(directory.glob(pattern), None) for pattern in ("*.safetensors*", "pytorch_model*.bin*")
    )


def stored_parameters(config: ConfigFile, *, head: int) -> Parameters:
    """Weights of any architecture, counted from the tensors beside config.json.

    Of a mixture's experts a token uses num_experts_per_tok; `head` is passed on.
    Raises ConfigError when there is no readable safetensors file.
    """
    tensors = _tensor_sizes(config.path)
    total = sum(tensors.values())
    experts = sum(count for name, count in tensors.items() if ".experts." in name)
    idle = 0
    if experts:
        number = config.size("num_local_experts", "num_experts", "n_routed_experts")
        idle = experts - experts * routed_experts(config, number) // number
    embedding = sum(count for name, count in tensors.items() if LOOKED_UP.search(name))
    outside = embedding + (0 if config.flag("tie_word_embeddings", True) else head)
    if total - idle <= max(outside, head):
        raise ConfigError(
            f"model.path={config.path}: its safetensors hold {total:,} weights, fewer than the tables that "
            "vocab_size and hidden_size in config.json describe"
        )
    return Parameters(total, total - idle, embedding, head)


def routed_experts(config: ConfigFile, number: int) -> int:
    """Experts, of so many, that a token is sent to. Raises ConfigError for more than there are."""
    found = config.size("num_experts_per_tok")
    if found > number:
        raise config.wrong("num_experts_per_tok", found, f"must be at most the {number} experts")
    return found


def _tensor_sizes(path: str) -> dict[str, int]:
    """Tensor name -> number of weights.

    A safetensors header is 8 little-endian bytes of length, then JSON (huggingface.co/docs/safetensors).
    Masks and rotary frequencies, which old checkpoints store too, are not weights.
    """
    sizes: dict[str, int] = {}
    for file in sorted(Path(path).glob("model*.safetensors")):
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > file.stat().st_size:
                    raise ValueError("the header is longer than the file")
                header = json.loads(stream.read(length))
                if not isinstance(header, dict):
                    raise ValueError("the header is not an object")
            sizes |= {
                name: _weights(name, tensor["shape"])
                for name, tensor in header.items()
                if name != "__metadata__"
                and tensor["dtype"].startswith(("F", "BF"))
                and not name.endswith(BUFFERS)
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"model.path={path}: {file.name} is damaged: {first_line(error)}") from None
    if not sum(sizes.values()):
        raise ConfigError(
            f"model.path={path}: this architecture is sized from its weights, "
            "give a directory with model*.safetensors"
        )
    return sizes


def _weights(name: str, shape: list[int]) -> int:
    """Raises ValueError for a shape that no tensor has."""
    weights = math.prod(shape) if all(type(size) is int and size >= 0 for size in shape) else -1
    if not 0 <= weights < LARGEST_TENSOR:
        raise ValueError(f"{name[:LONGEST_SHOWN]} has shape {str(shape)[:LONGEST_SHOWN]}")
    return weights


def _download(path: str) -> Path:
    if not HUB_ID.fullmatch(path):
        raise ConfigError(f"model.path={path}: no such directory")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(path, "config.json")
        if isinstance(cached, str):
            return Path(cached)
        return Path(hf_hub_download(path, "config.json"))
    except Exception as error:  # what the hub's HTTP library raises depends on its version
        raise ConfigError(
            f"model.path={path}: neither a directory nor fetched from the hub: {first_line(error)}"
        ) from None
