"""The shards of a corpus: what paths, globs, addresses and manifests name."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from configs.schema import ConfigError
from configs.text import Retry
from trainer.data.patience import Fault, patiently

SUFFIXES = (
    *(".json", ".json.gz", ".json.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst"),
    *(".parquet", ".txt", ".txt.gz", ".txt.zst"),
)
VERSIONS = ("ETag", "etag", "sha256", "blob_id", "generation", "Last-Modified")
"""What stores call that which changes with a file's content, most telling first."""
REQUESTS = 16
"""Files that are asked for at a time; more make a hub refuse."""
WORTH_A_LISTING = 4
"""Named files of one directory from which on its listing is cheaper than asking for each."""
LISTING = Retry(attempts=3)
"""A mistake in an address must not take long to tell."""

T = TypeVar("T")


class Shard(NamedTuple):
    """One file of a corpus."""

    address: str
    """As fsspec takes it, with its protocol."""
    size_bytes: int | None
    """None where the store does not tell."""
    version: str | None = None
    """ETag or the like, None where the store tells none."""

    @property
    def suffix(self) -> str:
        """The format, one of SUFFIXES, or nothing for an unknown one."""
        name = self.address.partition("?")[0] if _is_http(self.address) else self.address
        return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def list_shards(key: str, patterns: list[str]) -> list[Shard]:
    """Files that paths, globs and manifests (`@FILE`) name, sorted by address.

    Globs cost one listing and no request per file. Raises ConfigError naming `key` for a pattern without a
    file, an unknown format, or files that are all empty.
    """
    shards: dict[str, Shard] = {}
    for pattern in patterns:
        for shard in _manifest(key, pattern) if pattern.startswith("@") else _matching(key, [pattern]):
            shards[shard.address] = shard
    for shard in shards.values():
        if not shard.suffix:
            shown = shard.address.removeprefix("file://")
            raise ConfigError(f"{key}={shown}: unknown format; allowed: {', '.join(SUFFIXES)}")
    if all(shard.size_bytes == 0 for shard in shards.values()):
        raise ConfigError(f"{key}={patterns[0]}: all {len(shards)} files are empty")
    return [shards[address] for address in sorted(shards)]


def version_of(info: dict[str, Any]) -> str | None:
    """What changes with the file's content, if its store tells."""
    return next((str(info[name]) for name in VERSIONS if info.get(name)), None)


def is_local(address: str) -> bool:
    return "://" not in address or address.startswith(("file://", "local://"))


def _manifest(key: str, pattern: str) -> list[Shard]:
    _refuse_chain(key, pattern)
    address = pattern[1:]
    try:
        with fsspec.open(address, "r", encoding="utf-8") as file:
            named = [line.strip() for line in file]
    except FileNotFoundError:
        raise ConfigError(f"{key}={pattern}: no such file") from None
    except Exception as error:  # a file system's own exceptions share no base class
        raise ConfigError(f"{key}={pattern}: cannot be read: {error}") from None
    directory = posixpath.dirname(address)
    listed = [
        name if "://" in name else posixpath.join(directory, name)
        for name in named
        if name and not name.startswith("#")
    ]
    if not listed:
        raise ConfigError(f"{key}={pattern}: names no file")
    return _matching(key, listed)


def _matching(key: str, patterns: list[str]) -> list[Shard]:
    """Files that addresses and globs name; each of them names one at least."""
    found: list[Shard] = []
    plain: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for pattern in patterns:
        _refuse_chain(key, pattern)
        try:
            file_system, path = fsspec.url_to_fs(pattern)
        except Exception as error:
            raise ConfigError(f"{key}={pattern}: cannot be listed: {error}") from None
        if not _is_glob(pattern) or (isinstance(file_system, LocalFileSystem) and os.path.isfile(path)):
            plain.setdefault(file_system._fs_token, (file_system, []))[1].append((pattern, path))
            continue
        try:
            infos = _patiently(lambda: file_system.glob(path, detail=True))  # noqa: B023
            # A glob does not follow links, of which some caches are made; http's listings tell no sizes.
            again = [
                name for name, info in infos.items() if info["type"] == "other" or info.get("size") is None
            ]
            infos |= _asked(file_system, again)
        except FileNotFoundError as error:
            raise ConfigError(f"{key}={error.filename or pattern}: no such file") from None
        except Exception as error:
            raise ConfigError(f"{key}={pattern}: cannot be listed: {error}") from None
        files = [
            _shard(file_system, name, info) for name, info in infos.items() if info.get("type") == "file"
        ]
        if not files:
            raise ConfigError(f"{key}={pattern}: no such file")
        found += files
    for file_system, named in plain.values():
        found += _named(key, file_system, named)
    return found


def _named(key: str, file_system: Any, named: list[tuple[str, str]]) -> list[Shard]:
    """Files that are named one by one, as (what the user wrote, path in the file system)."""
    paths = [path for _, path in named]
    local = isinstance(file_system, LocalFileSystem)
    infos: dict[str, Any] = {}
    try:
        if not local and not _is_http(named[0][0]):
            directories = Counter(path.rpartition("/")[0] for path in paths)
            for directory in [name for name, count in directories.items() if count >= WORTH_A_LISTING]:
                listed = _patiently(lambda: file_system.ls(directory, detail=True))  # noqa: B023
                infos |= {info["name"]: info for info in listed}
        infos |= _asked(file_system, [path for path in paths if path not in infos])
    except FileNotFoundError as error:
        missing = {path: pattern for pattern, path in named}.get(str(error.filename or error))
        raise ConfigError(f"{key}={missing or error.filename or error}: no such file") from None
    except Exception as error:
        raise ConfigError(f"{key}={named[0][0]}: cannot be listed: {error}") from None
    for pattern, path in named:
        if infos[path].get("type", "file") != "file":
            raise ConfigError(f"{key}={pattern}: no such file")
    return [_shard(file_system, path, infos[path]) for path in paths]


def _asked(file_system: Any, paths: list[str]) -> dict[str, Any]:
    """What a file system says of each path. Raises FileNotFoundError that names the path."""

    def ask(path: str) -> Any:
        try:
            return _patiently(lambda: file_system.info(path))
        except FileNotFoundError as error:
            raise FileNotFoundError(2, "no such file", path) from error

    if isinstance(file_system, LocalFileSystem) or len(paths) < 2:
        return {path: ask(path) for path in paths}
    with ThreadPoolExecutor(REQUESTS) as pool:
        return dict(zip(paths, pool.map(ask, paths), strict=True))


def _patiently(call: Callable[[], T]) -> T:
    """What `call` returns, or the error that it ends with."""
    try:
        return patiently(call, LISTING)
    except Fault as fault:
        raise (fault.__cause__ or fault) from None


def _shard(file_system: Any, name: str, info: dict[str, Any]) -> Shard:
    address = f"file://{name}" if isinstance(file_system, LocalFileSystem) else None
    return Shard(address or file_system.unstrip_protocol(name), info["size"], version_of(info))


def _refuse_chain(key: str, address: str) -> None:
    if "::" in address:
        raise ConfigError(f"{key}={address}: addresses chained with :: are not read; unpack the files")


def _is_http(address: str) -> bool:
    return address.startswith(("http://", "https://"))


def _is_glob(address: str) -> bool:
    return any(character in address for character in ("*[" if _is_http(address) else "*?["))
