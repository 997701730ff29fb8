"""Passes before any data flows: on zeros, as the loop does them, and on documents that must not mix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from configs.schema import Config, ConfigError
from trainer import objective
from trainer.distributed import World
from trainer.sharding import Strategy

DOCUMENT_TOKENS = 16
"""Tokens of a document that check_documents makes up."""
MOST_LEFT = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}
"""Part of the influence of other documents that may be left, by compute format: that much is rounding."""


def pass_on_zeros(strategy: Strategy, config: Config, world: World, *, complete: bool = True) -> None:
    """One micro batch; gradients are left in place. complete: the last micro batch of a step.

    With masked documents a row is two of them, so that masks take their memory.
    """
    shape = (config.micro_batch, config.model.sequence_length)
    inputs = torch.zeros(shape, dtype=torch.int64, device=world.device)
    positions = None
    if config.objective.mask_documents:
        positions = (torch.arange(shape[1], device=world.device) % -(-shape[1] // 2)).expand(shape)
    upcast = config.objective.logits == "fp32"
    with strategy.gradients(complete=complete):
        loss = objective.loss_sum(strategy.logits(inputs, positions), inputs, upcast=upcast)
        strategy.backward(loss / inputs.numel())


@torch.no_grad()
def check_documents(strategy: Strategy, config: Config, world: World) -> None:
    """Raise ConfigError if documents are to be masked, but the model sees that one is not alone in its row.

    Many models take positions and do not mask by them. Of two documents in two orders, the one that comes
    second must give the logits that it gives when it comes first. What differs is held against the
    difference without masks.
    """
    if not config.objective.mask_documents or config.model.sequence_length < 2:
        return
    model: Any = strategy.module
    tokens = min(DOCUMENT_TOKENS, config.model.sequence_length // 2)
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randint(model.config.get_text_config().vocab_size, (2, tokens), generator=generator)
    inputs = torch.stack([torch.cat([one, other]), torch.cat([other, one])]).to(world.device)
    positions = torch.arange(tokens, device=world.device).repeat(2).expand_as(inputs)
    model.eval()
    left, whole = (_influence(strategy.logits(inputs, own)) for own in (positions, None))
    model.train()
    if left > MOST_LEFT[config.precision.compute] * whole:
        raise ConfigError(
            f"objective.mask_documents=true: {type(model).__name__} with {model.config._attn_implementation} "
            "attention lets documents of a row see each other, choose false"
        )


def _influence(logits: Tensor) -> float:
    """Norm of what a document before them changes in documents' logits, [2, 2 tokens, vocabulary]."""
    first, second = logits.float().chunk(2, dim=1)
    return float((second.flip(0) - first).norm())
