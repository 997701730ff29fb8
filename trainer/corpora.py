"""The text of a run: tokenizer, shards, held-out rows, and the number of steps they make."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from cluster import events
from configs.schema import Config, ConfigError
from trainer.data.shards import Damage, DamagedShard, Shard, documents, list_shards
from trainer.data.tokenizer import DocumentTokenizer, load_tokenizer
from trainer.distributed import World
from trainer.evaluation import DOCUMENTS_PER_ENCODE, Rows, validation_rows


@dataclass(frozen=True)
class Corpora:
    """Text of a run."""

    tokenizer: DocumentTokenizer
    train: dict[str, list[Shard]]
    """Corpora that are trained on."""
    validation: dict[str, Rows]
    """Held-out rows by corpus, [rows, sequence_length + 1]."""
    epoch_tokens: int | None
    """Tokens of one pass over the corpus with the largest weight; only counted for budget=epochs."""


def load_corpora(run: Path, config: Config, world: World) -> Corpora:
    """List shards once, on rank 0, and read held-out rows. Raises ConfigError naming the key."""
    tokenizer = load_tokenizer(config.model)
    failure, listing, epoch_tokens = None, None, None
    if world.main:
        try:
            listing = _list(config)
            epoch_tokens = _epoch_tokens(run, config, listing[0], tokenizer)
        except ConfigError as error:
            failure = error
    failure, listing, epoch_tokens = world.from_main((failure, listing, epoch_tokens))
    if failure is not None:
        raise failure
    assert listing is not None
    train, held_out = listing
    validation = {}
    for name, shards in held_out.items():
        rows = validation_rows(
            shards,
            config.data.corpora[name].text_field,
            tokenizer,
            config.model.sequence_length,
            config.evaluation.rows,
            lambda damage: _on_damage(run, config, damage) if world.main else None,
        )
        if not len(rows):
            raise ConfigError(f"data.corpora.{name}.validation: no readable document")
        validation[name] = rows
    return Corpora(tokenizer, train, validation, epoch_tokens)


def steps_of(config: Config, corpora: Corpora) -> int:
    """Optimizer steps that spend the budget, the last one in full."""
    tokens = config.budget.tokens
    if tokens is None:
        assert config.budget.epochs is not None
        assert corpora.epoch_tokens is not None
        name = _largest(config, corpora.train)
        share = config.data.corpora[name].weight / sum(
            config.data.corpora[other].weight for other in corpora.train
        )
        tokens = round(config.budget.epochs * corpora.epoch_tokens / share)
    return max(1, math.ceil(tokens / (config.global_batch * config.model.sequence_length)))


def _list(config: Config) -> tuple[dict[str, list[Shard]], dict[str, list[Shard]]]:
    train, held_out = {}, {}
    for name, corpus in config.data.corpora.items():
        key = f"data.corpora.{name}"
        if corpus.train is not None:
            train[name] = list_shards(f"{key}.train", corpus.train)
        if corpus.validation is not None:
            held_out[name] = list_shards(f"{key}.validation", corpus.validation)
    return train, held_out


def _largest(config: Config, names: dict[str, list[Shard]]) -> str:
    return min(names, key=lambda name: (-config.data.corpora[name].weight, name))


def _epoch_tokens(
    run: Path, config: Config, train: dict[str, list[Shard]], tokenizer: DocumentTokenizer
) -> int | None:
    """Tokens of the corpus with the largest weight, counted once per run and kept in RUN/epoch-tokens."""
    if config.budget.kind != "epochs":
        return None
    kept = run / "epoch-tokens"
    if not kept.exists():
        name = _largest(config, train)
        tokens, texts = 0, list[str]()
        for shard in train[name]:
            field = config.data.corpora[name].text_field
            for _, text in documents(shard, field, lambda damage: _on_damage(run, config, damage)):
                texts.append(text)
                if len(texts) == DOCUMENTS_PER_ENCODE:
                    tokens += sum(map(len, tokenizer.encode(texts)))
                    texts = []
        tokens += sum(map(len, tokenizer.encode(texts)))
        if not tokens:
            raise ConfigError(f"data.corpora.{name}.train: no readable document")
        kept.write_text(str(tokens))
    return int(kept.read_text())


def _on_damage(run: Path, config: Config, damage: Damage) -> None:
    if config.data.on_corrupt == "fail":
        raise DamagedShard(
            f"data.on_corrupt=fail: {damage.shard}, document {damage.document}: {damage.reason}"
        )
    events.record(run, "data_damage", **vars(damage))
