"""The sequence of training rows is the same for any world size, batch size, prefetch and interruption."""

from __future__ import annotations

import gc
import json
import os
import resource
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Site, event_names, sentences, write_shard

from configs.compose import compose
from configs.schema import Config, ConfigError
from configs.text import Faults, Retry
from trainer.data.blocks import Block, Corpus, Place, Tokens
from trainer.data.damage import DamagedShard, DamageReport, Unavailable
from trainer.data.lanes import Cursor
from trainer.data.listing import Shard, list_shards
from trainer.data.loader import Loader, Position
from trainer.data.order import Order
from trainer.data.shards import Reading
from trainer.data.texts import TextCorpus
from trainer.data.tokenizer import DocumentTokenizer

START = Position(0, {})
ROWS = 480
"""More than an epoch of the smaller corpus of `site`."""


@pytest.fixture(scope="module")
def module_site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site.create(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def base(module_site: Site) -> Config:
    return compose(module_site.overrides())


def with_options(config: Config, *, global_batch: int = 8, **data: Any) -> Config:
    return config.model_copy(
        update={"global_batch": global_batch, "data": config.data.model_copy(update=data)}
    )


def shards_of(config: Config) -> dict[str, list[Shard]]:
    return {
        name: list_shards(f"data.corpora.{name}.train", corpus.train or [])
        for name, corpus in config.data.corpora.items()
    }


def texts_of(
    config: Config, shards: dict[str, list[Shard]], tokenizer: DocumentTokenizer, run: Path
) -> dict[str, Corpus]:
    report, reading = DamageReport(run, config.data.faults, 0), Reading.of(config.data, run)
    return {
        name: TextCorpus(listed, "text", config.data.shuffle_window, tokenizer, report, reading)
        for name, listed in shards.items()
    }


def open_loader(
    config: Config,
    tokenizer: DocumentTokenizer,
    run: Path,
    rank: int = 0,
    world_size: int = 1,
    position: Position = START,
) -> Loader:
    corpora = texts_of(config, shards_of(config), tokenizer, run)
    return Loader(config, corpora, rank=rank, world_size=world_size, position=position)


def consume(
    config: Config,
    tokenizer: DocumentTokenizer,
    world_size: int,
    batches: int,
    position: Position = START,
) -> tuple[Tokens, Position]:
    """Rows of the next global batches in the order of the run, and where that leaves the run."""
    order = Order(config.data, config.model.sequence_length, config.seed)
    count = config.global_batch
    rows = np.full((batches * count, config.model.sequence_length + 1), -1, dtype=np.int32)
    with ExitStack() as stack:
        loaders = [
            stack.enter_context(
                closing(open_loader(config, tokenizer, Path(os.devnull), rank, world_size, position))
            )
            for rank in range(world_size)
        ]
        for step in range(batches):
            first = position.rows
            given = [loader.next_batch() for loader in loaders]
            for rank, batch in enumerate(given):
                own = order.rows_of_rank(first, count, rank, world_size)
                rows[own - first + step * count] = batch.rows
            position = Position.merged([batch.position for batch in given])
            assert position.rows == first + count
    return rows, position


@pytest.fixture(scope="module")
def reference(base: Config, tokenizer: DocumentTokenizer) -> Tokens:
    rows, _ = consume(base, tokenizer, 1, ROWS // 8)
    return rows


@pytest.mark.parametrize("prefetch", [1, 8])
@pytest.mark.parametrize("global_batch", [8, 32])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_rows_do_not_depend_on_world_size_batch_size_or_prefetch(
    base: Config,
    tokenizer: DocumentTokenizer,
    reference: Tokens,
    world_size: int,
    global_batch: int,
    prefetch: int,
) -> None:
    config = with_options(base, global_batch=global_batch, prefetch_batches=prefetch)
    rows, _ = consume(config, tokenizer, world_size, ROWS // global_batch)
    assert np.array_equal(rows, reference)


@pytest.mark.parametrize(
    "attempts",
    [  # (world size, global batch, batches)
        [(1, 8, 1), (1, 8, 59)],
        [(2, 8, 7), (8, 8, 1), (1, 8, 30), (4, 8, 22)],
        [(8, 8, 20), (4, 32, 3), (2, 16, 14)],
        [(4, 8, 1)] * 10 + [(8, 8, 50)],
    ],
)
def test_interruptions_and_other_world_sizes_leave_no_trace(
    base: Config, tokenizer: DocumentTokenizer, reference: Tokens, attempts: list[tuple[int, int, int]]
) -> None:
    position, parts = START, []
    for world_size, global_batch, batches in attempts:
        config = with_options(base, global_batch=global_batch)
        rows, position = consume(config, tokenizer, world_size, batches, position)
        position = Position.from_json(json.loads(json.dumps(position.to_json())))
        parts.append(rows)
    assert np.array_equal(np.concatenate(parts), reference)


def test_lanes_that_no_rank_read_since_a_resume_are_not_forgotten(
    base: Config, tokenizer: DocumentTokenizer
) -> None:
    config = with_options(base, global_batch=4, lanes=16)  # a batch meets a quarter of the lanes
    whole, _ = consume(config, tokenizer, 1, 40)
    position, parts = START, []
    for world_size in (1, 2, 4, 2):
        rows, position = consume(config, tokenizer, world_size, 10 if world_size == 1 else 1, position)
        parts.append(rows)
    rows, _ = consume(config, tokenizer, 4, 27, position)
    assert np.array_equal(np.concatenate([*parts, rows]), whole)


def test_prefetched_batches_do_not_move_the_position(
    base: Config, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    with closing(open_loader(with_options(base, prefetch_batches=8), tokenizer, tmp_path)) as loader:
        batch = loader.next_batch()
        wait_until(loader._queue.full)
        assert batch.position.rows == 8
        assert sum(cursor.rows for cursor in batch.position.cursors.values()) == 8


def test_merged_takes_the_furthest_cursor_of_each_lane() -> None:
    a = Position(8, {("x", 0): Cursor(rows=3), ("x", 1): Cursor(rows=1)})
    b = Position(8, {("x", 0): Cursor(rows=2), ("y", 0): Cursor(rows=2)})
    expected = {("x", 0): Cursor(rows=3), ("x", 1): Cursor(rows=1), ("y", 0): Cursor(rows=2)}
    assert Position.merged([a, b]) == Position.merged([b, a]) == Position(8, expected)


def test_a_rank_reads_only_its_own_lanes(base: Config, tokenizer: DocumentTokenizer, tmp_path: Path) -> None:
    config = with_options(base, global_batch=16, lanes=8)
    seen: list[set[int]] = []
    for rank in range(4):
        with closing(open_loader(config, tokenizer, tmp_path, rank, 4)) as loader:
            cursors = [loader.next_batch().position.cursors for _ in range(20)][-1]
            assert {lane.number for lane in loader._lanes.values()} == {lane for _, lane in cursors}
        seen.append({lane for _, lane in cursors})
    assert sorted(lane for lanes in seen for lane in lanes) == list(range(8))


def one_corpus(site: Site, train: str, *more: str) -> Config:
    overrides = [text for text in site.overrides() if not text.startswith("data.corpora.legal")]
    return compose([*overrides, f"data.corpora.general.train={train}", *more])


@pytest.fixture
def damaged(tmp_path: Path, module_site: Site) -> Config:
    """A configuration whose only shard has a damaged document."""
    path = tmp_path / "damaged.jsonl"
    lines = [json.dumps({"text": text}) for text in sentences(100)]
    lines[70] = "{damaged"
    path.write_text("\n".join(lines))
    return one_corpus(module_site, str(path))


def test_damage_is_recorded_once_though_every_lane_reads_the_shard(
    damaged: Config, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    with closing(open_loader(damaged, tokenizer, tmp_path)) as loader:
        while min(cursor.epoch for cursor in loader.next_batch().position.cursors.values()) < 2:
            pass
    assert event_names(tmp_path) == ["data_damage"]


def test_an_error_in_the_thread_reaches_every_call_of_next_batch(
    damaged: Config, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    config = with_options(damaged, faults=Faults(document="fail"))
    with closing(open_loader(config, tokenizer, tmp_path)) as loader:
        for _ in range(2):
            with pytest.raises(DamagedShard, match=r"damaged\.jsonl, document 70"):
                [loader.next_batch() for _ in range(1000)]


def test_a_corpus_without_text_reaches_the_caller_as_a_config_error(
    module_site: Site, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    config = one_corpus(module_site, str(write_shard(tmp_path / "blank.json.gz", ["", ""])))
    with (
        closing(open_loader(config, tokenizer, tmp_path)) as loader,
        pytest.raises(ConfigError, match=r"data\.lanes=4"),
    ):
        loader.next_batch()


def test_a_file_system_that_fails_reaches_the_caller_and_loses_nothing(
    module_site: Site, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    shards = [write_shard(tmp_path / f"{number}.json.gz", sentences(20)) for number in range(4)]
    config = one_corpus(module_site, f"{tmp_path}/*.json.gz")
    listed = shards_of(config)
    shards[2].unlink()
    corpora = texts_of(config, listed, tokenizer, tmp_path)
    loader = Loader(config, corpora, rank=0, world_size=1, position=START)
    with closing(loader), pytest.raises(Unavailable, match=r"2\.json\.gz"):
        [loader.next_batch() for _ in range(1000)]
    assert event_names(tmp_path) == []


def test_a_caller_may_give_up_waiting_for_a_batch(
    base: Config, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    with closing(open_loader(with_options(base, global_batch=1_000_000), tokenizer, tmp_path)) as loader:
        assert loader.next_batch(give_up=lambda: True) is None


class Stuck:
    """A corpus in a store that does not answer."""

    addresses = ("s3://away/1.json.gz",)
    documents_per_encode = 1

    def __init__(self) -> None:
        self.over = threading.Event()

    def blocks(self, shard: int, part: int, parts: int, start: Place) -> Iterator[Block]:
        self.over.wait(60)
        yield from ()


def test_a_loader_that_cannot_go_on_says_what_it_waits_for(base: Config) -> None:
    impatient = Retry(attempts=1, timeout_seconds=0.1, stall_seconds=0.5)
    stuck = {name: Stuck() for name in base.data.corpora}
    config = with_options(base, retry=impatient)
    with closing(Loader(config, stuck, rank=0, world_size=1, position=START)) as loader:
        with pytest.raises(
            Unavailable, match=r"stall_seconds=0\.5: .* lane \d+, reading s3://away/1\.json\.gz"
        ):
            loader.next_batch()
        for corpus in stuck.values():
            corpus.over.set()


def test_close_ends_the_thread_while_the_queue_is_full(
    base: Config, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    loader = open_loader(with_options(base, prefetch_batches=1), tokenizer, tmp_path)
    wait_until(loader._queue.full)
    close_quickly(loader)


def test_close_ends_the_thread_in_the_middle_of_a_batch(
    base: Config, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    loader = open_loader(with_options(base, global_batch=200_000), tokenizer, tmp_path)
    wait_until(lambda: bool(loader._lanes))
    close_quickly(loader)


def test_close_may_follow_an_error_or_another_close(
    damaged: Config, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    loader = open_loader(with_options(damaged, faults=Faults(document="fail")), tokenizer, tmp_path)
    with pytest.raises(DamagedShard):
        [loader.next_batch() for _ in range(1000)]
    close_quickly(loader)
    close_quickly(loader)


def close_quickly(loader: Loader) -> None:
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 5
    assert not loader._thread.is_alive()


def wait_until(condition: Any) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_close_closes_the_shards(base: Config, tokenizer: DocumentTokenizer, tmp_path: Path) -> None:
    before = open_shards()
    loader = open_loader(base, tokenizer, tmp_path)
    loader.next_batch()
    assert open_shards() > before
    loader.close()
    assert open_shards() == before


def open_shards() -> int:
    entries = [entry for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return sum(os.readlink(entry).endswith(".json.gz") for entry in entries)


@pytest.fixture
def few_open_files() -> Iterator[None]:
    """A limit of 32 more open files than there are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()
    highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 32, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_open_files")
def test_more_lanes_than_a_shell_allows_open_files_are_read(
    module_site: Site, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    for number in range(64):
        write_shard(tmp_path / f"{number}.json.gz", sentences(40, 40 * number))
    lanes = ["data.lanes=64", "data.shuffle_window=1", "global_batch=64"]
    config = one_corpus(module_site, f"{tmp_path}/*.json.gz", *lanes)
    with closing(open_loader(config, tokenizer, tmp_path)) as loader:
        assert len(loader.next_batch().rows) == 64
        assert open_shards() >= 64
    assert event_names(tmp_path) == []


def test_memory_does_not_grow_with_the_rows_read(
    base: Config, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    tracemalloc.start()
    peaks = []
    with closing(open_loader(base, tokenizer, tmp_path)) as loader:
        for _ in range(3):
            tracemalloc.reset_peak()
            for _ in range(600):  # several epochs of both corpora
                loader.next_batch()
            peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert peaks[2] < 1.1 * peaks[1]
