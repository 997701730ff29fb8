"""How many tokens and steps is the run, and is that much or little for this model?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import PurePath

import fsspec

from configs.load import first_line
from configs.schema import Config, ConfigError
from launcher.plan import scaling
from launcher.plan.pretrained import has_weights
from launcher.plan.scaling import LAWS, LOSSES, Law, Optimum
from launcher.plan.shape import Shape

TOKENS_PER_BYTE = {".gz": 0.74, ".zst": 0.74, ".parquet": 0.45}
"""Compressed English web text; any other file is plain. Parquet as snappy, its usual codec."""
TOKENS_PER_PLAIN_BYTE = 0.24
MOST_TOKENS = 10**18
BALANCED = 1.1
"""How many times more or fewer tokens than optimal are still balanced."""


@dataclass(frozen=True)
class Continuation:
    """Going on from a parent, against training anew on the parent's and the new tokens."""

    parent_tokens: int
    tokens_per_parameter: float
    """Of parent and run together."""
    cost_of_training_anew: float
    """Compute of this run over that of training anew on both."""


@dataclass(frozen=True)
class TokenBudget:
    """What budget asks for, for one shape."""

    tokens: int
    parameters: int
    """N of the scaling laws: in a mixture of experts the active ones, else all."""
    tokens_per_parameter: float
    steps: int
    global_batch_tokens: int
    epochs: float | None
    """Passes over the unique tokens, or over the heaviest corpus; none where no limit is known."""
    verdict: str
    """under-trained, balanced, over-trained, or continued for a pre-trained model."""
    estimate: str | None
    """What tokens were guessed from; none when they are exact."""
    law: str
    optimal_tokens: float
    """Those that budget.law wants for a model of this size."""
    over_training: float
    """Tokens over 20 per parameter; above 1 is dearer to train and cheaper to serve."""
    effective_tokens: float
    """Tokens less what repeats are worth less (Muennighoff et al. 2023)."""
    repetition_penalty: float
    """Share by which repeats raise the loss."""
    tokens_by_corpus: dict[str, int]
    loss_nats: dict[str, float]
    """Estimated loss by law, at effective_tokens."""
    optimum: dict[str, Optimum]
    """By law, the model and tokens to spend this run's 6 N D FLOPs on."""
    continuation: Continuation | None
    """None unless budget.parent_tokens is given."""
    advice: tuple[str, ...]
    """Sentences on repeats, laws and continuing, as far as they concern this run."""


def token_budget(shape: Shape, config: Config, tokens_per_gpu_hour: float | None = None) -> TokenBudget:
    """Tokens and optimizer steps of a run, and how they compare with published scaling laws.

    tokens_per_gpu_hour: planned tokens of the run per accelerator and hour of wall time.
    Tokens by kind: chinchilla: tokens_per_parameter x N, or what budget.law wants for N; flops:
    C / (6 N), C / (3 N) in an encoder-decoder; gpu_hours, usd and days: hours x speed; epochs: estimated
    from the corpus's file sizes. Raises ConfigError without such a file, when the speed or price that the
    kind needs is unknown, and for keys that contradict each other.
    """
    _check(config)
    n, budget = law_parameters(shape), config.budget
    tokens, estimate = _tokens(shape, config, tokens_per_gpu_hour)
    tokens = max(tokens, 1)
    if tokens > MOST_TOKENS:
        raise ConfigError(
            f"budget={budget.kind}: comes to {tokens:.3g} tokens, at most {MOST_TOKENS:.0e} are allowed"
        )
    unique, epochs = float(budget.unique_tokens or tokens), budget.epochs
    if budget.unique_tokens is not None:
        epochs = tokens / budget.unique_tokens
    elif epochs is not None:
        unique = tokens / max(epochs, 1)
    effective = scaling.effective_tokens(tokens, unique)
    penalty = scaling.repetition_penalty(scaling.BESIROGLU, n, tokens, unique)
    global_batch_tokens = config.global_batch * shape.tokens_per_row
    factor = flops_factor(shape)
    return TokenBudget(
        tokens=tokens,
        parameters=n,
        tokens_per_parameter=tokens / n,
        steps=math.ceil(tokens / global_batch_tokens),
        global_batch_tokens=global_batch_tokens,
        epochs=epochs,
        verdict="continued" if _continues(config) else verdict_of(n, tokens, LAWS[budget.law]),
        estimate=estimate,
        law=budget.law,
        optimal_tokens=LAWS[budget.law].optimal_tokens(n),
        over_training=over_training(tokens, n),
        effective_tokens=effective,
        repetition_penalty=penalty,
        tokens_by_corpus=scaling.split_tokens(tokens, _train_weights(config)),
        loss_nats={name: law.loss(n, effective) for name, law in LOSSES.items()},
        optimum=optimal_models(scaling.training_flops(n, tokens, factor), factor),
        continuation=_continuation(tokens, n, budget.parent_tokens),
        advice=(
            *_on_repeats(tokens, unique, effective, penalty),
            *_on_law(budget.law, n),
            *_on_continuing(config),
        ),
    )


def verdict_of(parameters: float, tokens: float, law: Law = scaling.RULE) -> str:
    """under-trained or over-trained (allowed: cheaper to serve); balanced within a tenth of the law's D."""
    ratio = tokens / law.optimal_tokens(parameters)
    if ratio > BALANCED:
        return "over-trained"
    return "balanced" if ratio >= 1 / BALANCED else "under-trained"


def over_training(tokens: float, parameters: float) -> float:
    """Tokens over the compute-optimal 20 per parameter (Hoffmann et al. 2022)."""
    return tokens / scaling.RULE.optimal_tokens(parameters)


def optimal_models(flops: float, factor: float = scaling.FLOPS_FACTOR) -> dict[str, Optimum]:
    """The compute-optimal model and tokens for C, by every law that budget.law may name."""
    return {name: law.optimum(flops, factor) for name, law in LAWS.items()}


def law_parameters(shape: Shape) -> int:
    """N of the scaling laws: in a mixture of experts what a token passes through, else the whole model."""
    return shape.parameters if shape.encoder_layers else shape.parameters_active


def flops_factor(shape: Shape) -> float:
    """6 FLOPs per parameter and token; 3 in an encoder-decoder, whose tokens pass through one half."""
    return scaling.FLOPS_FACTOR / (2 if shape.encoder_layers else 1)


def _check(config: Config) -> None:
    budget = config.budget
    if budget.law != "rule" and budget.tokens_per_parameter != scaling.RULE.tokens_per_parameter:
        raise ConfigError(
            f"budget.tokens_per_parameter={budget.tokens_per_parameter:g}: "
            f"contradicts budget.law={budget.law}, choose budget.law=rule"
        )
    if budget.parent_tokens is not None and config.model.family != "hf":
        raise ConfigError(
            f"budget.parent_tokens={budget.parent_tokens}: only with model=hf, which continues a parent"
        )


def _tokens(shape: Shape, config: Config, tokens_per_gpu_hour: float | None) -> tuple[int, str | None]:
    budget, n = config.budget, law_parameters(shape)
    match budget.kind:
        case "chinchilla" if budget.law == "rule":
            return round(budget.tokens_per_parameter * n), None
        case "chinchilla":
            return round(LAWS[budget.law].optimal_tokens(n)), None
        case "tokens":
            return budget.tokens or 0, None
        case "flops":
            return round((budget.flops or 0) / flops_factor(shape) / n), None
        case "epochs":
            return _tokens_of_epochs(config)
        case _:
            hours = _gpu_hours(config)
            if tokens_per_gpu_hour is None:
                raise ConfigError(
                    f"hardware.peak_tflops.{config.precision.compute}=null: budget={budget.kind} needs the "
                    f"speed of {config.hardware.name}, give this key or choose budget=tokens"
                )
            return round(hours * tokens_per_gpu_hour), (
                f"{hours:,.0f} GPU-hours are planned at {tokens_per_gpu_hour:.3g} tokens per GPU and hour"
            )


def _gpu_hours(config: Config) -> float:
    """GPU-hours that kinds gpu_hours, usd and days pay for."""
    budget = config.budget
    if budget.kind == "days":
        return (budget.days or 0) * 24 * config.world_size
    if budget.kind == "gpu_hours":
        return budget.gpu_hours or 0
    if config.hardware.usd_per_hour is None:
        raise ConfigError(
            f"hardware.usd_per_hour=null: budget=usd needs the price of {config.hardware.name}, "
            "US dollars for an hour of one accelerator"
        )
    return (budget.usd or 0) / config.hardware.usd_per_hour


def _train_weights(config: Config) -> dict[str, float]:
    return {name: corpus.weight for name, corpus in config.data.corpora.items() if corpus.train}


def _continuation(tokens: int, parameters: int, parent_tokens: int | None) -> Continuation | None:
    if parent_tokens is None:
        return None
    return Continuation(
        parent_tokens=parent_tokens,
        tokens_per_parameter=(parent_tokens + tokens) / parameters,
        cost_of_training_anew=scaling.continuing_cost(tokens, parent_tokens),
    )


def _on_repeats(tokens: int, unique: float, effective: float, penalty: float) -> tuple[str, ...]:
    epochs = tokens / unique
    if epochs <= scaling.SAFE_EPOCHS:
        return ()
    worth = (
        f"{epochs:.3g} epochs are worth {effective / tokens:.0%} of as many new tokens, loss +{penalty:.1%}"
    )
    if epochs <= scaling.USEFUL_EPOCHS:
        return (f"{worth}: up to {scaling.SAFE_EPOCHS} epochs are almost free, more text is better.",)
    return (f"{worth}: beyond {scaling.USEFUL_EPOCHS} epochs repeats add next to nothing, train less.",)


def _on_law(law: str, parameters: int) -> tuple[str, ...]:
    if law != "hoffmann":
        return ()
    ratio = scaling.HOFFMANN.optimal_tokens(parameters) / parameters
    return (
        f"budget.law=hoffmann wants {ratio:.0f} tokens per parameter here, the other approaches of the same "
        "paper about 20; Besiroglu et al. 2024 found that its fit does not match its own runs.",
    )


def _on_continuing(config: Config) -> tuple[str, ...]:
    return scaling.CONTINUE_ADVICE if _continues(config) else ()


def _continues(config: Config) -> bool:
    """A directory with nothing but a config.json is an architecture, not a parent."""
    return config.model.family == "hf" and has_weights(str(config.model.path))


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
