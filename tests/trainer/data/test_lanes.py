"""A lane is an endless, resumable sequence of rows; over all lanes, an epoch is every document once."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import sentences

from configs.schema import ConfigError, Data
from trainer.data.blocks import Tokens
from trainer.data.damage import Damage
from trainer.data.lanes import BALANCED_UNITS_PER_LANE, Cursor, Lane, permutation
from trainer.data.listing import Shard, list_shards
from trainer.data.order import Order
from trainer.data.packing import PADDING
from trainer.data.shards import Reading
from trainer.data.texts import TextCorpus
from trainer.data.tokenizer import DocumentTokenizer
from trainer.data.workers import Workers

DAMAGED = b"{damaged\n"
PERMUTATION = [2, 4, 5, 1, 0, 3, 6, 7]
SOURCES = ([0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1], [1, 2, 3, 0, 0, 1, 2, 3, 2, 3, 0, 1, 3, 0, 1, 2])


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def write(directory: Path, shards: list[list[str]]) -> list[Shard]:
    directory.mkdir(exist_ok=True)
    for number, texts in enumerate(shards):
        (directory / f"{number:03d}.jsonl").write_bytes(b"".join(map(line, texts)))
    return listed(directory)


def listed(directory: Path) -> list[Shard]:
    return list_shards("data.corpora.x.train", [f"{directory}/*.jsonl"])


def open_lane(
    shards: list[Shard],
    tokenizer: DocumentTokenizer,
    lane: int = 0,
    lanes: int = 1,
    *,
    length: int = 16,
    window: int = 8,
    seed: int = 0,
    corpus: str = "x",
    packing: str = "concatenate",
    damages: list[Damage] | None = None,
    cursor: Cursor = Cursor(),  # noqa: B008
) -> Lane:
    on_damage = [].append if damages is None else damages.append
    data = Data(corpora={corpus: {"train": "x"}}, lanes=lanes, shuffle_window=window, packing=packing)
    texts = TextCorpus(shards, "text", window, tokenizer, on_damage, Reading.of(data, Path(os.devnull)))
    options = {"sequence_length": length, "seed": seed, "cursor": cursor, "workers": Workers(0)}
    return Lane(corpus, lane, texts, data, **options)


def next_row(lane: Lane) -> Tokens:
    return lane.take(1)[0][0].copy()


def epoch(lane: Lane, tokenizer: DocumentTokenizer, number: int = 0) -> list[str]:
    """Documents of one epoch of a lane, in order. For a fresh lane with rows of one target."""
    row = next_row(lane)
    tokens = [(0, row[0])]
    while lane.mark.cursor().epoch <= number:
        tokens.append((lane.mark.cursor().epoch, row[1]))
        row = next_row(lane)
    text = tokenizer.pretrained.decode([token for at, token in tokens if at == number])
    return text.split("<|endoftext|>")[:-1]


def order_of(shards: list[Shard], tokenizer: DocumentTokenizer, number: int = 0, **options: int) -> list[str]:
    """Documents of an epoch of a corpus with one lane."""
    return epoch(open_lane(shards, tokenizer, length=1, **options), tokenizer, number)


@settings(max_examples=40, deadline=None)
@given(
    lanes=st.integers(1, 6),
    extra=st.lists(st.integers(0, 12), min_size=1, max_size=7),
    window=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_an_epoch_holds_every_document_once(
    tokenizer: DocumentTokenizer, lanes: int, extra: list[int], window: int, seed: int
) -> None:
    shards = [[f"{shard}.{number}" for number in range(lanes + more)] for shard, more in enumerate(extra)]
    with tempfile.TemporaryDirectory() as directory:
        files = write(Path(directory), shards)
        for number in range(2):
            found: Counter[str] = Counter()
            for lane in range(lanes):
                one = open_lane(files, tokenizer, lane, lanes, length=1, window=window, seed=seed)
                found.update(epoch(one, tokenizer, number))
            assert found == Counter(text for texts in shards for text in texts)


def test_rows_overlap_by_one_token_and_hold_the_documents_whole(
    tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    texts = sentences(50)
    lane = open_lane(write(tmp_path, [texts]), tokenizer)
    rows = [next_row(lane) for _ in range(150)]
    assert {row.shape for row in rows} == {(17,)}
    assert all(before[-1] == after[0] for before, after in pairwise(rows))
    tokens = np.concatenate([rows[0][:1], *(row[1:] for row in rows)])
    found = tokenizer.pretrained.decode(tokens).split("<|endoftext|>")[:-1]
    assert found[:50] == order_of(write(tmp_path, [texts]), tokenizer)
    assert set(found) == set(texts)


def test_a_row_may_hold_many_documents_and_a_document_many_rows(
    tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    texts = [*(f"{number}" for number in range(100)), " ".join(sentences(40))]
    shards = write(tmp_path, [texts])
    for length in (1, 3, 50, 5000):
        lane = open_lane(shards, tokenizer, length=length)
        rows = [next_row(lane) for _ in range(1 + 8000 // length)]
        tokens = np.concatenate([rows[0][:1], *(row[1:] for row in rows)])
        if length == 1:
            expected = tokens[:8000]
        assert np.array_equal(tokens[:8000], expected)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Shard]:
    """Three shards, one with damaged documents, empty ones and a document of many rows."""
    directory = tmp_path_factory.mktemp("corpus")
    write(directory, [sentences(21), sentences(17, 100), sentences(30, 200)])
    first = directory / "000.jsonl"
    lines = first.read_bytes().splitlines(keepends=True)
    lines[3] = DAMAGED
    lines[4] = line("")
    lines[5] = line(" ".join(sentences(20, 300)))
    first.write_bytes(b"".join(lines))
    return listed(directory)


@settings(max_examples=60, deadline=None)
@given(
    interruptions=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    lanes=st.sampled_from([1, 2, 3]),
    window=st.sampled_from([1, 4, 100]),
    length=st.sampled_from([1, 7, 16, 200]),
)
def test_a_lane_goes_on_from_any_cursor_as_if_never_interrupted(
    tokenizer: DocumentTokenizer,
    corpus: list[Shard],
    interruptions: list[int],
    lanes: int,
    window: int,
    length: int,
) -> None:
    whole = open_lane(corpus, tokenizer, lanes - 1, lanes, window=window, length=length)
    cursor = Cursor()
    for rows in interruptions:
        part = open_lane(corpus, tokenizer, lanes - 1, lanes, window=window, length=length, cursor=cursor)
        for _ in range(rows):
            assert np.array_equal(next_row(part), next_row(whole))
        cursor = part.mark.cursor()
        assert cursor == whole.mark.cursor()


def test_cursors_of_three_epochs_all_resume(tokenizer: DocumentTokenizer, corpus: list[Shard]) -> None:
    whole = open_lane(corpus, tokenizer, length=40, window=4)
    cursors, rows = [whole.mark.cursor()], [next_row(whole)]
    while whole.mark.cursor().epoch < 3:
        cursors.append(whole.mark.cursor())
        rows.append(next_row(whole))
    assert {cursor.epoch for cursor in cursors} == {0, 1, 2}
    assert len({cursor.block for cursor in cursors}) > 3
    for cursor, row in zip(cursors, rows, strict=True):
        resumed = open_lane(corpus, tokenizer, length=40, window=4, cursor=cursor)
        assert np.array_equal(next_row(resumed), row)


def test_resuming_does_not_read_the_shards_before_the_cursor(
    tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    lane = open_lane(write(tmp_path, [sentences(20), sentences(20, 20)]), tokenizer)
    shards = listed(tmp_path)
    while lane.mark.cursor().unit == 0:
        next_row(lane)
    [(first, _), _] = lane._units(epoch=0)
    Path(shards[first].address.removeprefix("file://")).unlink()
    resumed = open_lane(shards, tokenizer, cursor=lane.mark.cursor())
    assert np.array_equal(next_row(resumed), next_row(lane))


def test_a_cursor_counts_rows(tokenizer: DocumentTokenizer, corpus: list[Shard]) -> None:
    lane = open_lane(corpus, tokenizer, cursor=open_lane(corpus, tokenizer).mark.cursor()._replace(rows=7))
    next_row(lane)
    next_row(lane)
    assert lane.mark.cursor().rows == 9


def test_every_epoch_has_its_own_order(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    shards = write(tmp_path, [sentences(30), sentences(30, 30)])
    orders = [order_of(shards, tokenizer, number) for number in range(3)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert len(set(map(tuple, orders))) == 3


def test_documents_are_shuffled_within_the_window_and_no_further(
    tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    texts = sentences(100)
    shards = write(tmp_path, [texts])
    found = [texts.index(text) for text in order_of(shards, tokenizer, window=25)]
    assert [number // 25 for number in found] == sorted(number // 25 for number in found)
    moved = sum(before != after for before, after in enumerate(found))
    assert moved > 80


def test_a_window_of_one_keeps_the_order_of_the_file(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    texts = sentences(40)
    assert order_of(write(tmp_path, [texts]), tokenizer, window=1) == texts


def test_every_block_has_its_own_order(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    shards = write(tmp_path, [[f"{shard}.{number}" for number in range(40)] for shard in range(2)])
    found = order_of(shards, tokenizer, window=10)
    orders = [tuple(int(text.split(".")[1]) % 10 for text in found[at : at + 10]) for at in range(0, 80, 10)]
    assert len(set(orders)) == 8


def test_the_order_of_shards_depends_on_the_seed(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    shards = write(tmp_path, [[f"{shard}."] for shard in range(12)])
    assert len({tuple(order_of(shards, tokenizer, seed=seed)) for seed in range(3)}) == 3


def test_packed_rows_of_a_block_are_not_in_the_order_of_packing(
    tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    lane = open_lane(write(tmp_path, [sentences(200)]), tokenizer, window=200, length=60, packing="best_fit")
    used = (lane.take(60)[0] != PADDING).sum(axis=1)
    assert (np.diff(used) > 0).sum() > 10  # the fullest are made first


def test_the_order_of_rows_is_the_one_of_this_version() -> None:
    """What this pins down may only change together with ORDER in trainer/corpora.py."""
    assert permutation(8, 7, "corpus", 0).tolist() == PERMUTATION
    data = Data(corpora={"a": {"train": "x", "weight": 0.7}, "b": {"train": "x", "weight": 0.3}}, lanes=4)
    corpora, lanes = Order(data, 16, seed=3).sources(0, 16)
    assert (corpora.tolist(), lanes.tolist()) == SOURCES


def test_the_order_depends_on_seed_and_corpus(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    shards = write(tmp_path, [sentences(40)])
    orders = {
        tuple(epoch(open_lane(shards, tokenizer, length=1, seed=seed, corpus=name), tokenizer))
        for seed in (0, 1)
        for name in ("x", "y")
    }
    assert len(orders) == 4


def test_a_damaged_document_leaves_the_order_of_all_others(
    tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    shards = [sentences(30), sentences(30, 30), sentences(30, 60)]
    intact = order_of(write(tmp_path / "intact", shards), tokenizer)
    write(tmp_path / "damaged", shards)
    second = tmp_path / "damaged" / "001.jsonl"
    lines = second.read_bytes().splitlines(keepends=True)
    lines[5] = lines[29] = DAMAGED
    second.write_bytes(b"".join(lines))
    lost = {shards[1][5], shards[1][29]}
    assert order_of(listed(tmp_path / "damaged"), tokenizer) == [text for text in intact if text not in lost]


def test_a_shard_cut_short_leaves_the_order_of_all_others(
    tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    orders, damages = [], list[Damage]()
    for kept in (1, 0.6):
        directory = tmp_path / str(kept)
        write(directory, [sentences(30), [], sentences(30, 60)])
        (directory / "001.jsonl").unlink()
        packed = gzip.compress(b"".join(map(line, sentences(200, 1000))))
        (directory / "001.json.gz").write_bytes(packed[: int(kept * len(packed))])
        shards = list_shards("data.corpora.x.train", [f"{directory}/*"])
        lane = open_lane(shards, tokenizer, length=1, damages=damages)
        orders.append(epoch(lane, tokenizer))
    assert orders[1] == [text for text in orders[0] if text in set(orders[1])]
    assert 60 < len(orders[1]) < len(orders[0]) == 260
    assert {damage.kind for damage in damages} == {"shard"}


def test_a_document_that_is_damaged_after_a_checkpoint_loses_only_itself(
    tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    texts = sentences(40)
    shards = write(tmp_path, [texts])
    lane = open_lane(shards, tokenizer, length=1, window=40)
    order = order_of(shards, tokenizer, window=40)
    while lane.mark.cursor().item < 20:
        next_row(lane)
    lines = [DAMAGED if text == order[3] else line(text) for text in texts]
    (tmp_path / "000.jsonl").write_bytes(b"".join(lines))
    resumed = open_lane(listed(tmp_path), tokenizer, length=1, window=40, cursor=lane.mark.cursor())
    for _ in range(200):
        assert np.array_equal(next_row(resumed), next_row(lane))


def test_a_lane_that_an_epoch_has_no_document_for_goes_on_with_the_next(
    tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    texts = sentences(3)
    shards = write(tmp_path, [texts])
    for lane in range(4):
        rows = open_lane(shards, tokenizer, lane, 4, length=1).take(2000)[0]
        found = tokenizer.pretrained.decode(rows[:, 0]).split("<|endoftext|>")[:-1]
        assert set(found) == set(texts)


def test_a_corpus_of_empty_documents_names_the_key(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    shards = write(tmp_path, [["", ""]])
    with pytest.raises(ConfigError, match=r"data\.lanes=1: corpus x .* use fewer lanes or more text"):
        next_row(open_lane(shards, tokenizer))


def test_lanes_outlive_an_epoch_of_nothing_but_damage(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    write(tmp_path, [sentences(10, 10 * shard) for shard in range(4)])
    (tmp_path / "002.jsonl").write_bytes(DAMAGED * 10)
    for number in range(4):
        lane = open_lane(listed(tmp_path), tokenizer, number, 4)
        while lane.mark.cursor().epoch < 12:
            next_row(lane)


def test_a_corpus_of_nothing_but_damage_names_the_key(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    write(tmp_path, [["text"], ["text"]])
    for shard in range(2):
        (tmp_path / f"{shard:03d}.jsonl").write_bytes(DAMAGED)
    with pytest.raises(ConfigError, match=r"data\.lanes=2"):
        next_row(open_lane(listed(tmp_path), tokenizer, 0, 2))


@pytest.mark.parametrize(
    ("shards", "lanes", "slices"),
    [
        (1, 16, 16),  # few shards: every lane reads a part of each
        (3, 2, 2),
        (4, 4, 1),  # lanes divide shards: whole ones
        (1024, 512, 1),
        (1000, 512, 9),  # in equal parts it would be 64, each of which reads the shard from its start
        (8191, 512, 2),
        (8192, 500, 1),
    ],
)
def test_shards_are_cut_no_finer_than_balance_needs(
    tokenizer: DocumentTokenizer, shards: int, lanes: int, slices: int
) -> None:
    files = [Shard(f"file:///{number}.jsonl", 1) for number in range(shards)]
    units = [open_lane(files, tokenizer, lane, lanes)._units(epoch=0) for lane in range(lanes)]
    counts = [len(own) for own in units]
    assert max(counts) - min(counts) <= max(counts) / BALANCED_UNITS_PER_LANE
    dealt = sorted(unit for own in units for unit in own)
    assert dealt == [(shard, part) for shard in range(shards) for part in range(slices)]
