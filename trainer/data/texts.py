"""A corpus that is read as text and tokenized on the fly."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial

from trainer.data.blocks import Block, Place, Ragged
from trainer.data.damage import Damage
from trainer.data.listing import Shard
from trainer.data.shards import Reading, spans
from trainer.data.tokenizer import DocumentTokenizer

DOCUMENTS_PER_ENCODE = 64
"""Enough to occupy some cores; every lane holds so many encoded documents and as many ahead."""


class TextCorpus:
    """Blocks of documents, tokenized when they are asked for."""

    documents_per_encode = DOCUMENTS_PER_ENCODE

    def __init__(
        self,
        shards: Sequence[Shard],
        text_field: str,
        window: int,
        tokenizer: DocumentTokenizer,
        on_damage: Callable[[Damage], None],
        reading: Reading,
        kept: Callable[[dict[int, str]], dict[int, str]] | None = None,
    ) -> None:
        self.addresses: Sequence[str] = [shard.address for shard in shards]
        self._shards = shards
        self._text_field = text_field
        self._window = window
        self._tokenizer = tokenizer
        self._on_damage = on_damage
        self._reading = reading
        self._kept = kept

    def blocks(self, shard: int, part: int, parts: int, start: Place) -> Generator[Block]:
        """See Corpus; documents that `kept` leaves out are absent."""
        found = spans(
            self._shards[shard],
            self._text_field,
            part=part,
            parts=parts,
            window=self._window,
            start=start,
            on_damage=self._on_damage,
            reading=self._reading,
        )
        for place, texts in found:
            if self._kept is not None:
                texts = self._kept(texts)
            yield Block(place, list(texts), partial(self._encode, texts))

    def _encode(self, texts: dict[int, str], numbers: Sequence[int]) -> Ragged:
        return self._tokenizer.encode([texts[number] for number in numbers])
