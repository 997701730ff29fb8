"""How many tokens and steps is the run? The configured budget in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import PurePath

import fsspec

from configs.load import first_line
from configs.schema import Config, ConfigError
from launcher.plan.shape import Shape

TOKENS_PER_BYTE = {".gz": 0.74, ".zst": 0.74, ".parquet": 0.45}
"""Compressed English web text; any other file is plain. Parquet as snappy, its usual codec."""
TOKENS_PER_PLAIN_BYTE = 0.24


@dataclass(frozen=True)
class TokenBudget:
    """What budget asks for, for one shape."""

    tokens: int
    tokens_per_parameter: float
    steps: int
    global_batch_tokens: int
    verdict: str
    """under-trained, balanced, over-trained, or continued for a pre-trained model."""
    estimate: str | None
    """What tokens were guessed from; none when they are exact."""


def token_budget(shape: Shape, config: Config) -> TokenBudget:
    """Tokens and optimizer steps of a run.

    kind chinchilla: tokens_per_parameter x N; flops: C / (6 N) with all N parameters (Hoffmann et al.
    2022); epochs: estimated from the corpus's file sizes. Raises ConfigError if no file is found.
    """
    budget, estimate = config.budget, None
    match budget.kind:
        case "chinchilla":
            tokens = round(budget.tokens_per_parameter * shape.parameters)
        case "tokens":
            tokens = budget.tokens or 0
        case "flops":
            tokens = round((budget.flops or 0) / (6 * shape.parameters))
        case "epochs":
            tokens, estimate = _tokens_of_epochs(config)
    tokens = max(tokens, 1)
    ratio = tokens / shape.parameters
    global_batch_tokens = config.global_batch * shape.sequence_length
    return TokenBudget(
        tokens=tokens,
        tokens_per_parameter=ratio,
        steps=math.ceil(tokens / global_batch_tokens),
        global_batch_tokens=global_batch_tokens,
        verdict="continued" if config.model.family == "hf" else _verdict(ratio),
        estimate=estimate,
    )


def _verdict(tokens_per_parameter: float) -> str:
    """Distance from the compute-optimal 20 tokens per parameter: within a factor of two is balanced."""
    if tokens_per_parameter < 10:
        return "under-trained"
    return "balanced" if tokens_per_parameter <= 40 else "over-trained"


def _tokens_of_epochs(config: Config) -> tuple[int, str]:
    """Tokens until the corpus with the largest weight was read `epochs` times, and how they were guessed."""
    trained = {name: corpus for name, corpus in config.data.corpora.items() if corpus.train}
    if not trained:
        raise ConfigError("data.corpora: no corpus has train shards, so budget=epochs has nothing to count")
    name, corpus = max(sorted(trained.items()), key=lambda item: item[1].weight)
    share = corpus.weight / sum(other.weight for other in trained.values())
    sizes = [size for pattern in corpus.train or [] for size in _file_sizes(name, pattern)]
    corpus_tokens = sum(
        count * TOKENS_PER_BYTE.get(PurePath(file).suffix, TOKENS_PER_PLAIN_BYTE) for file, count in sizes
    )
    epochs = config.budget.epochs or 0
    return round(corpus_tokens / share * epochs), (
        f"{epochs:g} epochs of {name} are estimated from the sizes of its {len(sizes)} files: "
        f"{TOKENS_PER_BYTE['.gz']} tokens per compressed and {TOKENS_PER_PLAIN_BYTE} per plain byte"
    )


def _file_sizes(corpus: str, pattern: str) -> list[tuple[str, int]]:
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        files = filesystem.glob(path, detail=True)
    except Exception as error:  # each of fsspec's file systems has its own
        raise ConfigError(f"data.corpora.{corpus}.train={pattern}: {first_line(error)}") from None
    if not files:
        raise ConfigError(f"data.corpora.{corpus}.train={pattern}: no such file")
    return [(file, int(found["size"])) for file, found in files.items()]
