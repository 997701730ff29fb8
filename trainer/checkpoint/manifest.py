"""manifest.json: what a checkpoint must contain, and whether it does."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

NAME = "manifest.json"


@dataclass(frozen=True)
class File:
    name: str
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> File:
        with path.open("rb") as file:
            return cls(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class Manifest:
    """Files of a checkpoint, and shape of each tensor of the logical state."""

    step: int
    attempt: int
    world_size: int
    strategy: str
    tensors: dict[str, list[int]]
    files: list[File]

    def write(self, directory: Path) -> None:
        (directory / NAME).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Raises ValueError with the reason if there is none or it is damaged.

        An error of the file system is no damage and is raised as it is: the next try may succeed.
        """
        try:
            values: dict[str, Any] = json.loads((directory / NAME).read_text())
            return cls(**values | {"files": [File(**file) for file in values["files"]]})
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{NAME}: {error}") from None

    def problem(self, directory: Path, part: int = 0, parts: int = 1) -> str | None:
        """What is wrong with this part of the files (every `parts`-th from `part` on), or None."""
        for file in self.files[part::parts]:
            path = directory / file.name
            if not path.is_file():
                return f"{file.name} is missing"
            if path.stat().st_size != file.size_bytes:
                return f"{file.name} has {path.stat().st_size} bytes instead of {file.size_bytes}"
            if File.of(path) != file:
                return f"{file.name} does not match its checksum"
        return None


def shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    """Global shape by name."""
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def difference(saved: dict[str, list[int]], wanted: dict[str, list[int]]) -> str | None:
    """The first tensor in which two models differ, in words, or None."""
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            shown = [str(side.get(name, "absent")) for side in (saved, wanted)]
            return f"{name} is {shown[0]} there and {shown[1]} here"
    return None
