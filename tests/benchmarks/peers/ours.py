"""Trainyard's own pipeline, from the configuration to batches as a run takes them."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import transformers  # noqa: F401 - a run has imported it for its model
from isal import isal_zlib
from numpy.typing import NDArray

from configs.compose import compose
from configs.schema import Config
from peers.task import Task
from trainer.corpora import load_corpora
from trainer.data.index import Indexes, build, identity_of
from trainer.data.lanes import Cursor, slices
from trainer.data.listing import list_shards
from trainer.data.loader import Loader, Position
from trainer.distributed import World
from trainer.tokenizing import Share, tokenize

PIECE_BYTES = 1 << 17
CORPORA = {"first": 3, "second": 1}
"""Weights; three quarters of the shards belong to the first."""


def configured(task: Task) -> Config:
    """options: engine; tokenized=yes reads what write_tokenized wrote; corpora=one for all shards in one."""
    border = len(task.shards) * 3 // 4
    corpora = {"first": task.shards[:border], "second": task.shards[border:]}
    if task.options.get("corpora") == "one":
        corpora = {"first": task.shards}
    overrides = [
        "model=llama-demo",
        f"model.tokenizer={task.tokenizer}",
        "model.vocabulary=32000",
        f"model.sequence_length={task.length}",
        "data=local",
        f"data.workers={task.threads}",
        f"data.engine={task.options.get('engine', 'fastokens')}",
        f"global_batch={task.rows}",
        f"micro_batch={task.rows}",
        f"run.directory={task.work}/run",
    ]
    for name, shards in corpora.items():
        listed = ",".join(f"'{shard}'" for shard in shards)
        overrides += [
            f"+data.corpora.{name}.train=[{listed}]",
            f"+data.corpora.{name}.weight={CORPORA[name]}",
        ]
    if task.options.get("tokenized") == "yes":
        overrides.append(f"data.tokenized={tokenized(task)}")
    return compose(overrides)


def tokenized(task: Task) -> Path:
    return Path(task.work, "tokenized")


def alone() -> World:
    """A world of one rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TRAINYARD_ATTEMPT": "1"}
    return World.join()


def loader(task: Task) -> Iterator[NDArray[np.int32]]:
    """From the configuration on: the shards are listed, the tokenizer is loaded and its engine chosen."""
    config = configured(task)
    run = Path(task.options.get("run", f"{task.work}/run"))
    run.mkdir(parents=True, exist_ok=True)
    corpora = load_corpora(run, config, alone())
    begin = Position.from_json(json.loads(Path(task.state).read_text())) if task.state else Position(0, {})
    batches = Loader(config, corpora.train, rank=0, world_size=1, position=begin)
    while True:
        batch = batches.next_batch()
        assert batch is not None
        yield batch.rows


def write_tokenized(task: Task) -> None:
    """As `trainyard tokenize` does."""
    tokenize(configured(task), Share(0, 1))


def prepare_resume(task: Task) -> None:
    """Write to options[to] the position of a run whose lanes all stand at options[fraction] of their shards.

    All shards have the same text, as links to one file have. Each lane is put at the begin of the block in
    which the fraction of its unit lies; to options[documents] goes the number of documents before it.
    """
    config = configured(task)
    lanes, window = config.data.lanes, config.data.shuffle_window
    span = window * slices(len(task.shards), lanes)
    begins = line_begins(task.shards[0])
    block = int(float(task.options["fraction"]) * len(begins)) // span
    rows = 1_000
    cursor = Cursor(rows, epoch=0, unit=0, block=block, offset=int(begins[block * span]))
    position = Position(rows * lanes, {("first", lane): cursor for lane in range(lanes)})
    Path(task.options["to"]).write_text(json.dumps(position.to_json()))
    Path(task.options["documents"]).write_text(str(block * span))


def write_indexes(task: Task) -> None:
    """Indexes of the shards, links to one file, to options[indexes]; runs make them as they read."""
    directory = Path(task.options["indexes"])
    places = Indexes(directory)
    first, *others = list_shards("shards", task.shards)
    path = first.address.removeprefix("file://")
    build(places.place(first), path, identity_of(first, path))
    head, _, windows = places.place(first).read_bytes().partition(b"\n")
    for shard in others:
        identity = identity_of(shard, shard.address.removeprefix("file://"))
        changed = json.dumps(json.loads(head) | {"identity": identity}).encode()
        places.place(shard).write_bytes(changed + b"\n" + windows)


def line_begins(path: str) -> NDArray[np.int64]:
    """Offsets at which the lines of a gzip file begin, in bytes of its text, and its size."""
    member, begins, size = isal_zlib.decompressobj(16 + isal_zlib.MAX_WBITS), [np.zeros(1, np.int64)], 0
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            text = member.decompress(piece)
            ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
            begins.append(ends + size + 1)
            size += len(text)
    return np.concatenate(begins)
