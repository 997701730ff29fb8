"""Perplexity of held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.schema import Config
from trainer import objective
from trainer.data.tokenizer import DocumentTokenizer
from trainer.distributed import World

Rows = NDArray[np.int32]


def validation_rows(
    texts: Iterable[str], tokenizer: DocumentTokenizer, sequence_length: int, most_rows: int
) -> Rows:
    """Documents in their order, concatenated and cut: [rows, sequence_length + 1].

    Rows overlap by one token, so each token but the first is a target once. The last row is filled
    up with objective.IGNORED.
    """
    wanted = most_rows * sequence_length + 1
    pieces: list[Rows] = []
    collected = 0
    for tokens in tokenizer.encode_stream(texts):
        pieces.append(tokens)
        collected += len(tokens)
        if collected >= wanted:
            break
    tokens = np.concatenate([np.empty(0, np.int32), *pieces])[:wanted]
    count = math.ceil(max(0, len(tokens) - 1) / sequence_length)
    padded = np.full(count * sequence_length + 1, objective.IGNORED, np.int32)
    padded[: len(tokens)] = tokens[: len(padded)]
    starts = np.arange(count)[:, None] * sequence_length
    rows: Rows = padded[starts + np.arange(sequence_length + 1)]
    return rows


def perplexities(
    logits: Callable[[Tensor, Tensor | None], Tensor],
    corpora: dict[str, Rows],
    config: Config,
    world: World,
    end_of_document: int | None = None,
) -> dict[str, float]:
    """eval/CORPUS/loss (mean over target tokens, nats) and eval/CORPUS/perplexity of each corpus.

    logits: of inputs and positions, as in Strategy. end_of_document: the token that ends documents, if they
    are masked as in training.
    """
    results: dict[str, float] = {}
    for name, rows in corpora.items():
        total = torch.zeros(2, dtype=torch.float64, device=world.device)
        for chunk in _shares(rows, config.micro_batch, world):
            tensor = torch.from_numpy(chunk).long().to(world.device)
            inputs, targets, positions = objective.causal(tensor, end_of_document)
            with torch.no_grad():
                loss = objective.loss_sum(logits(inputs, positions), targets)
            total += torch.stack([loss.double(), (targets != objective.IGNORED).sum().double()])
        torch.distributed.all_reduce(total)
        loss_sum, tokens = total.tolist()
        mean = loss_sum / tokens
        results[f"eval/{name}/loss"] = mean
        results[f"eval/{name}/perplexity"] = math.exp(min(mean, 700.0))
    return results


def _shares(rows: Rows, micro_batch: int, world: World) -> Iterator[Rows]:
    """This rank's rows by micro batches; every rank gets equally many, some without any target."""
    unit = micro_batch * world.size
    padded = np.full((math.ceil(len(rows) / unit) * unit, rows.shape[1]), objective.IGNORED, np.int32)
    padded[: len(rows)] = rows
    own = padded[world.rank :: world.size]
    for start in range(0, len(own), micro_batch):
        yield own[start : start + micro_batch]
