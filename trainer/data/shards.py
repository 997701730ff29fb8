"""The documents in a shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow
import pyarrow.parquet

from configs.text import Data, Retry
from trainer.data.blocks import Place
from trainer.data.cache import Copies
from trainer.data.damage import Damage
from trainer.data.index import SMALLEST_BYTES, Indexes
from trainer.data.listing import Shard, is_local
from trainer.data.passes import HELD_BYTES, Bulk, Passes
from trainer.data.patience import Fault
from trainer.data.pieces import pieces
from trainer.data.stores import LocalSource, Reader, Source, StoreSource

LONGEST_LINE_BYTES = 1 << 28
"""A file without line ends, one JSON array say, must not be read into memory."""
PAGE_BYTES = 1 << 18
ROWS_PER_READ = 256
DOCUMENTS_PER_SPAN = 1024
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Span(NamedTuple):
    """The readable documents of a block."""

    place: Place
    texts: dict[int, str]
    """By place in the block; damaged and absent documents have no key."""


@dataclass(frozen=True)
class Reading:
    """How shards are read."""

    retry: Retry
    copies: Copies | None = None
    """Where remote shards are kept, if they are."""
    indexes: Indexes | None = None
    """Where points in large gzip files are kept."""
    passes: Passes = field(default_factory=Passes)
    """Those under way, of shards that are cut into parts."""
    given_up: set[str] = field(default_factory=set)
    """Shards whose store failed after all attempts; waiting for them again would stall every lane in turn."""

    @classmethod
    def of(cls, data: Data, run: Path) -> Reading:
        """As the configuration says. Raises ConfigError if the cache's directory cannot be used."""
        if data.cache.directory is None:
            return cls(data.retry, None, Indexes(run / "index"))
        copies = Copies(data.cache, data.retry, run)
        return cls(data.retry, copies, Indexes(Path(data.cache.directory) / "trainyard-index"))

    def source(self, shard: Shard) -> Source:
        """The bytes of a shard."""
        if is_local(shard.address):
            return LocalSource(shard.address.rpartition("://")[2], shard, self.retry)
        return self.copies.open(shard) if self.copies else StoreSource(shard, self.retry)


def spans(
    shard: Shard,
    text_field: str,
    *,
    part: int,
    parts: int,
    window: int,
    start: Place,
    on_damage: Callable[[Damage], None],
    reading: Reading,
) -> Generator[Span]:
    """Blocks of part `part` of `parts` of a shard, in order; blocks without a readable document are left out.

    Block b is documents b * window * parts to (b + 1) * window * parts - 1 of the shard, of which every
    `parts`-th from `part` on is parsed. `start.offset` is sought if it is not 0. Damaged documents keep their
    number, so that what one reader loses moves nothing for the others.
    """
    span = window * parts
    place, texts, seen = start if start.offset else Place(), dict[int, str](), 0

    def begin(offset: int) -> Generator[Bulk]:
        return _bulks(shard, text_field, offset, span, span - seen, reading)

    key = (shard.address, text_field, span)
    reach = span if shard.suffix == ".parquet" else HELD_BYTES
    bulks = reading.passes.read(key, place.offset, reach, begin) if parts > 1 else begin(place.offset)
    offset, empty = place.offset, place == Place()

    def refused(number: int, reason: str) -> None:
        on_damage(Damage("document", shard.address, place.block * span + number, reason))

    with closing(bulks):
        try:
            if shard.size_bytes == 0:
                raise Fault("shard", "empty file")
            if shard.address in reading.given_up:
                raise Fault("store", "given up before")
            for raw, extent in bulks:
                empty = False
                first = (part - seen) % parts
                if place.block >= start.block:
                    _parse(raw[first::parts], shard.suffix, text_field, seen + first, parts, texts, refused)
                seen += len(raw)
                offset += extent
                if seen == span:
                    if texts:
                        yield Span(place, texts)
                    place, texts, seen = Place(place.block + 1, offset), {}, 0
            if empty:
                raise Fault("shard", "no document in it")
        except Fault as fault:
            number = place.block * span + seen
            if fault.kind == "store":
                reading.given_up.add(shard.address)
            on_damage(Damage(fault.kind, shard.address, number, str(fault)[:200]))
        if texts:
            yield Span(place, texts)


def documents(
    shard: Shard, text_field: str, on_damage: Callable[[Damage], None], reading: Reading
) -> Iterator[tuple[int, str]]:
    """Number in the shard and text of every readable document."""
    found = spans(
        shard,
        text_field,
        part=0,
        parts=1,
        window=DOCUMENTS_PER_SPAN,
        start=Place(),
        on_damage=on_damage,
        reading=reading,
    )
    with closing(found):
        for place, texts in found:
            for number, text in texts.items():
                yield place.block * DOCUMENTS_PER_SPAN + number, text


def _bulks(
    shard: Shard, text_field: str, offset: int, span: int, room: int, reading: Reading
) -> Generator[Bulk]:
    """Documents as they lie in the file, some at a time but no more than end a block, and their extent in
    what a Place counts: bytes of text, or rows. Raises Fault."""
    with closing(Reader(source := reading.source(shard))) as reader, ExitStack() as stack:
        if shard.suffix == ".parquet":
            found = _rows(reader, text_field, offset)
        else:
            index = None
            large = shard.suffix.endswith(".gz") and (shard.size_bytes or 0) >= SMALLEST_BYTES
            if large and reading.indexes and source.path:
                index = reading.indexes.find(shard, source.path)
                if index is None:
                    stack.enter_context(reading.indexes.wanted(shard, source.path))
            found = _lines(pieces(reader, shard.suffix, offset, index))
        begins = offset == 0
        for raws in found:
            for at in _cuts(len(raws), room, span):
                some = raws[at]
                room = room - len(some) or span
                if shard.suffix == ".parquet":
                    yield some, len(some)
                    continue
                extent = sum(map(len, some)) + len(some)
                if begins:
                    some[0] = some[0].removeprefix(BYTE_ORDER_MARK)
                    begins = False
                yield some, extent


def _cuts(count: int, room: int, span: int) -> Iterator[slice]:
    """`count` documents in stretches of which the first has `room` places and the others have `span`."""
    begin, end = 0, room
    while begin < count:
        yield slice(begin, end)
        begin, end = end, end + span


def _lines(found: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Lines of a text that comes in pieces."""
    begun: list[bytes] = []
    begun_bytes = 0
    for piece in found:
        lines = piece.split(b"\n")
        begun.append(lines[0])
        begun_bytes += len(lines[0])
        if begun_bytes > LONGEST_LINE_BYTES:
            begun.clear()  # the traceback keeps what is here
            raise Fault(
                "shard", f"a line is longer than {LONGEST_LINE_BYTES} bytes; not a document per line?"
            )
        if len(lines) > 1:
            last = lines.pop()
            lines[0] = b"".join(begun)
            yield lines
            begun = [last]
            begun_bytes = len(last)
    if begun_bytes:
        yield [b"".join(begun)]


@contextmanager
def parquet_faults() -> Iterator[None]:
    """What pyarrow raises becomes Fault; on damaged files that may be anything."""
    try:
        yield
    except Fault:
        raise
    except Exception as error:
        raise Fault("shard", f"{type(error).__name__}: {error}") from error


def _rows(reader: Reader, text_field: str, offset: int) -> Iterator[pyarrow.Array]:
    """Cells of a parquet file's text column as bytes, so that one which is not UTF-8 loses only itself."""
    with parquet_faults():
        # As pages rather than whole row groups, of which one can be all of a file.
        table = pyarrow.parquet.ParquetFile(reader, pre_buffer=False, buffer_size=PAGE_BYTES)
        if text_field not in table.schema_arrow.names:
            raise Fault("shard", f"no column {text_field}")
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if offset >= rows:
                offset -= rows
                continue
            # A group at a time, so that readers from different places lose the same rows of a damaged file.
            for batch in table.iter_batches(ROWS_PER_READ, row_groups=[group], columns=[text_field]):
                column = batch.column(0).cast(pyarrow.large_binary())[offset:]
                offset = max(0, offset - len(batch))
                if len(column):
                    yield column
        if offset:
            raise Fault("changed", f"ends {offset} rows before the place that was left")


def _parse(
    raws: Any,
    suffix: str,
    field: str,
    number: int,
    parts: int,
    texts: dict[int, str],
    refused: Callable[[int, str], None],
) -> None:
    """Add the texts of documents `number`, `number + parts`, ... of a block."""
    loads = orjson.loads
    try:
        if suffix.startswith(".txt"):
            found = [str(raw.removesuffix(b"\r"), "utf-8") for raw in raws]
            plain = all(map(str.strip, found))
        elif suffix == ".parquet":
            raws = raws.to_pylist()
            found = [str(raw, "utf-8") for raw in raws]
            plain = True
        else:
            found = [loads(raw)[field] for raw in raws]
            plain = all(type(text) is str for text in found)
    except (ValueError, KeyError, TypeError, RecursionError):
        plain = False
    if plain:
        texts.update(zip(range(number // parts, number // parts + len(found)), found, strict=True))
        return
    for index, raw in enumerate(raws):
        try:
            text = _text(raw, suffix, field)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"no field {field}" if isinstance(error, KeyError) else str(error)
            refused(number + index * parts, reason[:200])
        else:
            if text is not None:
                texts[number // parts + index] = text


def _text(raw: Any, suffix: str, field: str) -> str | None:
    """The text of a document, None for a blank line. Raises what json does, KeyError or TypeError."""
    if suffix == ".parquet":
        if not isinstance(raw, bytes):
            raise TypeError(f"field {field} is not text")
        return str(raw, "utf-8")
    if not raw.strip():
        return None
    if suffix.startswith(".txt"):
        return str(raw.removesuffix(b"\r"), "utf-8")
    try:
        text = orjson.loads(raw)[field]
    except orjson.JSONDecodeError:  # as for NaN, which json knows
        text = json.loads(str(raw, "utf-8"))[field]
    if not isinstance(text, str):
        raise TypeError(f"field {field} is not text")
    text.encode()  # fails on half a surrogate pair, which JSON can spell
    return text
