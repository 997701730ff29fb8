"""What torch.distributed.checkpoint writes through and reads from: hashed going out, distrusted coming in."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import torch
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as stored
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from configs.schema import ConfigError
from trainer.checkpoint.manifest import File

LOCAL = LocalFileSystem()

LARGE_BYTES = 2**22
"""From here on it pays to hash beside writing."""

Explain = Callable[[Exception], Exception]
"""Turns what a file system raises into an error that ranks can send to each other."""


class Files(FileSystemBase):
    """A file system as torch.distributed.checkpoint wants it; it remembers what was written."""

    def __init__(self, fs: AbstractFileSystem, explain: Explain) -> None:
        self.fs = fs
        self.written: dict[str, File] = {}
        self._explain = explain

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with self._explained(), self.fs.open(os.fspath(path), mode) as raw:
            if "w" not in mode:
                yield raw
                return
            stream = Hashing(raw, sync=isinstance(self.fs, LocalFileSystem))
            try:
                yield stream
                stream.close()
            except RuntimeError as error:  # torch.save's, in place of what the stream raised within it
                raise stream.failure or error from error
        self.written[os.fspath(path)] = stream.file(os.path.basename(path))

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{os.fspath(path)}/{suffix}"

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return os.fspath(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        with self._explained():
            self.fs.mv(os.fspath(path), os.fspath(new_path))
        file = self.written.pop(os.fspath(path))
        name = os.path.basename(new_path)
        self.written[os.fspath(new_path)] = File(name, file.size_bytes, file.sha256)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Nothing: whoever hands out the path has made it."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        with self._explained():
            return bool(self.fs.exists(os.fspath(path)))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        with self._explained():
            self.fs.rm_file(os.fspath(path))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise self._explain(error) from error


class Hashing(io.RawIOBase):
    """A stream that is written once from its beginning to its end; its digest costs no second pass.

    sync: wait when it is closed until the file is on the disk.
    """

    def __init__(self, raw: Any, sync: bool) -> None:
        self.failure: Exception | None = None
        self._raw = raw
        self._sync = sync
        self._size_bytes = 0
        self._digest = hashlib.sha256()
        self._beside = ThreadPoolExecutor(1)

    def write(self, content: Any) -> int:
        size_bytes = memoryview(content).nbytes
        large = size_bytes >= LARGE_BYTES
        hashing = self._beside.submit(self._digest.update, content) if large else None
        try:
            self._raw.write(content)
        except Exception as error:
            self.failure = error
            raise
        finally:
            if hashing is not None:
                hashing.result()
        if not large:
            self._digest.update(content)
        self._size_bytes += size_bytes
        return size_bytes

    def tell(self) -> int:
        return self._size_bytes

    def flush(self) -> None:
        if not self._raw.closed:
            self._raw.flush()

    def close(self) -> None:
        if self._sync and not self._raw.closed:
            self._raw.flush()
            os.fsync(self._raw.fileno())
        self._raw.close()
        self._beside.shutdown()
        super().close()

    def file(self, name: str) -> File:
        """What has been written, under a name."""
        return File(name, self._size_bytes, self._digest.hexdigest())


class Writer(FileSystemWriter):
    """Writes a rank's tensors into one file below a path."""

    def __init__(self, fs: AbstractFileSystem, path: str, explain: Explain) -> None:
        # Tensors are copied one by one where they are on a device: torch's way of copying ahead uses
        # the thread's current device, which in a thread of its own is the first.
        super().__init__(path, sync_files=False, per_thread_copy_ahead=0)
        self.files = Files(fs, explain)
        self.fs, self.path = self.files, path  # type: ignore[assignment]

    @property
    def written(self) -> list[File]:
        """The files that this rank has written."""
        return list(self.files.written.values())


class Reader(FileSystemReader):
    """Reads tensors below a path, of which nothing is believed that could run code."""

    def __init__(self, path: str, fs: AbstractFileSystem = LOCAL, explain: Explain = lambda error: error):
        super().__init__(path)
        self.fs, self.path = Files(fs, explain), path  # type: ignore[assignment]

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises ConfigError for anything but descriptions of tensors."""
        return self._metadata

    @cached_property
    def _metadata(self) -> Metadata:
        path = self._get_metadata_path()
        with self.fs.create_stream(path, "rb") as file:
            content = file.read()
        try:
            metadata = _Descriptions(io.BytesIO(content)).load()
        except Exception as error:  # whatever a damaged or hostile pickle makes of the classes it may use
            raise ConfigError(f"{path}: does not describe tensors: {error}") from error
        if not isinstance(metadata, Metadata):
            raise ConfigError(f"{path}: does not describe tensors")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


ADMITTED = {
    (described.__module__, described.__name__): described
    for described in (
        stored.Metadata,
        stored.MetadataIndex,
        stored.StorageMeta,
        stored.TensorProperties,
        stored.TensorStorageMetadata,
        stored.ChunkStorageMetadata,
        stored._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        torch.Size,
        torch.serialization._get_layout,
    )
}
"""What describes stored tensors; no function among them does anything else."""


class _Descriptions(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ADMITTED:
            return ADMITTED[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module.startswith("pathlib") and name == "PosixPath":
            return PurePosixPath
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint")
