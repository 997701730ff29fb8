"""How much text a corpus has: counted in full, or estimated from a sample of its shards."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow.parquet

from configs.schema import ConfigError
from trainer.data.blocks import Place
from trainer.data.damage import Damage
from trainer.data.listing import Shard
from trainer.data.order import Order
from trainer.data.patience import Fault
from trainer.data.pieces import pieces
from trainer.data.shards import Reading, parquet_faults, spans
from trainer.data.stores import Reader
from trainer.data.tokenizer import DocumentTokenizer

WHOLE_BYTES = 64 << 20
"""Corpora of so many bytes at most are counted without being asked to."""
SAMPLED_SHARDS = 16
SAMPLED_TEXT_BYTES = 4 << 20
"""What is read of each sampled shard."""
RATIO_TEXT_BYTES = 16 << 20
"""Text from which it is seen how far a file is compressed; within some percent, as text comes in pieces."""
DOCUMENTS_PER_COUNT = 256
MOST_ROWS = 2**56
STUDENT = (
    *(12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306),
    *(2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""


@dataclass
class Counted:
    """What was read of one shard."""

    share: float = 1.0
    """Of the shard's text; 1 if all of it was read."""
    documents: int = 0
    """Those that have text and are not dropped."""
    text_bytes: int = 0
    """Of these documents, as UTF-8."""
    tokens: int = 0
    """End-of-document tokens included."""


class Estimate(NamedTuple):
    """A number for a whole corpus."""

    value: int
    error: float | None
    """Half of the 95 % interval, as a share of the value: 0 if counted, None if nothing can be said."""


def sampled(shards: Sequence[Shard]) -> list[Shard]:
    """At most SAMPLED_SHARDS of them, evenly spaced in the listing."""
    count = min(SAMPLED_SHARDS, len(shards))
    return [shards[(2 * index + 1) * len(shards) // (2 * count)] for index in range(count)]


def count(
    shard: Shard,
    text_field: str,
    tokenizer: DocumentTokenizer,
    reading: Reading,
    *,
    on_damage: Callable[[Damage], None],
    kept: Callable[[dict[int, str]], dict[int, str]] | None,
    most_text_bytes: float,
) -> Counted:
    """Count a shard's documents from its beginning on, all of them or little more than `most_text_bytes`."""
    if shard.size_bytes is None:
        most_text_bytes = math.inf  # what share was read could not be told
    counted = Counted()
    found = spans(
        shard,
        text_field,
        part=0,
        parts=1,
        window=DOCUMENTS_PER_COUNT,
        start=Place(),
        on_damage=on_damage,
        reading=reading,
    )
    with closing(found):
        for place, texts in found:
            if counted.text_bytes >= most_text_bytes:
                try:
                    counted.share = text_share(shard, place.offset, reading)
                except Fault as fault:  # it went away; what was read of it counts
                    number = place.block * DOCUMENTS_PER_COUNT
                    on_damage(Damage(fault.kind, shard.address, number, str(fault)[:200]))
                break
            counted_texts = list((kept(texts) if kept else texts).values())
            ids, starts = tokenizer.encode(counted_texts)
            counted.documents += int(np.count_nonzero(np.diff(starts)))
            counted.text_bytes += sum(len(text.encode()) for text in counted_texts)
            counted.tokens += len(ids)
    return counted


def estimate(
    counts: Sequence[tuple[Shard, Counted]], shards: Sequence[Shard], value: Callable[[Counted], int]
) -> Estimate:
    """A number of all `shards` from what was counted of some.

    Each counted shard is extrapolated to its whole, and these to the corpus by bytes: a ratio estimate over a
    sample of clusters (Cochran 1977, "Sampling Techniques", chapter 6), its error from how far the shards are
    from their common ratio. What was read is taken off as known.
    """
    sized = all(shard.size_bytes is not None for shard in shards)
    sizes = np.array([shard.size_bytes if sized else 1 for shard, _ in counts], float)
    total = float(sum((shard.size_bytes or 0) if sized else 1 for shard in shards))
    found = np.array([value(counted) / counted.share for _, counted in counts])
    if not sizes.sum():
        return Estimate(0, 0.0)
    ratio = found.sum() / sizes.sum()
    estimated = round(float(ratio * total))
    read = float(sum(size * counted.share for size, (_, counted) in zip(sizes, counts, strict=True))) / total
    if read >= 1 or not estimated:
        return Estimate(estimated, 0.0)
    if len(counts) == 1:
        return Estimate(estimated, None)
    degrees = len(counts) - 1
    spread = math.sqrt(float(np.square(found - ratio * sizes).sum()) / degrees)
    error = STUDENT[degrees - 1] * spread * math.sqrt((1 - read) / len(counts)) / float(found.mean())
    return Estimate(estimated, error)


def rows_for(order: Order, corpus: str, wanted: int) -> int:
    """The fewest rows of a run of which `wanted` come from a corpus.

    Raises ConfigError for a corpus that rests in the last stage and has not as many before.
    """
    most = 1
    while order.rows_of(most)[corpus] < wanted:
        most *= 2
        if most > MOST_ROWS:
            raise ConfigError(f"data.stages: corpus {corpus} never comes to {wanted:,} rows")
    return bisect_left(range(most), wanted, key=lambda rows: order.rows_of(rows)[corpus])


def text_share(shard: Shard, offset: int, reading: Reading) -> float:
    """Share of a shard's text, of its rows if it is a table, that lies before a place that spans() gave.

    Raises Fault if the shard cannot be read any more.
    """
    with closing(Reader(reading.source(shard))) as reader:
        if shard.suffix == ".parquet":
            with parquet_faults():
                rows: int = pyarrow.parquet.ParquetFile(reader).metadata.num_rows
            return offset / rows
        size = reader.size()
        if not shard.suffix.endswith((".gz", ".zst")):
            return offset / size
        text = position = 0
        try:
            for piece in pieces(reader, shard.suffix, 0):
                if reader.tell() != position:  # `text` bytes were in the `position` bytes before
                    if text >= max(offset, RATIO_TEXT_BYTES):
                        return offset / text * position / size
                    position = reader.tell()
                text += len(piece)
        except Fault as fault:  # all that can be read of it has been, if it is only damaged
            if fault.kind != "shard" or text < offset:
                raise
        return offset / text
