"""Shards: the files of a corpus, and the documents in them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import IO, Any

import fsspec
import pyarrow
import pyarrow.parquet
import zstandard

from configs.schema import ConfigError
from trainer.data.damage import Damage

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".parquet")
READ_BYTES = 1 << 14
"""As gzip, so much unfolds to 16 MB at most."""
ROWS_PER_READ = 128
LONGEST_LINE_BYTES = 1 << 28
"""A file without line ends, one JSON array say, must not be read into memory."""
LARGEST_ZSTD_WINDOW_BYTES = 1 << 31
"""What `zstd --long=31` needs, with which some public corpora are packed."""


@dataclass(frozen=True)
class Shard:
    """One file: its fsspec address and its size in bytes, None where the file system does not tell."""

    address: str
    size_bytes: int | None


def list_shards(key: str, patterns: list[str]) -> list[Shard]:
    """Files that paths and globs name, sorted by address.

    Raises ConfigError naming `key` for a pattern without a file, an unknown format, or files that are
    all empty.
    """
    shards: dict[str, Shard] = {}
    for pattern in patterns:
        try:
            file_system, path = fsspec.url_to_fs(pattern)
            found = file_system.glob(path, detail=True) if _is_glob(path) else {path: file_system.info(path)}
            # A glob does not follow links, of which some caches are made.
            found = {
                name: file_system.info(name) if info["type"] == "other" else info
                for name, info in found.items()
            }
        except FileNotFoundError as error:
            raise ConfigError(f"{key}={error.filename or pattern}: no such file") from None
        except Exception as error:  # a file system's own exceptions share no base class
            raise ConfigError(f"{key}={pattern}: cannot be listed: {error}") from None
        files = {name: info for name, info in found.items() if info["type"] == "file"}
        if not files:
            raise ConfigError(f"{key}={pattern}: no such file")
        for name, info in files.items():
            if not name.endswith(SUFFIXES):
                raise ConfigError(f"{key}={name}: unknown format; allowed: {', '.join(SUFFIXES)}")
            address = file_system.unstrip_protocol(name)
            shards[address] = Shard(address, info["size"])
    if all(shard.size_bytes == 0 for shard in shards.values()):
        raise ConfigError(f"{key}={patterns[0]}: all {len(shards)} files are empty")
    return [shards[address] for address in sorted(shards)]


def documents(
    shard: Shard,
    text_field: str,
    on_damage: Callable[[Damage], None],
    first: int = 0,
    stride: int = 1,
) -> Iterator[tuple[int, str]]:
    """Number in the shard and text of every `stride`-th document from number `first` on.

    Damaged documents keep their number, so what one reader loses moves nothing for the others.
    Documents that were not asked for are passed over without being parsed. A file system that fails
    is no damage: OSError is raised, and the run can be resumed where the text is still whole.
    """
    parquet = shard.address.endswith(".parquet")
    read = _cells if parquet else _lines
    number = first
    if shard.size_bytes == 0:
        on_damage(Damage(shard.address, 0, "empty file", rest_lost=True))
        return
    try:
        for number, raw in read(shard, text_field, first, stride):
            if not parquet and not raw.strip():
                continue
            try:
                value = raw if parquet else json.loads(raw)[text_field]
                text = value.decode() if isinstance(value, bytes) else value
                if not isinstance(text, str):
                    raise TypeError(f"field {text_field} is not text")
                text.encode()  # fails on half a surrogate pair, which JSON can spell
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                reason = f"no field {text_field}" if isinstance(error, KeyError) else str(error)
                on_damage(Damage(shard.address, number, reason[:200], rest_lost=False))
            else:
                yield number, text
    except (EOFError, OSError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException) as error:
        # pyarrow calls damage OSError too, but without an errno.
        from_pyarrow = parquet and type(error) is OSError and error.errno is None
        if isinstance(error, OSError) and not from_pyarrow:
            error.add_note(f"while reading {shard.address}")
            raise
        on_damage(Damage(shard.address, number, f"{type(error).__name__}: {error}"[:200], rest_lost=True))


def _is_glob(path: str) -> bool:
    return any(character in path for character in "*?[")


def _lines(shard: Shard, text_field: str, first: int, stride: int) -> Iterator[tuple[int, Any]]:
    with fsspec.open(shard.address, "rb") as file:
        yield from islice(enumerate(_split(_decompressed(file, shard.address))), first, None, stride)


def _split(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of a text that comes in pieces."""
    begun: list[bytes] = []
    begun_bytes = 0
    for piece in pieces:
        end, *lines = piece.split(b"\n")
        begun.append(end)
        begun_bytes += len(end)
        if lines:
            yield b"".join(begun)
            begun = [lines.pop()]
            begun_bytes = len(begun[0])
            yield from lines
        if begun_bytes > LONGEST_LINE_BYTES:
            raise EOFError(f"a line is longer than {LONGEST_LINE_BYTES} bytes; not json lines?")
    yield b"".join(begun)


def _decompressed(file: IO[bytes], address: str) -> Iterator[bytes]:
    """Pieces of a file's text. Raises EOFError after the last whole piece of a file that is cut short."""
    new: Callable[[], Any]
    if address.endswith(".gz"):
        new = partial(zlib.decompressobj, 16 + zlib.MAX_WBITS)
    elif address.endswith(".zst"):
        new = zstandard.ZstdDecompressor(max_window_size=LARGEST_ZSTD_WINDOW_BYTES).decompressobj
    else:
        yield from iter(lambda: file.read(READ_BYTES), b"")
        return
    member = None  # gzip calls its parts members, zstd frames; a file may have any number of them
    while data := file.read(READ_BYTES):
        while data := data if member else data.lstrip(b"\0"):  # gzip files may be padded with zeros
            member = member or new()
            yield member.decompress(data)
            data = member.unused_data
            if member.eof:
                member = None
    if member:
        raise EOFError("the file is cut short")


def _cells(shard: Shard, text_field: str, first: int, stride: int) -> Iterator[tuple[int, Any]]:
    """Cells of a parquet file's text column as bytes, so that one which is not UTF-8 loses only itself."""
    with fsspec.open(shard.address, "rb") as file:
        # As pages rather than whole row groups, of which one can be all of a file.
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES)
        if text_field not in table.schema_arrow.names:
            raise pyarrow.ArrowInvalid(f"no column {text_field}")
        groups = [table.metadata.row_group(index).num_rows for index in range(table.num_row_groups)]
        number = 0
        while groups and number + groups[0] <= first:
            number += groups.pop(0)
        rest = range(table.num_row_groups - len(groups), table.num_row_groups)
        for batch in table.iter_batches(ROWS_PER_READ, row_groups=rest, columns=[text_field]):
            column = batch.column(0).cast(pyarrow.large_binary())
            start = number + (first - number) % stride if number >= first else first
            for row in range(start - number, len(column), stride):
                yield number + row, column[row].as_py()
            number += len(column)
