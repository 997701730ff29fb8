"""What a run's weights are before its first step: random by seed, or a parent's; adapters beside them.

They come one parameter at a time, whole or read as far as asked for, and each rank keeps its part. So the
host never holds the model, and the weights are the same, bit for bit, however they are split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from configs.schema import Config
from trainer.adapters import adapter_weights, is_adapter, plain_name
from trainer.pretrained import pretrained_weights
from trainer.sharding.logical import Logical, Sliceable
from trainer.skeleton import skeleton


def initial_weights(module: nn.Module, config: Config) -> Iterator[tuple[str, Sliceable]]:
    """Name and numbers of each parameter of a model, which may be on the meta device or sharded.

    Raises ConfigError when model.path cannot be read or lacks a weight.
    """
    architecture: Any = module.config
    names = {plain_name(name): name for name, _ in module.named_parameters() if not is_adapter(name)}
    if config.model.path is None:
        found: Iterator[tuple[str, Sliceable]] = random_weights(architecture, config.seed)
    else:
        found = pretrained_weights(config.model.path, skeleton(architecture)[0])
    for name, whole in found:
        yield names[name], whole
    yield from adapter_weights(module, config.seed)


def random_weights(architecture: PreTrainedConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The weights that a model has if it is made right after torch.manual_seed(seed), in fp32.

    A few architectures draw random numbers before they have a parameter for them; those are made whole.
    """
    module, recording = skeleton(architecture)
    if recording.repeatable:
        yield from recording.replay(dict(module.named_parameters()), seed)
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
    for name, parameter in module.named_parameters():
        yield name, parameter.detach()


def fill(state: Mapping[str, Logical], weights: Iterator[tuple[str, Sliceable]]) -> None:
    """Put weights into logical state, in which each must be there and get its numbers."""
    filled = set()
    for name, whole in weights:
        state[f"weight/{name}"].fill(whole)
        filled.add(f"weight/{name}")
    left = {name for name in state if name.startswith("weight/")} - filled
    assert not left, f"no initial weights for {sorted(left)[0]}"
