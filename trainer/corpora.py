"""The text of a run: tokenizer, shards, held-out rows, and the number of steps they make."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from cluster import events
from configs.schema import Config, ConfigError
from trainer.data.blocks import Corpus, Place
from trainer.data.census import rows_for
from trainer.data.damage import Damage, DamageReport, Unavailable
from trainer.data.decontaminate import Decontamination, HeldOut
from trainer.data.engines import fastokens_version
from trainer.data.listing import Shard, list_shards
from trainer.data.order import Order
from trainer.data.packing import best_fit_rows
from trainer.data.shards import Reading
from trainer.data.sources import Shards, first_texts, list_corpora, texts_of
from trainer.data.texts import TextCorpus
from trainer.data.tokenized import TokenizedCorpus
from trainer.data.tokenizer import DocumentTokenizer, choose_engine, load_tokenizer
from trainer.distributed import World
from trainer.evaluation import Rows, validation_rows

MEET_SECONDS = 60
ORDER = 2
"""Version of the rules by which rows follow from corpora and seed."""


@dataclass(frozen=True)
class Corpora:
    """Text of a run."""

    tokenizer: DocumentTokenizer
    train: dict[str, Corpus]
    """Corpora that are trained on."""
    validation: dict[str, Rows]
    """Held-out rows by corpus, [rows, sequence_length + 1]."""
    epoch_tokens: int | None
    """Tokens of one pass over the corpus with the largest weight; only counted for budget=epochs."""
    fingerprints: dict[str, Any]
    """By key, what decides the order of rows; a checkpoint resumes only where all are the same."""
    damage: DamageReport
    decontamination: Decontamination | None


def load_corpora(run: Path, config: Config, world: World) -> Corpora:
    """List shards once, on rank 0, and read held-out rows. Raises ConfigError naming the key."""
    tokenizer = load_tokenizer(config.model)
    report = DamageReport(run, config.data.faults, world.rank, silent=not world.main)
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
    reading = Reading.of(config.data, run)
    _choose_engine(run, config, world, tokenizer, train, reading)
    validation = {}
    for name, shards in held_out.items():
        field = config.data.corpora[name].text_field
        texts = texts_of(config.data, name, shards, report, reading)
        rows = validation_rows(texts, tokenizer, config.model.sequence_length, config.evaluation.rows)
        if not len(rows):
            raise ConfigError(
                f"data.corpora.{name}.validation: no readable document with text in its field {field}"
            )
        validation[name] = rows
    told = DamageReport(run, config.data.faults, world.rank)
    cleaned = _decontamination(run, config, world, held_out, report, reading)
    corpora = {
        name: _corpus(config, name, shards, tokenizer, told, reading, cleaned, held_out)
        for name, shards in train.items()
    }
    epoch_tokens = None
    if config.budget.kind == "epochs":
        name = _largest(config, train)
        uncounted = None if cleaned is None else cleaned.again()
        silent = DamageReport(run, config.data.faults, world.rank, silent=True)
        counted = _corpus(config, name, train[name], tokenizer, silent, reading, uncounted, held_out)
        epoch_tokens = _epoch_tokens(run, config, world, name, counted)
    decided = fingerprints(config, train, held_out, tokenizer)
    return Corpora(tokenizer, corpora, validation, epoch_tokens, decided, told, cleaned)


def steps_of(config: Config, corpora: Corpora) -> int:
    """Optimizer steps that spend the budget, the last one in full."""
    tokens = config.budget.tokens
    if tokens is None:
        assert config.budget.epochs is not None
        assert corpora.epoch_tokens is not None
        wanted = math.ceil(config.budget.epochs * corpora.epoch_tokens / config.model.sequence_length)
        order = Order(config.data, config.model.sequence_length, config.seed)
        rows = rows_for(order, _largest(config, corpora.train), wanted)
        return max(1, math.ceil(rows / config.global_batch))
    return max(1, math.ceil(tokens / (config.global_batch * config.model.sequence_length)))


def _corpus(
    config: Config,
    name: str,
    shards: list[Shard],
    tokenizer: DocumentTokenizer,
    on_damage: Callable[[Damage], None],
    reading: Reading,
    cleaned: Decontamination | None,
    held_out: Shards,
) -> Corpus:
    data = config.data
    if data.tokenized is not None:
        return TokenizedCorpus.open(data, name, shards, held_out, tokenizer)
    return TextCorpus(
        shards,
        data.corpora[name].text_field,
        data.shuffle_window,
        tokenizer,
        on_damage,
        reading,
        None if cleaned is None else partial(cleaned.kept, name),
    )


def _choose_engine(
    run: Path, config: Config, world: World, tokenizer: DocumentTokenizer, train: Shards, reading: Reading
) -> None:
    """Rank 0 compares engines on the first documents, once for a run; the others take what it took."""
    failure, engine = None, config.data.engine
    if world.main:
        kept = run / "tokenizer-engine.json"
        terms = {"tokenizer": tokenizer.fingerprint, "asked": engine, "version": fastokens_version()}
        try:
            known = json.loads(kept.read_text()) if kept.exists() else {}
            same = known.get("terms") == terms
            texts = () if same else first_texts(config.data, train, reading)
            _, reason = choose_engine(tokenizer, known["engine"] if same else engine, texts)
        except ConfigError as error:
            failure = error
        else:
            engine = tokenizer.engine
            if not same:
                _keep(kept, json.dumps({"terms": terms, "engine": engine}))
            why = {} if reason is None else {"reason": reason}
            events.record(run, "tokenizer_engine", engine=engine, **why)
    failure, engine = world.from_main((failure, engine))
    if failure is not None:
        raise failure
    if not world.main:
        choose_engine(tokenizer, engine, ())


def _decontamination(
    run: Path,
    config: Config,
    world: World,
    held_out: Shards,
    on_damage: Callable[[Damage], None],
    reading: Reading,
) -> Decontamination | None:
    """Held-out documents of all corpora, which no training document may be; hashed once, by rank 0."""
    kind = config.data.decontaminate
    if kind == "none" or config.data.tokenized is not None:  # done when it was tokenized
        return None
    kept = run / "held-out"
    failure = None
    if world.main:
        texts = chain.from_iterable(
            texts_of(config.data, name, shards, on_damage, reading) for name, shards in held_out.items()
        )
        try:
            HeldOut.of(texts, kind).save(kept)
        except (ConfigError, Unavailable) as error:
            failure = error
    if (failure := world.from_main(failure)) is not None:
        raise failure
    return Decontamination(HeldOut.open(kept))


def fingerprints(
    config: Config, train: Shards, held_out: Shards, tokenizer: DocumentTokenizer
) -> dict[str, Any]:
    """By key, what the order of rows follows from, in JSON values."""
    data = config.data
    keys = {
        "order": ORDER,
        "seed": config.seed,
        "model.sequence_length": config.model.sequence_length,
        "model.tokenizer": tokenizer.fingerprint,
        "data.lanes": data.lanes,
        "data.shuffle_window": data.shuffle_window,
        "data.packing": data.packing,
        "data.temperature": data.temperature,
        "data.decontaminate": data.decontaminate,
        "data.stages": [stage.model_dump() for stage in data.stages],
    }
    if data.decontaminate != "none":
        for name, shards in held_out.items():
            keys[f"data.corpora.{name}.validation"] = _digest(shards)
            keys[f"data.corpora.{name}.text_field"] = data.corpora[name].text_field
    for name, shards in train.items():
        keys[f"data.corpora.{name}.train"] = _digest(shards)
        keys[f"data.corpora.{name}.weight"] = data.corpora[name].weight
        keys[f"data.corpora.{name}.text_field"] = data.corpora[name].text_field
    return keys


def _digest(shards: list[Shard]) -> str:
    listed = json.dumps([list(shard) for shard in shards])
    return hashlib.blake2b(listed.encode(), digest_size=16).hexdigest()


def _frozen_list(run: Path, config: Config, on_damage: Callable[[Damage], None]) -> tuple[Shards, Shards]:
    """The shards as the first attempt found them, kept in RUN/shards.json.

    Positions in the data count shards, so files that come or go later must not move them. A store that does
    not answer now does not hinder: what has changed is found where it is read, too.
    """
    kept = run / "shards.json"
    if not kept.exists():
        train, held_out = list_corpora(config.data, on_damage)
        named = {"train": train, "validation": held_out}
        values = {
            split: {name: [list(shard) for shard in shards] for name, shards in found.items()}
            for split, found in named.items()
        }
        _keep(kept, json.dumps(values))
        return train, held_out
    values = json.loads(kept.read_text())
    train, held_out = (
        {name: [Shard(*shard) for shard in shards] for name, shards in values[split].items()}
        for split in ("train", "validation")
    )
    for name, shards in train.items():
        try:
            present = set(list_shards(f"data.corpora.{name}.train", config.data.corpora[name].train or []))
        except ConfigError as error:
            events.record(run, "shards_unchecked", corpus=name, reason=str(error))
            continue
        for shard in shards:
            if shard not in present:
                on_damage(Damage("changed", shard.address, 0, "changed since the run began"))
    return train, held_out


def _keep(path: Path, text: str) -> None:
    """Write a file for the attempts to come, whole or not at all."""
    written = path.with_suffix(".new")
    written.write_text(text)
    written.replace(path)


def _largest(config: Config, names: Iterable[str]) -> str:
    return min(names, key=lambda name: (-config.data.corpora[name].weight, name))


def _epoch_tokens(run: Path, config: Config, world: World, name: str, corpus: Corpus) -> int:
    """Tokens of a corpus, counted once per run and kept in RUN/epoch-tokens.

    With best_fit those of its rows, padding included. Every rank counts some shards. They meet once a minute,
    because a collective operation must not wait for the slowest of them until it times out.
    """
    kept = run / "epoch-tokens"
    known: int | None = world.from_main(int(kept.read_text()) if world.main and kept.exists() else None)
    if known is not None:
        return known
    own = range(world.rank, len(corpus.addresses), world.size)
    lengths = _block_tokens(config, corpus, own)
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
        field = config.data.corpora[name].text_field
        raise ConfigError(f"data.corpora.{name}.train: no readable document with text in its field {field}")
    if world.main:
        _keep(kept, str(total))
    return total


def _block_tokens(config: Config, corpus: Corpus, shards: Iterable[int]) -> Iterator[int]:
    """Tokens of each block of some shards."""
    length = config.model.sequence_length
    for shard in shards:
        for block in corpus.blocks(shard, 0, 1, Place()):
            documents = block.encode(block.documents)
            if config.data.packing == "best_fit":
                yield length * best_fit_rows(documents.starts, length + 1)
            else:
                yield len(documents.ids)
