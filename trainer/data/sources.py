"""The corpora of a configuration as shards and as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

from configs.text import Data
from trainer.data.damage import Damage
from trainer.data.listing import Shard, list_shards
from trainer.data.shards import Reading, documents

MOST_DAMAGED = 1000
"""Damages after which no more first texts are looked for in a corpus; a wrong text_field damages all."""

Shards = dict[str, list[Shard]]
"""By corpus."""


def list_corpora(data: Data, on_damage: Callable[[Damage], None]) -> tuple[Shards, Shards]:
    """Shards that are trained on, and held-out ones. Raises ConfigError naming the key.

    Empty files are damage and left out: a lane must not be dealt nothing but an empty one.
    """
    train, held_out = Shards(), Shards()
    for name, corpus in data.corpora.items():
        for split, patterns, found in (
            ("train", corpus.train, train),
            ("validation", corpus.validation, held_out),
        ):
            if patterns is None:
                continue
            shards = list_shards(f"data.corpora.{name}.{split}", patterns)
            for shard in shards:
                if shard.size_bytes == 0:
                    on_damage(Damage("shard", shard.address, 0, "empty file"))
            found[name] = [shard for shard in shards if shard.size_bytes != 0]
    return train, held_out


def texts_of(
    data: Data, name: str, shards: list[Shard], on_damage: Callable[[Damage], None], reading: Reading
) -> Iterator[str]:
    """Documents of some shards of a corpus, in file order."""
    field = data.corpora[name].text_field
    return (text for shard in shards for _, text in documents(shard, field, on_damage, reading))


def first_texts(data: Data, train: Shards, reading: Reading) -> Iterator[str]:
    """Documents of all corpora, in turn, from the beginnings of their first shards; damage is not told.

    A corpus ends early where it is too damaged.
    """
    readers = [_beginning(data, name, shards, reading) for name, shards in train.items()]
    while readers:
        for reader in list(readers):
            text = next(reader, None)
            if text is None:
                readers.remove(reader)
            else:
                yield text


class _TooDamaged(Exception):
    pass


def _beginning(data: Data, name: str, shards: list[Shard], reading: Reading) -> Iterator[str]:
    damages = 0

    def on_damage(damage: Damage) -> None:
        nonlocal damages
        damages += 1
        if damages > MOST_DAMAGED:
            raise _TooDamaged

    with suppress(_TooDamaged):
        yield from texts_of(data, name, shards, on_damage, reading)
