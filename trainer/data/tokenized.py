"""A corpus that was tokenized ahead: `trainyard tokenize` writes it, training maps it into memory.

    DIR/manifest.json            what was tokenized and how; written last
    DIR/CORPUS/00012.json        a finished shard, its entry in the manifest and the terms of its making
    DIR/CORPUS/00012.tokens      ids of its documents, end to end, little-endian uint16 or uint32
    DIR/CORPUS/00012.offsets     int64 [documents + 1], little-endian: where each document begins, and the end

Documents stand in the order of the file, each with its end-of-document token. They are numbered as the
reader of the text numbers them; a damaged or dropped one is empty.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.schema import ConfigError
from configs.text import Data
from trainer.data.blocks import Block, Place, Ragged
from trainer.data.listing import Shard
from trainer.data.tokenizer import DocumentTokenizer

FORMAT = 1
MANIFEST = "manifest.json"
SMALL_VOCABULARY = 2**16
"""Largest whose ids are written as uint16."""
DOCUMENTS_PER_ENCODE = 256
OFFSET_BYTES = 8


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
        sizes = {".tokens": self.tokens * type_.itemsize, ".offsets": (self.documents + 1) * OFFSET_BYTES}
        for suffix, size_bytes in sizes.items():
            path = base.with_suffix(suffix)
            try:
                found = path.stat().st_size
            except FileNotFoundError:
                return f"{path} is missing"
            if found != size_bytes:
                return f"{path} has {found} bytes instead of {size_bytes}"
        return None


def terms(data: Data, name: str, fingerprint: str) -> dict[str, Any]:
    """What the ids of a corpus follow from besides its shards, by the key that a person would change."""
    cleaned = data.decontaminate != "none"
    return {
        "format": FORMAT,
        "model.tokenizer": fingerprint,
        f"data.corpora.{name}.text_field": data.corpora[name].text_field,
        "data.decontaminate": data.decontaminate,
    } | {
        f"data.corpora.{other}.validation": corpus.validation
        for other, corpus in sorted(data.corpora.items())
        if cleaned and corpus.validation
    }


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
        self._window = window
        self._type = type_

    @classmethod
    def open(
        cls, data: Data, name: str, shards: Sequence[Shard], tokenizer: DocumentTokenizer
    ) -> TokenizedCorpus:
        """A corpus of data.tokenized. Raises ConfigError if it is unfinished, of other text or damaged."""
        assert data.tokenized is not None
        directory, shown = Path(data.tokenized), f"data.tokenized={data.tokenized}"
        again = "run `trainyard tokenize` again"
        try:
            written = json.loads((directory / MANIFEST).read_text())["corpora"].get(name)
        except FileNotFoundError:
            missing = f"not finished, {again}" if directory.is_dir() else "no such directory"
            raise ConfigError(f"{shown}: {missing}") from None
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{shown}: {MANIFEST} cannot be read: {error}") from None
        if written is None:
            raise ConfigError(f"{shown}: corpus {name} is not in it; {again}")
        if key := differing(terms(data, name, tokenizer.fingerprint), written["terms"]):
            raise ConfigError(f"{shown}: corpus {name} was tokenized with another {key}")
        entries = [Entry(**values) for values in written["shards"]]
        if [entry.shard for entry in entries] != list(shards):
            other = set(shards) ^ {entry.shard for entry in entries}
            first = min((shard.address for shard in other), default="their order")
            raise ConfigError(
                f"{shown}: data.corpora.{name}.train has other shards than were tokenized: {first}; {again}"
            )
        type_ = id_type(tokenizer.vocabulary)
        bases = [base_of(directory, name, number) for number in range(len(entries))]
        for entry, base in zip(entries, bases, strict=True):
            if problem := entry.problem(base, type_):
                raise ConfigError(f"{shown}: damaged: {problem}; {again}")
        return cls(bases, [entry.address for entry in entries], data.shuffle_window, type_)

    def blocks(self, shard: int, part: int, parts: int, start: Place) -> Generator[Block]:
        """See Corpus. Places have no offset, so that a run may go on with the text itself."""
        base, item = self._bases[shard], self._type.itemsize
        tokens = _mapped(base.with_suffix(".tokens"))
        offsets = np.frombuffer(_mapped(base.with_suffix(".offsets")), "<i8")
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


def _mapped(path: Path) -> mmap.mmap | bytes:
    """A file in memory; an empty one cannot be mapped."""
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            return b""


def _let_go(mapped: mmap.mmap | bytes, begin: int, end: int) -> None:
    """Unmap pages that have been read: they stay in the system's cache, but are no longer this process's."""
    first = begin // mmap.PAGESIZE * mmap.PAGESIZE
    if isinstance(mapped, mmap.mmap) and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED, first, end - first)
