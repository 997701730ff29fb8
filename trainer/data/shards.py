"""Shards: the files of a corpus, and the documents in them."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import fsspec
import pyarrow
import pyarrow.parquet
import zstandard

from configs.schema import ConfigError

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".parquet")


@dataclass(frozen=True)
class Shard:
    """One file: its fsspec address and its size in bytes."""

    address: str
    size_bytes: int


@dataclass(frozen=True)
class Damage:
    """What is wrong with a shard: at a document, or from a document on."""

    shard: str
    document: int
    reason: str
    rest_lost: bool


class DamagedShard(ConfigError):
    """A damaged document or shard under data.on_corrupt=fail."""


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
        except FileNotFoundError:
            found = {}
        except Exception as error:  # a file system's own exceptions share no base class
            raise ConfigError(f"{key}={pattern}: cannot be listed: {error}") from None
        files = {name: info for name, info in found.items() if info["type"] == "file"}
        if not files:
            raise ConfigError(f"{key}={pattern}: no such file")
        for name, info in files.items():
            if not name.endswith(SUFFIXES):
                raise ConfigError(f"{key}={name}: unknown format; allowed: {', '.join(SUFFIXES)}")
            address = file_system.unstrip_protocol(name)
            shards[address] = Shard(address, int(info["size"] or 0))
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
    Documents that were not asked for are passed over without being parsed.
    """
    read = _parquet_rows if shard.address.endswith(".parquet") else _lines
    number = first
    if shard.size_bytes == 0:
        on_damage(Damage(shard.address, 0, "empty file", rest_lost=True))
        return
    try:
        for number, raw in read(shard, text_field, first, stride):
            if isinstance(raw, bytes) and not raw.strip():
                continue
            try:
                text = json.loads(raw)[text_field] if isinstance(raw, bytes) else raw
                if not isinstance(text, str):
                    raise TypeError(f"field {text_field} is not text")
            except (ValueError, KeyError, TypeError) as error:
                reason = f"no field {text_field}" if isinstance(error, KeyError) else str(error)
                on_damage(Damage(shard.address, number, reason[:200], rest_lost=False))
            else:
                yield number, text
    except (EOFError, OSError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException) as error:
        on_damage(Damage(shard.address, number, f"{type(error).__name__}: {error}"[:200], rest_lost=True))


def _is_glob(path: str) -> bool:
    return any(character in path for character in "*?[")


def _lines(shard: Shard, text_field: str, first: int, stride: int) -> Iterator[tuple[int, bytes]]:
    with fsspec.open(shard.address, "rb") as file:
        for number, line in enumerate(_decompressed(file, shard.address)):
            if number >= first and (number - first) % stride == 0:
                yield number, line


def _decompressed(file: IO[bytes], address: str) -> Any:
    if address.endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    if address.endswith(".zst"):
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
    return file


def _parquet_rows(shard: Shard, text_field: str, first: int, stride: int) -> Iterator[tuple[int, Any]]:
    with fsspec.open(shard.address, "rb") as file:
        table = pyarrow.parquet.ParquetFile(file)
        if text_field not in table.schema_arrow.names:
            raise pyarrow.ArrowInvalid(f"no column {text_field}")
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
            column = batch.column(0)
            start = number + (first - number) % stride if number >= first else first
            for row in range(start - number, len(column), stride):
                yield number + row, column[row].as_py()
            number += len(column)
