"""Shards of tokens, written whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from configs.schema import ConfigError
from configs.text import Data
from trainer.data.damage import Damage, DamageReport, Unavailable
from trainer.data.decontaminate import Decontamination
from trainer.data.listing import Shard
from trainer.data.shards import Reading, documents
from trainer.data.tokenized import MANIFEST, Entry, Record, Written, base_of, differing, id_type, terms
from trainer.data.tokenizer import Encoder

DOCUMENTS_PER_ENCODE = 256
CHARACTERS_PER_ENCODE = 1 << 21
UNFINISHED = ".part"


class Writer:
    """Tokenizes shards into a directory."""

    def __init__(
        self,
        directory: Path,
        data: Data,
        held_out: Mapping[str, Sequence[Shard]],
        encoder: Encoder,
        decontamination: Decontamination | None,
        on_tokens: Callable[[int], None],
    ) -> None:
        self._directory = directory
        self._data = data
        self._encoder = encoder
        self._type = id_type(encoder.vocabulary)
        self._decontamination = decontamination
        self._on_tokens = on_tokens
        self._reading = Reading.of(data, directory)
        self._terms = {name: terms(data, name, held_out, encoder.fingerprint) for name in data.corpora}

    def finished(self, name: str, number: int, shard: Shard) -> Entry | None:
        """A shard's entry if its files are there. Raises ConfigError if they were made on other terms."""
        base = base_of(self._directory, name, number)
        try:
            record = TypeAdapter(Record).validate_json(base.with_suffix(".json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        if key := differing(self._terms[name], record.terms):
            raise ConfigError(
                f"data.tokenized={self._directory}: corpus {name} was tokenized with another {key}; "
                "give another directory, or remove this one"
            )
        if record.entry.shard != shard or record.entry.problem(base, self._type):
            return None
        return record.entry

    def write(self, name: str, number: int, shard: Shard) -> Entry:
        """Tokenize one shard. Raises ConfigError for a fault that fails, Unavailable, or OSError."""
        base = base_of(self._directory, name, number)
        base.parent.mkdir(parents=True, exist_ok=True)
        faults: Counter[str] = Counter()
        report = DamageReport(self._directory, self._data.faults, rank=0)

        def on_damage(damage: Damage) -> None:
            if damage.kind == "store":
                # What is lost here would be lost in every epoch.
                raise Unavailable(f"{damage.shard}, document {damage.document}: {damage.reason}")
            report(damage)
            faults[damage.kind] += 1

        lengths, dropped = [np.empty(0, np.int64)], 0
        done = 0
        found = documents(shard, self._data.corpora[name].text_field, on_damage, self._reading)
        with _whole(base.with_suffix(".tokens")) as tokens:
            for batch in _batches(found):
                kept = self._decontamination.kept(name, batch) if self._decontamination else batch
                dropped += len(batch) - len(kept)
                ids, starts = self._encoder.encode(list(kept.values()))
                tokens.write(ids.astype(self._type))
                self._on_tokens(len(ids))
                end = max(batch) + 1
                lengths.append(np.zeros(end - done, np.int64))
                lengths[-1][np.fromiter(kept, np.int64, len(kept)) - done] = np.diff(starts)
                done = end
            offsets = np.zeros(done + 1, "<i8")
            np.cumsum(np.concatenate(lengths), out=offsets[1:])
            remove(base.with_suffix(".json"))  # it must not vouch for the files that come now
            with _whole(base.with_suffix(".offsets")) as file:
                file.write(offsets)
        digests = {".tokens": tokens.digest.hexdigest(), ".offsets": file.digest.hexdigest()}
        entry = Entry(*shard, done, int(offsets[-1]), dict(faults), dropped, digests)
        _write_json(base.with_suffix(".json"), asdict(Record(self._terms[name], entry)))
        return entry

    def finish(self, corpora: dict[str, list[Entry]]) -> None:
        """Write the manifest: everything that it names is durable."""
        values = {name: asdict(Written(self._terms[name], entries)) for name, entries in corpora.items()}
        _write_json(self._directory / MANIFEST, {"corpora": values})


def remove(path: Path) -> None:
    """Take a file away for good, if it is there."""
    path.unlink(missing_ok=True)
    _make_names_durable(path.parent)


class _Digested:
    """A file and the digest of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, values: NDArray[Any]) -> None:
        data = values.tobytes()
        self._file.write(data)
        self.digest.update(data)


@contextmanager
def _whole(path: Path) -> Iterator[_Digested]:
    """A file that gets its name once it is complete. Raises ConfigError if another process is writing it."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with unfinished.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = unfinished.stat().st_ino == os.fstat(file.fileno()).st_ino
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:  # locked by another process, or renamed by it before we had the lock
            raise ConfigError(f"data.tokenized: another process is writing {path}")
        try:
            file.truncate(0)
            yield _Digested(file)
            file.flush()
            os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink()
            raise


def _write_json(path: Path, values: dict[str, Any]) -> None:
    """Last of its directory: what was renamed there before is durable with it."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    with unfinished.open("w") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    _make_names_durable(path.parent)


def _make_names_durable(directory: Path) -> None:
    opened = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _batches(found: Iterator[tuple[int, str]]) -> Iterator[dict[int, str]]:
    """Documents by number, some at a time: few enough that their tokens fit into memory."""
    batch, characters = dict[int, str](), 0
    for number, text in found:
        batch[number] = text
        characters += len(text)
        if len(batch) == DOCUMENTS_PER_ENCODE or characters > CHARACTERS_PER_ENCODE:
            yield batch
            batch, characters = {}, 0
    if batch:
        yield batch
