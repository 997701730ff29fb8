"""What a row of tokens asks of the model, and the loss of its answer."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""Target id of a position without a loss."""


def causal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both [rows, T], of rows of T + 1 tokens: predict every next token."""
    return rows[:, :-1], rows[:, 1:]


def loss_sum(logits: Tensor, targets: Tensor, *, upcast: bool = True) -> Tensor:
    """Sum of -log p over the target tokens. logits [rows, T, vocabulary], targets [rows, T].

    upcast: computed on an fp32 copy of the logits; without it each -log p is rounded to their format, and
    only the sum is fp32.

    A sum, not a mean: the loop divides by the target tokens of the global batch, so that the result
    does not depend on how rows are split over ranks and forward passes.
    """
    if upcast:
        logits = logits.float()
    losses = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.sum(dtype=torch.float32)


def target_tokens(rows: NDArray[np.int32]) -> int:
    """Number of positions with a loss in rows of T + 1 tokens, counted on the host."""
    return int(np.count_nonzero(rows[:, 1:] != IGNORED))
