"""How well the order of documents is mixed, as a number: 0 is a full shuffle, 1 is no shuffle at all.

    python tests/benchmarks/stream_shuffle.py DIRECTORY [--batches 100]

DIRECTORY as stream.py takes it. The source of a document is its shard. The serial correlation of sources is
(p - c) / (1 - c) for the share p of pairs that are of one source, among pairs of documents that follow each
other, that begin in rows which follow each other, or that are of one batch; c is that share among all pairs
of the text. The orders beside ours fill the same rows with as many documents: all of them permuted, windows
of 1,000 permuted (as torchtitan's), and as they lie in the shards.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from peers import floors, ours
from peers.task import Task
from stream import task_of

PREFIX = 24
"""Tokens that tell a document; those whose first tokens others share are left out."""
WINDOW = 1_000
Batches = list[list[list[int]]]
"""Sources of the documents that begin in each row of each batch."""


def sources(task: Task) -> tuple[dict[bytes, int], list[int]]:
    """Source by a document's first tokens, and the sources of all documents as they lie in the shards."""
    known: dict[bytes, int] = {}
    shared: set[bytes] = set()
    for shard in range(len(task.shards)):
        for document in floors.documents(task, shard):
            key = document[:PREFIX].tobytes()
            if key in known:
                shared.add(key)
            known[key] = shard
    found = {key: shard for key, shard in known.items() if key not in shared}
    return found, list(found.values())


def dealt(batches: Iterator[NDArray[np.int32]], known: dict[bytes, int], end: int, count: int) -> Batches:
    """Sources in `count` batches of a pipeline."""
    found: Batches = []
    for rows in islice(batches, count):
        found.append([])
        for row in rows:
            begins = (np.flatnonzero(row[: -PREFIX - 1] == end) + 1).tolist()
            keys = [row[begin : begin + PREFIX].tobytes() for begin in begins]
            found[-1].append([known[key] for key in keys if key in known])
    return found


def filled(like: Batches, order: Callable[[], Iterator[int]]) -> Batches:
    """Other sources in the same places."""
    rest = order()
    return [[list(islice(rest, len(row))) for row in batch] for batch in like]


def windows(all_sources: list[int], window: int, random: np.random.Generator) -> Iterator[int]:
    for first in range(0, len(all_sources), window):
        some = np.array(all_sources[first : first + window])
        yield from random.permutation(some).tolist()


def correlations(batches: Batches, chance: float) -> tuple[float, float, float]:
    """Of documents that follow each other, of neighbouring rows, and of a batch."""
    following, rows, pairs = [], [], []
    for batch in batches:
        flat = [source for row in batch for source in row]
        following += [a == b for a, b in pairwise(flat)]
        rows += [a == b for a, b in pairwise(row[0] for row in batch if row)]
        counts = np.bincount(flat)
        pairs.append((counts * (counts - 1)).sum() / (len(flat) * (len(flat) - 1)))
    found = [(float(np.mean(same)) - chance) / (1 - chance) for same in (following, rows, pairs)]
    return found[0], found[1], found[2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--batches", type=int, default=100)
    options = parser.parse_args()
    task = task_of(options.directory, os.cpu_count() or 1)
    known, all_sources = sources(task)
    end = floors.end_of_document(task)
    random = np.random.default_rng(0)
    own = dealt(ours.loader(task), known, end, options.batches)
    shares = np.bincount(all_sources) / len(all_sources)
    chance = float((shares**2).sum())
    orders = {
        "ours": own,
        "full shuffle": filled(own, lambda: windows(all_sources, len(all_sources), random)),
        f"windows of {WINDOW}": filled(own, lambda: windows(all_sources, WINDOW, random)),
        "none": filled(own, lambda: iter(all_sources)),
    }
    documents = sum(len(row) for batch in own for row in batch)
    print(f"{len(task.shards)} shards, {options.batches} batches, {documents} documents\n")
    print("| order | following documents | neighbouring rows | any two of a batch |")
    print("| --- | --- | --- | --- |")
    for name, batches in orders.items():
        print(f"| {name} | " + " | ".join(f"{value:+.4f}" for value in correlations(batches, chance)) + " |")
    sys.stdout.flush()
    os._exit(0)  # the loader reads ahead for ever


if __name__ == "__main__":
    main()
