"""The text of a run: tokenizer, shards, held-out rows, and the number of steps they make."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs.schema import Config, ConfigError
from trainer.data.damage import Damage, DamageReport
from trainer.data.shards import Shard, documents, list_shards
from trainer.data.tokenizer import DocumentTokenizer, load_tokenizer
from trainer.distributed import World
from trainer.evaluation import Rows, validation_rows

MEET_SECONDS = 60


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
    report = DamageReport(run, config.data.on_corrupt, world.rank, silent=not world.main)
    failure, listing = None, None
    if world.main:
        try:
            listing = _frozen_list(run, config, report)
        except ConfigError as error:
            failure = error
    failure, listing = world.from_main((failure, listing))
    if failure is not None:
        raise failure
    assert listing is not None
    train, held_out = listing
    validation = {}
    for name, shards in held_out.items():
        field = config.data.corpora[name].text_field
        rows = validation_rows(
            shards, field, tokenizer, config.model.sequence_length, config.evaluation.rows, report
        )
        if not len(rows):
            raise ConfigError(
                f"data.corpora.{name}.validation: no readable document with text in its field {field}"
            )
        validation[name] = rows
    counted = config.budget.kind == "epochs"
    epoch_tokens = _epoch_tokens(run, config, world, train, tokenizer) if counted else None
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


def _frozen_list(
    run: Path, config: Config, on_damage: Callable[[Damage], None]
) -> tuple[dict[str, list[Shard]], dict[str, list[Shard]]]:
    """The shards as the first attempt found them, kept in RUN/shards.json.

    Positions in the data count shards, so files that come or go later must not move them. Raises
    ConfigError if one has gone or changed its size.
    """
    kept = run / "shards.json"
    if not kept.exists():
        train, held_out = _list(config, on_damage)
        named = {"train": train, "validation": held_out}
        values = {
            split: {
                name: [[shard.address, shard.size_bytes] for shard in shards]
                for name, shards in found.items()
            }
            for split, found in named.items()
        }
        written = kept.with_suffix(".new")
        written.write_text(json.dumps(values))
        written.replace(kept)
        return train, held_out
    values = json.loads(kept.read_text())
    train, held_out = (
        {name: [Shard(*shard) for shard in shards] for name, shards in values[split].items()}
        for split in ("train", "validation")
    )
    for name, shards in train.items():
        present = set(list_shards(f"data.corpora.{name}.train", config.data.corpora[name].train or []))
        if changed := [shard for shard in shards if shard not in present]:
            raise ConfigError(f"data.corpora.{name}.train={changed[0].address}: changed since the run began")
    return train, held_out


def _list(
    config: Config, on_damage: Callable[[Damage], None]
) -> tuple[dict[str, list[Shard]], dict[str, list[Shard]]]:
    train, held_out = {}, {}
    for name, corpus in config.data.corpora.items():
        key = f"data.corpora.{name}"
        if corpus.train is not None:
            train[name] = _filled(list_shards(f"{key}.train", corpus.train), on_damage)
        if corpus.validation is not None:
            held_out[name] = _filled(list_shards(f"{key}.validation", corpus.validation), on_damage)
    return train, held_out


def _filled(shards: list[Shard], on_damage: Callable[[Damage], None]) -> list[Shard]:
    """Shards that are not empty: a lane must not be dealt nothing but an empty one."""
    for shard in shards:
        if shard.size_bytes == 0:
            on_damage(Damage(shard.address, 0, "empty file", rest_lost=True))
    return [shard for shard in shards if shard.size_bytes != 0]


def _largest(config: Config, names: dict[str, list[Shard]]) -> str:
    return min(names, key=lambda name: (-config.data.corpora[name].weight, name))


def _epoch_tokens(
    run: Path, config: Config, world: World, train: dict[str, list[Shard]], tokenizer: DocumentTokenizer
) -> int:
    """Tokens of the corpus with the largest weight, counted once per run and kept in RUN/epoch-tokens.

    Every rank counts some shards. They meet once a minute, because a collective operation must not
    wait for the slowest of them until it times out.
    """
    kept = run / "epoch-tokens"
    known: int | None = world.from_main(int(kept.read_text()) if world.main and kept.exists() else None)
    if known is not None:
        return known
    name = _largest(config, train)
    field = config.data.corpora[name].text_field
    report = DamageReport(run, config.data.on_corrupt, world.rank)
    own = train[name][world.rank :: world.size]
    texts = (text for shard in own for _, text in documents(shard, field, report))
    lengths = map(len, tokenizer.encode_stream(texts))
    total, counting = 0, 1
    while counting:
        until = time.monotonic() + MEET_SECONDS
        tokens, done = 0, True
        for length in lengths:
            tokens += length
            if time.monotonic() > until:
                done = False
                break
        tokens, counting = world.sum(tokens, not done)
        total += tokens
    if not total:
        raise ConfigError(f"data.corpora.{name}.train: no readable document with text in its field {field}")
    if world.main:
        written = kept.with_suffix(".new")
        written.write_text(str(total))
        written.replace(kept)
    return total
