"""manifest.json: what a checkpoint must contain, and whether it does."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from trainer.sharding.logical import Logical

NAME = "manifest.json"
CHUNK_BYTES = 2**23


@dataclass(frozen=True)
class File:
    name: str
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path | str, fs: AbstractFileSystem | None = None) -> File:
        """Read a file from its beginning to its end."""
        digest, size_bytes = hashlib.sha256(), 0
        with (fs or LocalFileSystem()).open(str(path), "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                size_bytes += len(chunk)
        return cls(Path(path).name, size_bytes, digest.hexdigest())

    @classmethod
    def of_bytes(cls, name: str, content: bytes) -> File:
        return cls(name, len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Manifest:
    """Files of a checkpoint, and shape of each tensor of the logical state."""

    step: int
    attempt: int
    world_size: int
    strategy: str
    tensors: dict[str, list[int]]
    files: list[File]
    time: float = 0.0
    """When it was written, in seconds since 1970."""

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def to_json(self) -> str:
        """JSON that ends with a checksum of itself."""
        values = asdict(self)
        return json.dumps(values | {"sha256": _digest(values)}, indent=1)

    def write(self, directory: Path) -> None:
        (directory / NAME).write_text(self.to_json())

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Raises ValueError with the reason if there is none or it is damaged.

        An error of the file system is no damage and is raised as it is: the next try may succeed.
        """
        try:
            return cls.parse((directory / NAME).read_bytes())
        except FileNotFoundError as error:
            raise ValueError(f"{NAME}: {error}") from None

    @classmethod
    def parse(cls, text: bytes) -> Manifest:
        """Raises ValueError with the reason if it is damaged."""
        try:
            values: dict[str, Any] = json.loads(text)
            said = values.pop("sha256", None)  # older ones have none
            if said not in (None, _digest(values)):
                raise ValueError("does not match its checksum")
            found = cls(**values | {"files": [File(**file) for file in values["files"]]})
            if any(Path(file.name).name != file.name for file in found.files):
                raise ValueError("names a file outside of the checkpoint")
            return found
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{NAME}: {error}") from None

    def of_step(self, step: int) -> Manifest:
        """This manifest. Raises ValueError if it is of another step."""
        if self.step != step:
            raise ValueError(f"{NAME}: is of step {self.step}")
        return self

    def problem(
        self, directory: Path | str, part: int = 0, parts: int = 1, fs: AbstractFileSystem | None = None
    ) -> str | None:
        """What is wrong with this part of the files (every `parts`-th from `part` on), or None."""
        for file in self.files[part::parts]:
            try:
                found = File.of(f"{directory}/{file.name}", fs)
            except FileNotFoundError:
                return f"{file.name} is missing"
            if found.size_bytes != file.size_bytes:
                return f"{file.name} has {found.size_bytes} bytes instead of {file.size_bytes}"
            if found != file:
                return f"{file.name} does not match its checksum"
        return None


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def shapes(tensors: dict[str, Logical]) -> dict[str, list[int]]:
    """Global shape by name."""
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def difference(saved: dict[str, list[int]], wanted: dict[str, list[int]]) -> str | None:
    """The first tensor in which two models differ, in words, or None."""
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            shown = [str(side.get(name, "absent")) for side in (saved, wanted)]
            return f"{name} is {shown[0]} there and {shown[1]} here"
    return None
