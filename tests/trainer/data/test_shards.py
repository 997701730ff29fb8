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

from configs.text import Retry
from trainer.data import shards
from trainer.data.blocks import Place
from trainer.data.damage import Damage
from trainer.data.listing import SUFFIXES, Shard
from trainer.data.shards import Reading, Span, documents, spans

READING = Reading(Retry(attempts=1))
BEGIN = Place()
TEXTS = ["one", "two\nlines", "  ", "", "Ünïcôde 🙂 \u2028 \x85", "x" * 300_000, *sentences(300)]


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"url": "test://", "text": text}).encode() + b"\n" for text in texts)


def in_halves(data: bytes, compress: Callable[[bytes], bytes]) -> bytes:
    """Two members or frames; the seam runs through a line."""
    return compress(data[: len(data) // 2]) + compress(data[len(data) // 2 :])


def write(path: Path, texts: list[str]) -> Path:
    text = "".join(f"{text}\n" for text in texts).encode() if ".txt" in path.name else lines(texts)
    if path.name.endswith(".parquet"):
        table = pyarrow.table({"url": ["test://"] * len(texts), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=70)
    elif path.name.endswith(".gz"):
        path.write_bytes(in_halves(text, gzip.compress))
    elif path.name.endswith(".zst"):
        path.write_bytes(in_halves(text, zstandard.ZstdCompressor().compress))
    else:
        path.write_bytes(text)
    return path


def shard_of(path: Path) -> Shard:
    return Shard(f"file://{path}", path.stat().st_size)


def read(path: Path, field: str = "text") -> tuple[list[tuple[int, str]], list[Damage]]:
    damages: list[Damage] = []
    return list(documents(shard_of(path), field, damages.append, READING)), damages


def unit(
    path: Path, part: int, parts: int, window: int, start: Place = BEGIN
) -> tuple[list[Span], list[Damage]]:
    damages: list[Damage] = []
    found = spans(
        shard_of(path),
        "text",
        part=part,
        parts=parts,
        window=window,
        start=start,
        on_damage=damages.append,
        reading=READING,
    )
    return list(found), damages


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


def expected_of(suffix: str) -> list[tuple[int, str]]:
    """Numbers and texts of TEXTS; a .txt document has no line ends and is not blank."""
    whole = list(enumerate(texts_of(suffix)))
    return [(number, text) for number, text in whole if text.strip()] if ".txt" in suffix else whole


def texts_of(suffix: str) -> list[str]:
    return [text.replace("\n", " ") for text in TEXTS] if ".txt" in suffix else TEXTS


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    assert read(write(tmp_path / f"shard{suffix}", texts_of(suffix))) == (expected_of(suffix), [])


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.integers(1, 9), window=st.integers(1, 150), data=st.data())
def test_a_unit_is_every_nth_document_in_blocks_that_can_be_gone_to(
    tmp_path: Path, suffix: str, parts: int, window: int, data: st.DataObject
) -> None:
    path = tmp_path / f"shard{suffix}"
    if not path.exists():
        write(path, texts_of(suffix))
    part = data.draw(st.integers(0, parts - 1))
    expected: dict[int, dict[int, str]] = {}
    for number, text in expected_of(suffix):
        if number % parts == part:
            expected.setdefault(number // (window * parts), {})[number // parts % window] = text
    found, damages = unit(path, part, parts, window)
    assert {span.place.block: span.texts for span in found} == expected
    assert damages == []
    start = data.draw(st.integers(0, len(found) - 1)) if found else 0
    assert unit(path, part, parts, window, found[start].place if found else Place()) == (found[start:], [])


def test_a_block_without_its_offset_is_found_by_counting(tmp_path: Path) -> None:
    path = write(tmp_path / "shard.json.gz", sentences(300))
    found, _ = unit(path, 1, 3, 10)
    assert unit(path, 1, 3, 10, Place(4)) == (found[4:], [])


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz", ".parquet"])
def test_a_block_that_begins_a_frame_member_or_row_group_can_be_gone_to(tmp_path: Path, suffix: str) -> None:
    texts = sentences(300)
    path = tmp_path / f"shard{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=50)
    else:
        compress = gzip.compress if suffix == ".jsonl.gz" else zstandard.ZstdCompressor().compress
        path.write_bytes(b"".join(compress(lines(texts[at : at + 50])) for at in range(0, 300, 50)))
    found, _ = unit(path, 0, 1, 50)
    assert [list(span.texts.values()) for span in found] == [texts[at : at + 50] for at in range(0, 300, 50)]
    for number, span in enumerate(found):
        assert unit(path, 0, 1, 50, span.place) == (found[number:], [])


@pytest.mark.parametrize("told", [True, False])
def test_zstd_frames_before_a_place_are_passed_over_unread_where_they_tell_their_size(
    tmp_path: Path, told: bool
) -> None:
    compress = zstandard.ZstdCompressor(write_content_size=told, write_checksum=True).compress
    frames = [compress(lines(sentences(50, at))) for at in range(0, 200, 50)]
    place = Place(2, len(lines(sentences(100))))
    damaged = bytearray(frames[0])
    damaged[len(damaged) - 6] ^= 0xFF  # its last block
    path = tmp_path / "shard.jsonl.zst"
    path.write_bytes(bytes(damaged) + b"".join(frames[1:]))
    found, damages = unit(path, 0, 1, 50, place)
    assert [list(span.texts.values()) for span in found] == (
        [sentences(50, 100), sentences(50, 150)] if told else []
    )
    assert len(damages) == (0 if told else 1)


def test_a_place_behind_the_end_is_a_changed_shard(tmp_path: Path) -> None:
    for suffix in (".jsonl.gz", ".jsonl.zst", ".jsonl", ".parquet"):
        path = write(tmp_path / f"shard{suffix}", ["one", "two"])
        found, [damage] = unit(path, 0, 1, 2, Place(3, 1000))
        assert (found, damage.kind) == ([], "changed"), suffix


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
    assert (damage.document, damage.kind) == (1, "document")
    assert reason in damage.reason


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path: Path, suffix: str) -> None:
    texts = sentences(300)
    text = "".join(f"{text}\n" for text in texts).encode() if suffix == ".txt" else lines(texts)
    path = tmp_path / f"shard{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    found, damages = unit(path, 0, 1, 50)
    assert [text for span in found for text in span.texts.values()] == texts
    assert damages == []
    assert unit(path, 0, 1, 50, found[1].place) == (found[1:], [])


@pytest.mark.parametrize(
    "line", [b'{"text": "a", "n": NaN}', b'{"text": "a", "n": 123456789012345678901234567890}']
)
def test_numbers_that_strict_json_does_not_know_do_not_matter(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "shard.jsonl"
    path.write_bytes(line)
    assert read(path) == ([(0, "a")], [])


def test_a_damaged_document_does_not_change_what_a_unit_selects(tmp_path: Path) -> None:
    path = tmp_path / "shard.jsonl"
    path.write_bytes(b"damaged\n\n" + lines(["two", "three", "four"]))
    [span], damages = unit(path, 1, 2, 256)
    assert (span.texts, damages) == ({1: "three"}, [])


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
    assert [(damage.document, damage.kind) for damage in damages] == [(1, "document"), (2, "document")]


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
    assert damage.kind == "shard"


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
    assert damage.kind == "shard"


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
    assert damages[-1].kind == "shard"  # told by the checksum, if not before


def test_a_parquet_file_cut_short_is_one_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "shard.parquet", noise(400))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found, [damage] = read(path)
    assert found == []
    assert damage.kind == "shard"


def test_a_parquet_file_with_a_damaged_middle_is_read_up_to_there(tmp_path: Path) -> None:
    path = write(tmp_path / "shard.parquet", noise(700))  # row groups of 70
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle - 20_000 : middle + 20_000] = b"\xff" * 40_000
    path.write_bytes(data)
    found, [damage] = read(path)
    assert [text for _, text in found] == noise(700)[: len(found)]
    assert 128 <= len(found) < 350
    assert damage.kind == "shard"


def test_bytes_after_the_last_gzip_member_are_damage_but_zeros_are_padding(tmp_path: Path) -> None:
    path = tmp_path / "shard.json.gz"
    path.write_bytes(gzip.compress(lines(["a"])) + bytes(100_000))
    assert read(path) == ([(0, "a")], [])
    path.write_bytes(gzip.compress(lines(["a"])) + b"junk")
    found, [damage] = read(path)
    assert found == [(0, "a")]
    assert damage.kind == "shard"


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
    assert damage.kind == "shard"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_file_is_one_damage(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"shard{suffix}"
    path.touch()
    found, [damage] = read(path)
    assert found == []
    assert (damage.reason, damage.kind) == ("empty file", "shard")


@pytest.mark.parametrize("suffix", [".json.gz", ".jsonl.zst", ".txt", ".parquet"])
def test_a_file_without_documents_is_one_damage(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"shard{suffix}", [])
    found, [damage] = read(path)
    assert found == []
    assert (damage.kind, damage.document) == ("shard", 0)


def test_the_first_document_of_a_large_gzip_file_needs_little_time_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.json.gz"
    member = gzip.compress(lines(["a text of some length " * 20] * 5000))
    path.write_bytes(member * 100)  # 230 MB of text
    began = time.perf_counter()
    found = documents(shard_of(path), "text", pytest.fail, READING)
    with allocating_less_than(megabytes=16):
        assert len(list(islice(found, 10))) == 10
    assert time.perf_counter() - began < 1


def test_a_large_parquet_row_group_is_read_in_pages(tmp_path: Path) -> None:
    path = tmp_path / "large.parquet"
    generator = random.Random(0)
    table = pyarrow.table({"text": [generator.randbytes(1000).hex() for _ in range(20_000)]})
    pyarrow.parquet.write_table(table, path, row_group_size=20_000)  # 40 MB of text
    found = documents(shard_of(path), "text", pytest.fail, READING)
    with allocating_less_than(megabytes=8):
        assert len(list(islice(found, 10))) == 10


def test_a_reader_that_is_dropped_closes_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "shard.json.gz", noise(3000))
    found = documents(shard_of(path), "text", pytest.fail, READING)
    next(found)
    assert str(path) in open_files()
    found.close()
    assert str(path) not in open_files()


def open_files() -> list[str]:
    directory = Path("/proc/self/fd")
    return [os.readlink(entry) for entry in directory.iterdir() if entry.is_symlink()]
