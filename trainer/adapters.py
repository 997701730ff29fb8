"""What of a model is trained: all of it, all but its first blocks, or low-rank adapters (LoRA)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.schema import ConfigError, Model

TARGETS = ("q_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj", "Wqkv", "query", "value")
"""What projections to queries and values are called, alone or in one matrix with those to keys."""


def choose_trained(module: PreTrainedModel, model: Model, blocks: list[nn.Module]) -> None:
    """Add adapters (Hu et al. 2021) and freeze what is not trained. blocks: the transformer blocks.

    Raises ConfigError when nothing is left to train, or the model has no such projections.
    """
    frozen = model.frozen_blocks
    if frozen > len(blocks):
        raise ConfigError(f"model.frozen_blocks={frozen}: must be at most the model's {len(blocks)} blocks")
    if model.lora_rank is not None:
        if frozen == len(blocks):
            raise ConfigError(
                f"model.frozen_blocks={frozen}: leaves no block with adapters, must be below {len(blocks)}"
            )
        add_adapters(module, model, blocks[frozen:])
    for block in blocks[:frozen]:
        block.requires_grad_(False)


def add_adapters(module: PreTrainedModel, model: Model, blocks: list[nn.Module]) -> None:
    """Put LoRA beside the query and value projections of blocks; everything else is frozen.

    Parameters of a projection NAME are then NAME.base_layer.weight, NAME.lora_A.default.weight
    [rank, inputs] and NAME.lora_B.default.weight [outputs, rank].
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(
            f"model.lora_rank={model.lora_rank}: needs peft, install it with: pip install trainyard[lora]"
        ) from None
    inside = {id(part) for block in blocks for part in block.modules()}
    names = {
        name: type(part).__name__
        for name, part in module.named_modules()
        if id(part) in inside and name.split(".")[-1] in TARGETS
    }
    if not names:
        raise ConfigError(
            f"model.lora_rank={model.lora_rank}: {type(module).__name__} has no query and value projections "
            f"of a known name ({', '.join(TARGETS)})"
        )
    rank = model.lora_rank
    assert rank is not None
    lora = LoraConfig(
        r=rank,
        lora_alpha=model.lora_alpha or 2 * rank,  # type: ignore[arg-type]
        target_modules=list(names),
        fan_in_fan_out="Conv1D" in names.values(),
    )
    inject_adapter_in_model(lora, module, low_cpu_mem_usage=True)


def plain_name(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def adapter_weights(module: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Where adapters begin: A uniform as in a linear layer, B zero, so that the model is its parent."""
    for name, parameter in module.named_parameters():
        if not is_adapter(name):
            continue
        weight = torch.zeros(getattr(parameter, "ds_shape", parameter.shape))  # zero3 hides the shape
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=_generator(seed, name))
        yield name, weight


def _generator(seed: int, name: str) -> torch.Generator:
    """Random numbers that are a parameter's own, whatever else is drawn."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def merge_adapters(module: nn.Module) -> None:
    """Add each adapter's product to the weight beside it, and take the adapters away."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            adapted: Any = layer
            adapted.merge()
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, adapted.get_base_layer())
