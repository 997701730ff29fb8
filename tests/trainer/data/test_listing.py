"""Paths, globs and manifests name shards; each mistake names its key."""

from __future__ import annotations

import time
from pathlib import Path

import fsspec
import pytest

from configs.schema import ConfigError
from trainer.data.listing import Shard, list_shards

KEY = "data.corpora.x.train"


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'{"text": "text"}\n')
    return path


def names(listed: list[Shard]) -> list[str]:
    return [shard.address.rpartition("/")[2] for shard in listed]


def test_globs_and_paths_are_listed_once_in_order_of_address(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.json.gz"):
        write(tmp_path / name)
    patterns = [f"{tmp_path}/c.json.gz", f"{tmp_path}/*.jsonl", f"file://{tmp_path}/a.jsonl"]
    listed = list_shards(KEY, patterns)
    assert names(listed) == ["a.jsonl", "b.jsonl", "c.json.gz"]
    assert listed[0].size_bytes == (tmp_path / "a.jsonl").stat().st_size


def test_a_file_with_glob_characters_in_its_name_is_that_file(tmp_path: Path) -> None:
    for name in ("a[1].jsonl", "a1.jsonl", "b?.jsonl", "bb.jsonl", "c*.jsonl", "cc.jsonl"):
        write(tmp_path / name)
    named = ["a[1].jsonl", "b?.jsonl", "c*.jsonl"]
    assert names(list_shards(KEY, [f"{tmp_path}/{name}" for name in named])) == named
    assert names(list_shards(KEY, [f"{tmp_path}/a[12].jsonl"])) == ["a1.jsonl"]


@pytest.mark.parametrize("pattern", ["zip://*.jsonl::{}/a.zip", "@simplecache::file://{}/list", "@{}/list"])
def test_a_chained_address_is_refused_by_name(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "list").write_text("zip://a.jsonl::a.zip\n")
    with pytest.raises(ConfigError, match=rf"{KEY}=.*::.*: addresses chained with ::"):
        list_shards(KEY, [pattern.format(tmp_path)])


def test_a_link_to_a_shard_is_a_shard(tmp_path: Path) -> None:
    target = write(tmp_path / "blob.jsonl")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.jsonl").symlink_to(target)
    [shard] = list_shards(KEY, [f"{tmp_path}/linked/*"])
    assert shard.size_bytes == target.stat().st_size


def test_a_link_to_nothing_is_no_shard_that_could_be_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "unmounted" / "b.jsonl")
    with pytest.raises(ConfigError, match=r"data\.corpora\.x\.train=.*b\.jsonl: no such file"):
        list_shards(KEY, [f"{tmp_path}/*.jsonl"])


@pytest.mark.parametrize("pattern", ["nothing.*.json.gz", "nothing.json.gz", "folder"])
def test_a_pattern_without_a_file_names_key_and_pattern(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError) as caught:
        list_shards(KEY, [f"{tmp_path}/{pattern}"])
    assert f"data.corpora.x.train={tmp_path}/{pattern}" in str(caught.value)


def test_an_unknown_format_names_the_file_and_what_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("text")
    with pytest.raises(ConfigError) as caught:
        list_shards(KEY, [f"{tmp_path}/*"])
    assert f"data.corpora.x.train={tmp_path}/notes.md" in str(caught.value)
    assert ".json.gz" in str(caught.value)


def test_an_unknown_file_system_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"data\.corpora\.x\.train=nosuch://"):
        list_shards(KEY, ["nosuch://bucket/*.jsonl"])


def test_files_that_are_all_empty_name_the_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ConfigError, match=r"data\.corpora\.x\.train=.*empty"):
        list_shards(KEY, [f"{tmp_path}/*"])


def test_a_manifest_names_files_by_its_own_directory_by_address_or_by_glob(tmp_path: Path) -> None:
    for name in ("texts/a.jsonl", "texts/more/b.jsonl", "texts/more/c.jsonl", "elsewhere/d.txt"):
        write(tmp_path / name)
    manifest = tmp_path / "texts" / "list"
    manifest.write_text(f"# the good ones\n\na.jsonl\n  more/*.jsonl\r\nfile://{tmp_path}/elsewhere/d.txt\n")
    assert names(list_shards(KEY, [f"@{manifest}"])) == ["d.txt", "a.jsonl", "b.jsonl", "c.jsonl"]


def test_a_manifest_or_a_file_of_it_that_is_missing_is_named(tmp_path: Path) -> None:
    manifest = tmp_path / "list"
    with pytest.raises(ConfigError, match=rf"{KEY}=@{manifest}: no such file"):
        list_shards(KEY, [f"@{manifest}"])
    write(tmp_path / "a.jsonl")
    manifest.write_text("a.jsonl\nb.jsonl\n")
    with pytest.raises(ConfigError, match=rf"{KEY}={tmp_path}/b\.jsonl: no such file"):
        list_shards(KEY, [f"@{manifest}"])
    manifest.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="names no file"):
        list_shards(KEY, [f"@{manifest}"])


def test_a_manifest_may_lie_in_a_store_and_name_files_by_its_directory() -> None:
    store = fsspec.filesystem("memory")
    for number in range(6):
        store.pipe_file(f"/listing/texts/{number}.jsonl", b'{"text": "text"}\n')
    store.pipe_file("/listing/texts/list", "".join(f"{number}.jsonl\n" for number in range(6)).encode())
    try:
        listed = list_shards(KEY, ["@memory://listing/texts/list"])
        assert listed == [Shard(f"memory:///listing/texts/{number}.jsonl", 17) for number in range(6)]
        store.rm("/listing/texts/3.jsonl")
        with pytest.raises(ConfigError, match=r"listing/texts/3\.jsonl: no such file"):
            list_shards(KEY, ["@memory://listing/texts/list"])
    finally:
        store.rm("/listing", recursive=True)


@pytest.mark.parametrize("way", ["glob", "manifest"])
def test_a_thousand_shards_are_listed_in_no_time(tmp_path: Path, way: str) -> None:
    for number in range(1000):
        write(tmp_path / f"{number:05}.jsonl")
    (tmp_path / "list").write_text("".join(f"{number:05}.jsonl\n" for number in range(1000)))
    began = time.perf_counter()
    listed = list_shards(KEY, [f"{tmp_path}/*.jsonl" if way == "glob" else f"@{tmp_path}/list"])
    assert time.perf_counter() - began < 1.5  # 0.05 s on an idle machine
    assert len(listed) == 1000


@pytest.mark.parametrize(
    ("address", "suffix"),
    [
        ("https://host/a.json.gz?download=true", ".json.gz"),
        ("s3://bucket/a.parquet", ".parquet"),
        ("file:///a?b.txt", ".txt"),
        ("s3://bucket/a.jsonl.xz", ""),
    ],
)
def test_the_format_is_the_end_of_the_name(address: str, suffix: str) -> None:
    assert Shard(address, 1).suffix == suffix
