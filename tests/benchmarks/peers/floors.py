"""Pipelines written by hand with the fastest parts there are, and nothing else.

No order, no resume, no faults: what ours adds to these is its price. Documents are taken in the order of the
files, whose readers take turns.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fastokens
import numpy as np
import orjson
from isal import isal_zlib
from numpy.typing import NDArray
from tokenizers import Tokenizer

from peers.task import Task

Rows = NDArray[np.int32]
DOCUMENTS = 256
PIECE_BYTES = 1 << 17
"""Compressed; what it unfolds to still fits in a core's cache."""


def fast(task: Task) -> Iterator[Rows]:
    """isal, orjson, fastokens, numpy."""
    tokenizer = fastokens.Tokenizer.from_file(f"{task.tokenizer}/tokenizer.json")
    return _rows(task, partial(_encode_fast, tokenizer, end_of_document(task)))


def transformers(task: Task) -> Iterator[Rows]:
    """isal, orjson, Hugging Face tokenizers, numpy."""
    tokenizer = Tokenizer.from_file(f"{task.tokenizer}/tokenizer.json")
    return _rows(task, partial(_encode_transformers, tokenizer, end_of_document(task)))


def end_of_document(task: Task) -> int:
    settings = orjson.loads(Path(task.tokenizer, "tokenizer_config.json").read_bytes())
    tokenizer = Tokenizer.from_file(f"{task.tokenizer}/tokenizer.json")
    return tokenizer.token_to_id(settings["eos_token"])


def _encode_fast(tokenizer: Any, end: int, texts: list[str]) -> Rows:
    flat, offsets = tokenizer.encode_batch_flat(texts, split_special_tokens=True)
    ids, ends = np.frombuffer(flat, np.int32), np.frombuffer(offsets, np.int64)[1:]
    return np.insert(ids, ends, end)


def _encode_transformers(tokenizer: Tokenizer, end: int, texts: list[str]) -> Rows:
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        ids += encoding.ids
        ids.append(end)
    return np.array(ids, dtype=np.int32)


def _rows(task: Task, encode: Callable[[list[str]], Rows]) -> Iterator[Rows]:
    size, shape = task.rows * task.length, (task.rows, task.length + 1)
    held: deque[Rows] = deque()
    tokens = 0
    for ids in _ahead(task, encode):
        held.append(ids)
        tokens += len(ids)
        if tokens > size:
            flat = np.concatenate(held)
            first = 0
            while len(flat) - first > size:
                strided = np.lib.stride_tricks.as_strided(flat[first:], shape, (task.length * 4, 4))
                yield strided.copy()
                first += size
            held = deque([flat[first:]])
            tokens = len(flat) - first


def _ahead(task: Task, encode: Callable[[list[str]], Rows]) -> Iterator[Rows]:
    """Tokens of blocks of documents, read and encoded by threads, of which each has a shard at a time."""

    def work(readers: Iterator[list[str]]) -> Rows:
        return encode(next(readers))

    pool = ThreadPoolExecutor(task.threads)
    readers = [_blocks(task.shards[part :: task.threads]) for part in range(task.threads)]
    waiting: list[deque[Future[Rows]]] = [deque([pool.submit(work, reader)]) for reader in readers]
    while True:
        for reader, futures in zip(readers, waiting, strict=True):
            ids = futures.popleft().result()
            futures.append(pool.submit(work, reader))
            yield ids


def _blocks(shards: list[str], repeat: bool = True) -> Iterator[list[str]]:
    for turn in itertools.count():
        if turn and not repeat:
            return
        for path in shards:
            texts: list[str] = []
            rest = b""
            member = isal_zlib.decompressobj(16 + isal_zlib.MAX_WBITS)
            with open(path, "rb", buffering=0) as file:
                while piece := file.read(PIECE_BYTES):
                    *lines, rest = (rest + member.decompress(piece)).split(b"\n")
                    texts += [orjson.loads(line)["text"] for line in lines]
                    while len(texts) >= DOCUMENTS:
                        yield texts[:DOCUMENTS]
                        del texts[:DOCUMENTS]
            if texts:
                yield texts


def documents(task: Task, shard: int) -> Iterator[Rows]:
    """Tokens of each document of a shard."""
    tokenizer = fastokens.Tokenizer.from_file(f"{task.tokenizer}/tokenizer.json")
    end = end_of_document(task)
    for texts in _blocks([task.shards[shard]], repeat=False):
        ids = _encode_fast(tokenizer, end, texts)
        yield from np.split(ids, np.flatnonzero(ids == end)[:-1] + 1)


def write_tokens(task: Task) -> None:
    """All tokens of the shards, once, for pipelines that read tokens."""
    tokenizer = fastokens.Tokenizer.from_file(f"{task.tokenizer}/tokenizer.json")
    encode = partial(_encode_fast, tokenizer, end_of_document(task))
    with Path(task.work, "tokens.uint16").open("wb") as file:
        for texts in _blocks(task.shards, repeat=False):
            encode(texts).astype(np.uint16).tofile(file)
