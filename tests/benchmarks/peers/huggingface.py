"""Hugging Face datasets, streaming: batches of 1,000 documents are tokenized and grouped, as its run_clm
does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from peers.task import Task

DOCUMENTS, BUFFER = 1_000, 1_000


def streaming(task: Task) -> Iterator[NDArray[np.int32]]:
    """options: workers of the DataLoader; shuffled=no for one that can be resumed exactly."""
    stream = _rows(task)
    if task.state:
        stream.load_state_dict(json.loads(Path(task.state).read_text()))
    workers = int(task.options["workers"])
    epoch = 0
    while True:
        stream.set_epoch(epoch)
        yield from DataLoader(stream, task.rows, num_workers=workers, collate_fn=_stack, drop_last=True)
        epoch += 1


def _rows(task: Task, encoded: bool = True) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(task.tokenizer)
    stream = datasets.load_dataset("json", data_files=task.shards, split="train", streaming=True)
    if task.options["shuffled"] == "yes":
        stream = stream.shuffle(seed=0, buffer_size=BUFFER)
    size = task.length + 1

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        if not encoded:
            return {"row": [[0]]}
        flat: list[int] = []
        for ids in tokenizer(batch["text"], add_special_tokens=False)["input_ids"]:
            flat += ids
            flat.append(tokenizer.eos_token_id)
        return {"row": [flat[first : first + size] for first in range(0, len(flat) - size + 1, size)]}

    names = ["text", "timestamp", "url"]
    return stream.map(encode, batched=True, batch_size=DOCUMENTS, remove_columns=names)


def _stack(samples: list[dict[str, Any]]) -> NDArray[np.int32]:
    return np.array([sample["row"] for sample in samples], dtype=np.int32)


def prepare_resume(task: Task) -> None:
    """Write the state after options[documents] documents to options[to].

    The stream is the pipeline's own, but each batch of documents becomes one short row.
    """
    stream = _rows(task, encoded=False)
    rows = iter(stream)
    for _ in range(int(task.options["documents"]) // DOCUMENTS):
        next(rows)
    Path(task.options["to"]).write_text(json.dumps(stream.state_dict()))
