"""How torchtitan reads text, with the libraries that it uses.

Follows torchtitan's main branch of August 2026 (commit b5bcd76, torchtitan/components/data: the streaming
source of Hugging Face datasets, TextProcessor, windows of 1,000 documents, ConcatThenSplit packing, two
batches ahead) in its steps and settings, on Grain 0.2.18; its releases up to 0.3.0 pack Python lists
instead. A batch is one row there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import grain.python as grain
import numpy as np
from grain import experimental
from numpy.typing import NDArray
from tokenizers import Tokenizer

from peers.task import Task

WINDOW, AHEAD, IGNORED = 1_000, 2, -100


class Cursor(grain.DatasetIterator):  # type: ignore[misc]
    """A stream of Hugging Face datasets that repeats and can be resumed."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream, self._epoch = stream, 0
        self._begin = stream.state_dict()
        self._rest = iter(stream)

    def __next__(self) -> Any:
        try:
            return next(self._rest)
        except StopIteration:
            self._epoch += 1
            self._stream.set_epoch(self._epoch)
            self._stream.load_state_dict(self._begin)
            self._rest = iter(self._stream)
            return next(self._rest)

    def get_state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "stream": self._stream.state_dict()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._epoch = state["epoch"]
        self._stream.set_epoch(self._epoch)
        self._stream.load_state_dict(state["stream"])
        self._rest = iter(self._stream)


class Source(grain.IterDataset):  # type: ignore[misc]
    def __init__(self, shards: list[str]) -> None:
        super().__init__()
        self.stream = datasets.load_dataset("json", data_files=shards, split="train", streaming=True)

    def __iter__(self) -> Cursor:
        return Cursor(self.stream)


def windows(task: Task) -> Iterator[NDArray[np.int64]]:
    tokenizer = Tokenizer.from_file(f"{task.tokenizer}/tokenizer.json")
    settings = json.loads(Path(task.tokenizer, "tokenizer_config.json").read_text())
    end = tokenizer.token_to_id(settings["eos_token"])
    size = task.rows * task.length
    source = Source(task.shards)

    def encode(sample: dict[str, Any]) -> dict[str, NDArray[np.int64]]:
        ids = np.asarray([*tokenizer.encode(sample["text"]).ids, end], dtype=np.int64)
        positions = np.arange(len(ids) - 1, dtype=np.int64) % task.length
        return {"input_ids": ids[:-1], "labels": ids[1:], "positions": positions}

    def finish(packed: dict[str, Any]) -> dict[str, NDArray[np.int64]]:
        labels = np.asarray(packed["labels"]).copy()
        labels[np.asarray(packed["input_ids_segment_ids"]) == 0] = IGNORED
        index = np.arange(size, dtype=np.int64)
        begins = np.maximum.accumulate(np.where(np.asarray(packed["positions"]) == 0, index, 0))
        return {"input_ids": np.asarray(packed["input_ids"]), "labels": labels, "positions": index - begins}

    shuffled = experimental.WindowShuffleIterDataset(source.map(encode), window_size=WINDOW, seed=0)
    lengths = dict.fromkeys(("input_ids", "labels", "positions"), size)
    packed = experimental.ConcatThenSplitIterDataset(shuffled, length_struct=lengths)
    full = packed.filter(lambda row: bool(np.all(np.asarray(row["input_ids_segment_ids"]) != 0)))
    batches = experimental.ThreadPrefetchIterDataset(full.map(finish), prefetch_buffer_size=AHEAD)
    iterator = iter(batches)
    if task.state:
        state = iterator.get_state()
        _put(state, json.loads(Path(task.state).read_text()))
        iterator.set_state(state)
    while True:
        batch = next(iterator)
        # As large as a batch of the others: rows, each with the last token of the one before.
        ids = np.append(batch["input_ids"], batch["labels"][-1])
        strided = np.lib.stride_tricks.sliding_window_view(ids, task.length + 1)[:: task.length]
        yield np.ascontiguousarray(strided)


def _put(state: Any, stream: dict[str, Any]) -> None:
    """Set the state of the stream inside that of the datasets built on it."""
    if isinstance(state, dict):
        for key, value in state.items():
            if key == "stream":
                state[key] = stream
            else:
                _put(value, stream)


def prepare_resume(task: Task) -> None:
    """Write the state of a stream that has read options[documents] documents to options[to]."""
    stream = datasets.load_dataset("json", data_files=task.shards, split="train", streaming=True)
    documents = iter(stream)
    for _ in range(int(task.options["documents"])):
        next(documents)
    Path(task.options["to"]).write_text(json.dumps(stream.state_dict()))
