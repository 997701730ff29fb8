"""Where checkpoints lie: a directory, or an address in an object store."""

from __future__ import annotations

import errno
import json
import os
import posixpath
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from configs.schema import Checkpoint, ConfigError
from trainer.checkpoint import manifest
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.storage import LOCAL, Reader, Writer

S3_OPTIONS = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 2}}}
"""A store that is away is noticed in seconds; how often to try again is decided elsewhere."""


class NoSpace(OSError):
    """The file system cannot hold the checkpoint. Its text is one line."""


class Away(OSError):
    """An object store does not answer, or refuses; it may do otherwise later. Its text is one line."""


class Place(ABC):
    """Checkpoints by step. One exists when its manifest does; before that it is a draft of an attempt."""

    fs: AbstractFileSystem

    def __init__(self, address: str) -> None:
        self.address = address

    @abstractmethod
    def steps(self) -> list[int]:
        """Steps of the checkpoints that exist, newest first."""

    @abstractmethod
    def damaged(self) -> int:
        """How many checkpoints have been set aside."""

    @abstractmethod
    def draft(self, step: int, attempt: int) -> str:
        """Path of the files of a checkpoint that does not exist yet."""

    @abstractmethod
    def begin(self, step: int, attempt: int) -> bool:
        """Make room for a draft; whether this process did it, and not another that shares the disk."""

    @abstractmethod
    def put(self, path: str, content: bytes) -> None:
        """Write a small file for good."""

    @abstractmethod
    def commit(self, whole: Manifest) -> None:
        """Let the checkpoint exist whose files have all been written."""

    @abstractmethod
    def folder(self, whole: Manifest) -> str:
        """Path of the files of a checkpoint that exists."""

    @abstractmethod
    def manifest(self, step: int) -> Manifest:
        """Raises ValueError with the reason if it is damaged."""

    @abstractmethod
    def set_aside(self, step: int) -> str:
        """Let a damaged checkpoint exist no more, but stay. Returns where it is."""

    @abstractmethod
    def tidy(self, kept: Collection[int]) -> None:
        """Remove other checkpoints than these, and what attempts that were killed left behind."""

    @abstractmethod
    def explain(self, error: Exception) -> Exception:
        """An error of this place as one that ranks can send to each other."""

    @abstractmethod
    def abandon(self, step: int, attempt: int) -> None:
        """Give up a draft."""

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raises the errors of this place as ranks can send them."""
        try:
            yield
        except Exception as error:
            raise self.explain(error) from error

    def at(self, step: int) -> str:
        """Path by which people know a checkpoint."""
        return f"{self.address}/step-{step:08d}"

    def writer(self, step: int, attempt: int) -> Writer:
        return Writer(self.fs, self.draft(step, attempt), self.explain)

    def reader(self, whole: Manifest) -> Reader:
        return Reader(self.folder(whole), self.fs, self.explain)

    def state(self, whole: Manifest) -> dict[str, Any]:
        """Content of state.json."""
        with self.explained():
            state: dict[str, Any] = json.loads(self.fs.cat_file(f"{self.folder(whole)}/state.json"))
        return state

    def visible(self, whole: Manifest) -> dict[str, int]:
        """Size in bytes of those of its files that this process sees."""
        with self.explained():
            entries = _entries(self.fs, self.folder(whole))
        return {file.name: entries[file.name] for file in whole.files if file.name in entries}

    def problem(self, whole: Manifest, part: int = 0, parts: int = 1) -> str | None:
        """What is wrong with this part of its files, or None."""
        with self.explained():
            return whole.problem(self.folder(whole), part, parts, self.fs)


class Directory(Place):
    """A directory on a disk or a network file system."""

    fs = LOCAL

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path

    def steps(self) -> list[int]:
        return _newest_first([path.name for path in self.path.glob("step-*")])

    def damaged(self) -> int:
        return len(list(self.path.glob("*.damaged-*")))

    def draft(self, step: int, attempt: int) -> str:
        return f"{self.address}/.step-{step:08d}.attempt-{attempt}"

    def begin(self, step: int, attempt: int) -> bool:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            os.mkdir(self.draft(step, attempt))
        except FileExistsError:
            return False
        return True

    def abandon(self, step: int, attempt: int) -> None:
        shutil.rmtree(self.draft(step, attempt), ignore_errors=True)

    def put(self, path: str, content: bytes) -> None:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def commit(self, whole: Manifest) -> None:
        draft, final = Path(self.draft(whole.step, whole.attempt)), Path(self.at(whole.step))
        self.put(f"{draft}/{manifest.NAME}", whole.to_json().encode())
        sync(draft)
        if final.exists():  # from before older steps were taken up again
            self._retire(final)
        draft.rename(final)
        sync(self.path)

    def folder(self, whole: Manifest) -> str:
        return self.at(whole.step)

    def manifest(self, step: int) -> Manifest:
        return Manifest.read(Path(self.at(step))).of_step(step)

    def set_aside(self, step: int) -> str:
        path = Path(self.at(step))
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        path.rename(aside)
        return str(aside)

    def tidy(self, kept: Collection[int]) -> None:
        for step in set(self.steps()) - set(kept):
            self._retire(Path(self.at(step)))
        for leftover in self.path.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def explain(self, error: Exception) -> Exception:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return NoSpace(errno.ENOSPC, f"{self.address}: no space left")
        return error

    def _retire(self, old: Path) -> None:
        """Let a checkpoint exist no more, at once; its files go with the next tidying."""
        old.rename(old.with_name(f".{old.name}.{time.time_ns()}.old"))


class Bucket(Place):
    """An address of an object store: nothing is renamed there, and an object appears when it is whole.

    ADDRESS/step-00001000/attempt-1/    files, written first
    ADDRESS/step-00001000/manifest.json written last
    """

    def __init__(self, address: str, fs: AbstractFileSystem, root: str) -> None:
        super().__init__(address)
        self.fs, self.root = fs, root

    def steps(self) -> list[int]:
        return [step for step, found in self._listed() if manifest.NAME in found]

    def damaged(self) -> int:
        return sum(_is_set_aside(found) for _, found in self._listed())

    def draft(self, step: int, attempt: int) -> str:
        return f"{self._step(step)}/attempt-{attempt}"

    def begin(self, step: int, attempt: int) -> bool:
        return False

    def abandon(self, step: int, attempt: int) -> None:
        """Nothing: a store that is away cannot be tidied, and the next checkpoint does it."""

    def put(self, path: str, content: bytes) -> None:
        with self.explained():
            self.fs.pipe_file(path, content)

    def commit(self, whole: Manifest) -> None:
        self.put(f"{self._step(whole.step)}/{manifest.NAME}", whole.to_json().encode())

    def folder(self, whole: Manifest) -> str:
        return self.draft(whole.step, whole.attempt)

    def manifest(self, step: int) -> Manifest:
        with self.explained():
            text = self.fs.cat_file(f"{self._step(step)}/{manifest.NAME}")
        return Manifest.parse(text).of_step(step)

    def set_aside(self, step: int) -> str:
        path = f"{self._step(step)}/{manifest.NAME}"
        aside = f"{self._step(step)}/manifest.damaged-{time.time_ns()}.json"
        with self.explained():
            self.fs.pipe_file(aside, self.fs.cat_file(path))
            self.fs.rm_file(path)
        return f"{self.at(step)}/{posixpath.basename(aside)}"

    def tidy(self, kept: Collection[int]) -> None:
        for step, found in self._listed():
            if step in kept:
                attempts = [name for name in found if name.startswith("attempt-")]
                gone = attempts[1:] and sorted(set(attempts) - {f"attempt-{self.manifest(step).attempt}"})
            elif _is_set_aside(found):
                gone = []
            else:
                gone = [manifest.NAME] if manifest.NAME in found else []  # first, so that no half exists
                gone += sorted(found - {manifest.NAME})
            with self.explained():
                for name in gone:
                    self.fs.rm(f"{self._step(step)}/{name}", recursive=True)

    def explain(self, error: Exception) -> Exception:
        if isinstance(error, Away):
            return error
        return Away(f"{self.address}: {type(error).__name__}: {error}")

    def _step(self, step: int) -> str:
        return f"{self.root}/step-{step:08d}"

    def _listed(self) -> list[tuple[int, set[str]]]:
        """Names under each step, newest first."""
        with self.explained():
            steps = _newest_first(_entries(self.fs, self.root))
            return [(step, set(_entries(self.fs, self._step(step)))) for step in steps]


def places_of(run: Path, options: Checkpoint, name: str) -> list[Place]:
    """Where a run's checkpoints are: the first place, then the durable one. Raises ConfigError.

    name: the run's; at places that are named in the configuration, where other runs may save as well,
    it is the folder of this run.
    """
    first: Place = Directory((run / "checkpoints").absolute())
    if options.directory is not None:
        first = open_place("directory", options.directory, name)
    if options.durable is None:
        return [first]
    durable = open_place("durable", options.durable, name)
    if durable.address == first.address:
        raise ConfigError(f"checkpoint.durable={options.durable}: is the first place, name a second one")
    return [first, durable]


def open_place(key: str, address: str, name: str = "") -> Place:
    """The place that a key of the configuration names. Raises ConfigError."""
    if "://" not in address:
        return Directory(Path(address).expanduser().absolute() / name)
    options = S3_OPTIONS if address.startswith(("s3://", "s3a://")) else {}
    try:
        fs, root = url_to_fs(address, **options)
    except ImportError as error:
        remedy = "pip install 'trainyard[s3]'" if options else str(error)
        raise ConfigError(f"checkpoint.{key}={address}: cannot be opened: {remedy}") from None
    except ValueError as error:
        raise ConfigError(f"checkpoint.{key}={address}: {error}") from None
    if isinstance(fs, LocalFileSystem):
        return Directory(Path(root) / name)
    if options:
        fs.retries = 1
    return Bucket(f"{address.rstrip('/')}/{name}".rstrip("/"), fs, f"{root.rstrip('/')}/{name}".rstrip("/"))


def _entries(fs: AbstractFileSystem, path: str) -> dict[str, int]:
    """Names below a path as they are now, and sizes in bytes; none if it does not exist."""
    fs.invalidate_cache()
    try:
        entries = fs.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    return {posixpath.basename(entry["name"].rstrip("/")): entry["size"] or 0 for entry in entries}


def sync(path: Path) -> None:
    """Wait until a directory's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_set_aside(found: set[str]) -> bool:
    return any(name.startswith("manifest.damaged-") for name in found)


def _newest_first(found: Collection[str]) -> list[int]:
    """Steps of names such as step-00001000."""
    numbers = {int(name[5:]) for name in found if name.startswith("step-") and name[5:].isdecimal()}
    return sorted((number for number in numbers if f"step-{number:08d}" in found), reverse=True)
