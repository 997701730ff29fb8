"""What a row of tokens asks of the model, and the loss of its answer."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""Target id of a position without a loss."""


def causal(rows: Tensor, end_of_document: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs, targets and positions, all [rows, T], of rows of T + 1 tokens: predict every next token.

    rows: int64; IGNORED, which stands for no token, is token 0 among the inputs.
    end_of_document: the token that ends documents, if each is to be on its own: then positions count from
    0 in each, attention does not reach beyond it (see Strategy.logits), and the first token of the next is
    no target. Without it positions is None, and a row is one text.
    """
    inputs, targets = rows[:, :-1].clamp(min=0), rows[:, 1:]
    if end_of_document is None:
        return inputs, targets, None
    ends = rows[:, :-1] == end_of_document
    places = torch.arange(inputs.shape[1], device=rows.device)
    begins = torch.zeros_like(inputs)
    begins[:, 1:] = torch.where(ends[:, :-1], places[1:], 0)
    return inputs, targets.masked_fill(ends, IGNORED), places - begins.cummax(dim=1).values


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


def target_tokens(rows: NDArray[np.int32], end_of_document: int | None = None) -> int:
    """Number of positions with a loss in rows of T + 1 tokens, as in `causal`, counted on the host."""
    targets = rows[:, 1:] != IGNORED
    if end_of_document is not None:
        targets &= rows[:, :-1] != end_of_document
    return int(np.count_nonzero(targets))
