"""What a row of tokens asks of the model, and the loss of its answer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""Target id of a position without a loss."""


def causal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both [rows, T], of rows of T + 1 tokens: predict every next token."""
    return rows[:, :-1], rows[:, 1:]


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log p over the target tokens, in fp32. logits [rows, T, vocabulary], targets [rows, T].

    A sum, not a mean: the loop divides by the target tokens of the global batch, so that the result
    does not depend on how rows are split over ranks and forward passes.
    """
    return functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def target_tokens(rows: NDArray[np.int32]) -> int:
    """Number of positions with a loss in rows of T + 1 tokens, counted on the host."""
    return int(np.count_nonzero(rows[:, 1:] != IGNORED))
