"""Reading tokens written before: a memory map, LitData, MosaicML Streaming; rows in random order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers.task import Task

CHUNK_MIB = 64
FILE = "tokens.uint16"
"""All tokens of the text, end to end, with the end-of-document token; written by floors.write_tokens."""


def memmap(task: Task) -> Iterator[NDArray[np.int32]]:
    """The least that reading can cost: rows of a memory map, copied as int32."""
    tokens = np.memmap(Path(task.work, FILE), dtype=np.uint16, mode="r").view(np.ndarray)
    random = np.random.default_rng(0)
    while True:
        order = random.permutation((len(tokens) - 1) // task.length) * task.length
        for first in range(0, len(order) - task.rows + 1, task.rows):
            rows = np.empty((task.rows, task.length + 1), dtype=np.int32)
            for row, start in enumerate(order[first : first + task.rows].tolist()):
                rows[row] = tokens[start : start + task.length + 1]
            yield rows


def _pieces(task: Task) -> Iterator[NDArray[np.uint16]]:
    tokens = np.memmap(Path(task.work, FILE), dtype=np.uint16, mode="r")
    size = task.length + 1
    for first in range(0, len(tokens) - size + 1, size):
        yield tokens[first : first + size]


def _tensors(path: str) -> Iterator[Any]:
    import torch

    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    for first in range(0, len(tokens), 1 << 16):
        yield torch.from_numpy(tokens[first : first + (1 << 16)].astype(np.int32))


def write_litdata(task: Task) -> None:
    from litdata import TokensLoader, optimize

    target = str(Path(task.work, "litdata"))
    optimize(
        _tensors,
        [str(Path(task.work, FILE))],
        target,
        chunk_bytes=f"{CHUNK_MIB}MB",
        item_loader=TokensLoader(),
        num_workers=1,
        mode="overwrite",
    )


def litdata(task: Task) -> Iterator[NDArray[np.int32]]:
    """options: workers."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    source = StreamingDataset(
        str(Path(task.work, "litdata")),
        item_loader=TokensLoader(block_size=task.length + 1),
        shuffle=True,
        drop_last=True,
    )
    loader = StreamingDataLoader(
        source, batch_size=task.rows, num_workers=int(task.options["workers"]), drop_last=True
    )
    while True:
        for batch in loader:
            yield batch.numpy()


def write_mosaic(task: Task) -> None:
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:uint16:{task.length + 1}"}
    with MDSWriter(
        out=str(Path(task.work, "mosaic")), columns=columns, size_limit=CHUNK_MIB << 20, exist_ok=True
    ) as writer:
        for piece in _pieces(task):
            writer.write({"tokens": piece})


def mosaic(task: Task) -> Iterator[NDArray[np.int32]]:
    """options: workers."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    source = StreamingDataset(
        local=str(Path(task.work, "mosaic")), shuffle=True, batch_size=task.rows, num_canonical_nodes=1
    )
    workers = int(task.options["workers"])
    while True:
        yield from DataLoader(source, task.rows, num_workers=workers, collate_fn=_stack, drop_last=True)


def _stack(samples: list[dict[str, Any]]) -> NDArray[np.int32]:
    return np.stack([sample["tokens"] for sample in samples]).astype(np.int32)
