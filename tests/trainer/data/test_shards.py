"""Shards give the same documents under the same numbers in every format, and damage stays where it is."""

from __future__ import annotations

import gzip
import json
import os
import random
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import sentences

from configs.schema import ConfigError
from trainer.data import shards
from trainer.data.damage import Damage
from trainer.data.shards import SUFFIXES, Shard, documents, list_shards

TEXTS = ["one", "two\nlines", "  ", "", "Ünïcôde 🙂 \u2028 \x85", "x" * 300_000, *sentences(300)]


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"url": "test://", "text": text}).encode() + b"\n" for text in texts)


def in_halves(data: bytes, compress: Callable[[bytes], bytes]) -> bytes:
    """Two members or frames; the seam runs through a line."""
    return compress(data[: len(data) // 2]) + compress(data[len(data) // 2 :])


def write(path: Path, texts: list[str]) -> Path:
    if path.name.endswith(".parquet"):
        table = pyarrow.table({"url": ["test://"] * len(texts), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=70)
    elif path.name.endswith(".gz"):
        path.write_bytes(in_halves(lines(texts), gzip.compress))
    elif path.name.endswith(".zst"):
        path.write_bytes(in_halves(lines(texts), zstandard.ZstdCompressor().compress))
    else:
        path.write_bytes(lines(texts))
    return path


def read(
    path: Path, first: int = 0, stride: int = 1, field: str = "text"
) -> tuple[list[tuple[int, str]], list[Damage]]:
    damages: list[Damage] = []
    shard = Shard(f"file://{path}", path.stat().st_size)
    return list(documents(shard, field, damages.append, first, stride)), damages


@contextmanager
def allocating_less_than(megabytes: float) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 1e6
    finally:
        tracemalloc.stop()


def noise(count: int) -> list[str]:
    """Texts that hardly compress, so that half of a file is about half of its documents."""
    generator = random.Random(0)
    return [f"{number} {generator.randbytes(400).hex()}" for number in range(count)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    assert read(write(tmp_path / f"shard{suffix}", TEXTS)) == (list(enumerate(TEXTS)), [])


@pytest.mark.parametrize("suffix", [".jsonl", ".json.gz", ".parquet"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(0, 400), stride=st.integers(1, 150))
def test_first_and_stride_select_by_number(tmp_path: Path, suffix: str, first: int, stride: int) -> None:
    path = tmp_path / f"shard{suffix}"
    if not path.exists():
        write(path, TEXTS)
    expected = [(number, TEXTS[number]) for number in range(first, len(TEXTS), stride)]
    assert read(path, first, stride) == (expected, [])


def test_a_last_line_without_a_line_end_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "shard.jsonl"
    path.write_bytes(lines(["a", "b"]).rstrip())
    assert read(path) == ([(0, "a"), (1, "b")], [])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "bad \xff utf-8"}', "utf-8"),
        (b'{"text": "no end', "Unterminated"),
        (b'{"body": "other field"}', "no field text"),
        (b'{"text": 7}', "field text is not text"),
        (b'{"text": null}', "field text is not text"),
        (b'["text"]', "list"),
        (b'{"text": "half a pair \\ud83d"}', "surrogates"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_damaged_document_is_told_and_keeps_its_number(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "shard.jsonl"
    path.write_bytes(lines(["before"]) + line + b"\n" + lines(["after"]))
    found, [damage] = read(path)
    assert found == [(0, "before"), (2, "after")]
    assert (damage.document, damage.rest_lost) == (1, False)
    assert reason in damage.reason


def test_a_damaged_document_does_not_change_what_a_stride_selects(tmp_path: Path) -> None:
    path = tmp_path / "shard.jsonl"
    path.write_bytes(b"damaged\n\n" + lines(["two", "three", "four"]))
    assert read(path, first=1, stride=2)[0] == [(3, "three")]


def test_a_blank_line_is_no_document_and_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "shard.jsonl"
    path.write_bytes(lines(["before"]) + b" \r\n" + lines(["after"]))
    assert read(path) == ([(0, "before"), (2, "after")], [])


def test_a_parquet_cell_without_text_is_told_and_keeps_its_number(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    cells = pyarrow.array([b"before", b"bad \xff utf-8", None, b"after"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), len(cells), cells.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)
    found, damages = read(path)
    assert found == [(0, "before"), (3, "after")]
    assert [(damage.document, damage.rest_lost) for damage in damages] == [(1, False), (2, False)]


@pytest.mark.parametrize(
    "column", [pyarrow.array([b"a", b"b"]), pyarrow.array(["a", "b"]).dictionary_encode()]
)
def test_parquet_text_may_be_bytes_or_a_dictionary(tmp_path: Path, column: pyarrow.Array) -> None:
    path = tmp_path / "shard.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    assert read(path) == ([(0, "a"), (1, "b")], [])


@pytest.mark.parametrize("field", ["absent", "number"])
def test_a_parquet_file_without_a_text_column_is_one_damage(tmp_path: Path, field: str) -> None:
    path = tmp_path / "shard.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"number": [1, 2]}), path)
    found, [damage] = read(path, field=field)
    assert found == []
    assert damage.rest_lost


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.5, 0.8, 0.999])
@pytest.mark.parametrize("suffix", [".json.gz", ".jsonl.zst"])
def test_a_file_cut_short_is_read_up_to_the_cut(tmp_path: Path, suffix: str, kept: float) -> None:
    path = write(tmp_path / f"shard{suffix}", noise(400))
    cut = path.read_bytes()[: int(kept * path.stat().st_size)]
    path.write_bytes(cut)
    text = b""
    while cut:
        member = (
            zlib.decompressobj(31) if suffix == ".json.gz" else zstandard.ZstdDecompressor().decompressobj()
        )
        text += member.decompress(cut)
        cut = member.unused_data
    whole_lines = text.split(b"\n")[:-1]
    found, [damage] = read(path)
    assert found == [(number, json.loads(line)["text"]) for number, line in enumerate(whole_lines)]
    assert damage.rest_lost


@pytest.mark.parametrize("suffix", [".json.gz", ".jsonl.zst"])
def test_a_file_with_a_damaged_middle_is_read_up_to_there(tmp_path: Path, suffix: str) -> None:
    compress = (
        zstandard.ZstdCompressor(write_checksum=True).compress if suffix == ".jsonl.zst" else gzip.compress
    )
    data = bytearray(compress(lines(noise(2000))))
    middle = len(data) // 2
    data[middle : middle + 1000] = bytes(1000)
    path = tmp_path / f"shard{suffix}"
    path.write_bytes(data)
    found, damages = read(path)
    assert found[:800] == list(enumerate(noise(800)))
    assert damages[-1].rest_lost  # told by the checksum, if not before


def test_a_parquet_file_cut_short_is_one_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "shard.parquet", noise(400))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found, [damage] = read(path)
    assert found == []
    assert damage.rest_lost


def test_a_parquet_file_with_a_damaged_middle_is_read_up_to_there(tmp_path: Path) -> None:
    path = write(tmp_path / "shard.parquet", noise(700))  # row groups of 70
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle - 20_000 : middle + 20_000] = b"\xff" * 40_000
    path.write_bytes(data)
    found, [damage] = read(path)
    assert [text for _, text in found] == noise(700)[: len(found)]
    assert 128 <= len(found) < 350
    assert damage.rest_lost


def test_bytes_after_the_last_gzip_member_are_damage_but_zeros_are_padding(tmp_path: Path) -> None:
    path = tmp_path / "shard.json.gz"
    path.write_bytes(gzip.compress(lines(["a"])) + bytes(100_000))
    assert read(path) == ([(0, "a")], [])
    path.write_bytes(gzip.compress(lines(["a"])) + b"junk")
    found, [damage] = read(path)
    assert found == [(0, "a")]
    assert damage.rest_lost


def test_a_zstd_file_may_hold_skippable_frames(tmp_path: Path) -> None:
    skippable = 0x184D2A50.to_bytes(4, "little") + (4).to_bytes(4, "little") + b"note"
    frame = zstandard.ZstdCompressor().compress
    path = tmp_path / "shard.jsonl.zst"
    path.write_bytes(skippable + frame(lines(["a"])) + skippable + frame(lines(["b"])))
    assert read(path) == ([(0, "a"), (1, "b")], [])


def test_a_zstd_file_may_be_packed_with_a_long_window(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, hash_log=10, chain_log=10)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "shard.jsonl.zst"
    path.write_bytes(packer.compress(lines(["a"])) + packer.flush())
    assert read(path) == ([(0, "a")], [])


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_a_file_without_line_ends_is_not_read_into_memory(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "LONGEST_LINE_BYTES", 1_000_000)
    path = write(tmp_path / f"shard{suffix}", ["a", "x" * 900_000, "b", "x" * 80_000_000, "c"])
    with allocating_less_than(megabytes=60):
        found, [damage] = read(path)
    assert [number for number, _ in found] == [0, 1, 2]
    assert damage.rest_lost


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_file_is_one_damage(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"shard{suffix}"
    path.touch()
    found, [damage] = read(path)
    assert found == []
    assert (damage.reason, damage.rest_lost) == ("empty file", True)


@pytest.mark.parametrize("suffix", [".json.gz", ".parquet"])
def test_a_file_system_that_fails_is_not_taken_for_damage(tmp_path: Path, suffix: str) -> None:
    damages: list[Damage] = []
    shard = Shard(f"file://{tmp_path}/gone{suffix}", 100)
    with pytest.raises(FileNotFoundError):
        next(documents(shard, "text", damages.append))
    assert damages == []


def test_the_first_document_of_a_large_gzip_file_needs_little_time_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.json.gz"
    member = gzip.compress(lines(["a text of some length " * 20] * 5000))
    path.write_bytes(member * 100)  # 230 MB of text
    began = time.perf_counter()
    found = documents(Shard(f"file://{path}", path.stat().st_size), "text", pytest.fail)
    with allocating_less_than(megabytes=16):
        assert len(list(islice(found, 10))) == 10
    assert time.perf_counter() - began < 1


def test_a_large_parquet_row_group_is_read_in_pages(tmp_path: Path) -> None:
    path = tmp_path / "large.parquet"
    generator = random.Random(0)
    table = pyarrow.table({"text": [generator.randbytes(1000).hex() for _ in range(20_000)]})
    pyarrow.parquet.write_table(table, path, row_group_size=20_000)  # 40 MB of text
    found = documents(Shard(f"file://{path}", path.stat().st_size), "text", pytest.fail)
    with allocating_less_than(megabytes=8):
        assert len(list(islice(found, 10))) == 10


def test_a_reader_that_is_dropped_closes_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "shard.json.gz", TEXTS)
    found = documents(Shard(f"file://{path}", path.stat().st_size), "text", pytest.fail)
    next(found)
    assert str(path) in open_files()
    found.close()
    assert str(path) not in open_files()


def open_files() -> list[str]:
    directory = Path("/proc/self/fd")
    return [os.readlink(entry) for entry in directory.iterdir() if entry.is_symlink()]


def names(listed: list[Shard]) -> list[str]:
    return [shard.address.rpartition("/")[2] for shard in listed]


def test_globs_and_paths_are_listed_once_in_order_of_address(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.json.gz"):
        write(tmp_path / name, ["text"])
    patterns = [f"{tmp_path}/c.json.gz", f"{tmp_path}/*.jsonl", f"file://{tmp_path}/a.jsonl"]
    listed = list_shards("data.corpora.x.train", patterns)
    assert names(listed) == ["a.jsonl", "b.jsonl", "c.json.gz"]
    assert listed[0].size_bytes == (tmp_path / "a.jsonl").stat().st_size


def test_a_link_to_a_shard_is_a_shard(tmp_path: Path) -> None:
    target = write(tmp_path / "blob.jsonl", ["text"])
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.jsonl").symlink_to(target)
    [shard] = list_shards("data.corpora.x.train", [f"{tmp_path}/linked/*"])
    assert shard.size_bytes == target.stat().st_size


def test_a_link_to_nothing_is_no_shard_that_could_be_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ["text"])
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "unmounted" / "b.jsonl")
    with pytest.raises(ConfigError, match=r"data\.corpora\.x\.train=.*b\.jsonl: no such file"):
        list_shards("data.corpora.x.train", [f"{tmp_path}/*.jsonl"])


@pytest.mark.parametrize("pattern", ["nothing.*.json.gz", "nothing.json.gz", "folder"])
def test_a_pattern_without_a_file_names_key_and_pattern(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError) as caught:
        list_shards("data.corpora.x.train", [f"{tmp_path}/{pattern}"])
    assert f"data.corpora.x.train={tmp_path}/{pattern}" in str(caught.value)


def test_an_unknown_format_names_the_file_and_what_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ConfigError) as caught:
        list_shards("data.corpora.x.train", [f"{tmp_path}/*"])
    assert f"data.corpora.x.train={tmp_path}/notes.txt" in str(caught.value)
    assert ".json.gz" in str(caught.value)


def test_an_unknown_file_system_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"data\.corpora\.x\.train=nosuch://"):
        list_shards("data.corpora.x.train", ["nosuch://bucket/*.jsonl"])


def test_files_that_are_all_empty_name_the_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ConfigError, match=r"data\.corpora\.x\.train=.*empty"):
        list_shards("data.corpora.x.train", [f"{tmp_path}/*"])
