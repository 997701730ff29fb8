"""A corpus that was tokenized ahead: `trainyard tokenize` writes it, training maps it into memory.

    DIR/manifest.json            what was tokenized and how; written last
    DIR/CORPUS/00012.json        a finished shard, its entry in the manifest and the terms of its making
    DIR/CORPUS/00012.tokens      ids of its documents, end to end, little-endian uint16 or uint32
    DIR/CORPUS/00012.offsets     int64 [documents + 1], little-endian: where each document begins, and the end

Documents stand in the order of the file, each with its end-of-document token. They are numbered as the
reader of the text numbers them; a damaged or dropped one is empty.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from configs.load import reason
from configs.schema import ConfigError
from configs.text import Data
from trainer.data.blocks import Block, Place, Ragged
from trainer.data.damage import DamagedShard
from trainer.data.listing import Shard
from trainer.data.tokenizer import DocumentTokenizer

FORMAT = 1
MANIFEST = "manifest.json"
SMALL_VOCABULARY = 2**16
"""Largest whose ids are written as uint16."""
DOCUMENTS_PER_ENCODE = 256
OFFSET_BYTES = 8
SUFFIXES = (".tokens", ".offsets")
AGAIN = "run `trainyard tokenize` again"


@dataclass(frozen=True)
class Entry:
    """A tokenized shard."""

    address: str
    size_bytes: int | None
    version: str | None
    documents: int
    """Document numbers, damaged and dropped documents among them."""
    tokens: int
    faults: dict[str, int]
    """Faults that were skipped, by kind."""
    dropped: int
    """Documents that data.decontaminate took out."""
    sha256: dict[str, str]
    """Of the files, by suffix."""

    @property
    def shard(self) -> Shard:
        return Shard(self.address, self.size_bytes, self.version)

    def problem(self, base: Path, type_: np.dtype[Any]) -> str | None:
        """What is wrong with the sizes of the shard's files, none if nothing is."""
        sizes = (self.tokens * type_.itemsize, (self.documents + 1) * OFFSET_BYTES)
        for suffix, size_bytes in zip(SUFFIXES, sizes, strict=True):
            path = base.with_suffix(suffix)
            try:
                found = path.stat().st_size
            except FileNotFoundError:
                return f"{path} is missing"
            if found != size_bytes:
                return f"{path} has {found} bytes instead of {size_bytes}"
        return None


@dataclass(frozen=True)
class Record:
    """A finished shard's own file."""

    terms: dict[str, Any]
    entry: Entry


@dataclass(frozen=True)
class Written:
    """A corpus in the manifest."""

    terms: dict[str, Any]
    shards: list[Entry]


@dataclass(frozen=True)
class _Manifest:
    corpora: dict[str, Written]


def read_manifest(directory: Path) -> dict[str, Written]:
    """Corpora that were tokenized. Raises ConfigError if the directory is unfinished or damaged."""
    shown = f"data.tokenized={directory}"
    try:
        return TypeAdapter(_Manifest).validate_json((directory / MANIFEST).read_bytes()).corpora
    except FileNotFoundError:
        missing = f"not finished, {AGAIN}" if directory.is_dir() else "no such directory"
        raise ConfigError(f"{shown}: {missing}") from None
    except NotADirectoryError:
        raise ConfigError(f"{shown}: must be a directory") from None
    except OSError as error:
        raise ConfigError(f"{shown}: {reason(error)}") from None
    except ValueError:
        raise ConfigError(f"{shown}: {MANIFEST} is damaged; {AGAIN}") from None


def terms(data: Data, name: str, held_out: Mapping[str, Sequence[Shard]], fingerprint: str) -> dict[str, Any]:
    """What the ids of a corpus follow from besides its shards, by the key that a person would change.

    held_out: by corpus, shards that data.decontaminate reads; they stand in the terms as a digest.
    """
    found = {
        "format": FORMAT,
        "model.tokenizer": fingerprint,
        f"data.corpora.{name}.text_field": data.corpora[name].text_field,
        "data.decontaminate": data.decontaminate,
    }
    if data.decontaminate != "none":
        for other, shards in sorted(held_out.items()):
            listed = json.dumps([list(shard) for shard in shards])
            digest = hashlib.blake2b(listed.encode(), digest_size=16).hexdigest()
            found[f"data.corpora.{other}.validation"] = digest
            found[f"data.corpora.{other}.text_field"] = data.corpora[other].text_field
    return found


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """The first key whose terms are not the same, none if all are."""
    return next((key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key)), None)


def id_type(vocabulary: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocabulary <= SMALL_VOCABULARY else "<u4")


def base_of(directory: Path, name: str, number: int) -> Path:
    """Path of a tokenized shard's files, to which their suffixes are added."""
    return directory / name / f"{number:05d}"


class TokenizedCorpus:
    """Blocks of documents, mapped into memory."""

    documents_per_encode = DOCUMENTS_PER_ENCODE

    def __init__(self, bases: list[Path], addresses: list[str], window: int, type_: np.dtype[Any]) -> None:
        self.addresses: Sequence[str] = addresses
        self._bases = bases
        self._identities = [
            [_identity(base.with_suffix(suffix).stat()) for suffix in SUFFIXES] for base in bases
        ]
        self._window = window
        self._type = type_

    @classmethod
    def open(
        cls,
        data: Data,
        name: str,
        shards: Sequence[Shard],
        held_out: Mapping[str, Sequence[Shard]],
        tokenizer: DocumentTokenizer,
    ) -> TokenizedCorpus:
        """A corpus of data.tokenized. Raises ConfigError if it is unfinished, of other text or damaged."""
        assert data.tokenized is not None
        directory, shown = Path(data.tokenized), f"data.tokenized={data.tokenized}"
        written = read_manifest(directory).get(name)
        if written is None:
            raise ConfigError(f"{shown}: corpus {name} is not in it; {AGAIN}")
        if key := differing(terms(data, name, held_out, tokenizer.fingerprint), written.terms):
            raise ConfigError(f"{shown}: corpus {name} was tokenized with another {key}")
        entries = written.shards
        if [entry.shard for entry in entries] != list(shards):
            other = set(shards) ^ {entry.shard for entry in entries}
            first = min((shard.address for shard in other), default="their order")
            raise ConfigError(
                f"{shown}: data.corpora.{name}.train has other shards than were tokenized: {first}; {AGAIN}"
            )
        type_ = id_type(tokenizer.vocabulary)
        bases = [base_of(directory, name, number) for number in range(len(entries))]
        for entry, base in zip(entries, bases, strict=True):
            if problem := entry.problem(base, type_):
                raise ConfigError(f"{shown}: damaged: {problem}; {AGAIN}")
        return cls(bases, [entry.address for entry in entries], data.shuffle_window, type_)

    def blocks(self, shard: int, part: int, parts: int, start: Place) -> Generator[Block]:
        """See Corpus. Places have no offset, so that a run may go on with the text itself.

        Raises DamagedShard if a file is no longer the one that was there when the corpus was opened.
        """
        item = self._type.itemsize
        tokens, bounds = (
            _mapped(self._bases[shard].with_suffix(suffix), identity)
            for suffix, identity in zip(SUFFIXES, self._identities[shard], strict=True)
        )
        offsets = np.frombuffer(bounds, "<i8")
        begins, ends = offsets[part:-1:parts], offsets[part + 1 :: parts]
        for block in range(start.block, math.ceil(len(begins) / self._window)):
            numbers = slice(block * self._window, (block + 1) * self._window)
            begin, end = begins[numbers], ends[numbers]
            present = np.flatnonzero(begin < end).tolist()
            if present:
                yield Block(Place(block), present, partial(self._gathered, tokens, begin, end))
                _let_go(tokens, int(begin[0]) * item, int(end[-1]) * item)

    def _gathered(
        self,
        tokens: mmap.mmap | bytes,
        begins: NDArray[np.int64],
        ends: NDArray[np.int64],
        numbers: Sequence[int],
    ) -> Ragged:
        chosen, item = np.asarray(numbers, np.intp), self._type.itemsize
        begin, end = begins[chosen], ends[chosen]
        starts = np.zeros(len(chosen) + 1, np.int64)
        np.cumsum(end - begin, out=starts[1:])
        view, bounds = memoryview(tokens), zip((begin * item).tolist(), (end * item).tolist(), strict=True)
        # Joining bytes takes half the time of joining arrays: documents are short.
        joined = b"".join([view[first:last] for first, last in bounds])
        return Ragged(np.frombuffer(joined, self._type), starts)


def _identity(status: os.stat_result) -> tuple[int, int]:
    """What a file that was written anew does not have in common with the old one."""
    return status.st_ino, status.st_mtime_ns


def _mapped(path: Path, identity: tuple[int, int]) -> mmap.mmap | bytes:
    """A file in memory; an empty one cannot be mapped. Raises DamagedShard if it is another one."""
    with path.open("rb") as file:
        if _identity(os.fstat(file.fileno())) != identity:
            raise DamagedShard(f"{path}: changed since the run began; was it tokenized again meanwhile?")
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            return b""


def _let_go(mapped: mmap.mmap | bytes, begin: int, end: int) -> None:
    """Unmap pages that have been read: they stay in the system's cache, but are no longer this process's."""
    first = begin // mmap.PAGESIZE * mmap.PAGESIZE
    if isinstance(mapped, mmap.mmap) and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED, first, end - first)
