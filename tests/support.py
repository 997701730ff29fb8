"""What several tests need: small corpora, a small tokenizer, and runs started as a user starts them."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster import events

VOCABULARY = 320
SEQUENCE_LENGTH = 16


def sentences(count: int, start: int = 0) -> list[str]:
    """Texts that are all different and differ in length."""
    return [
        f"Document {number} speaks of "
        + " and ".join(f"thing {number * k % 97}" for k in range(1, 3 + number % 9))
        for number in range(start, start + count)
    ]


def write_shard(path: Path, texts: Iterable[str]) -> Path:
    """A C4-shaped shard: gzip'd json lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            row = {"text": text, "timestamp": "2020-01-01T00:00:00Z", "url": f"test://{path.stem}/{number}"}
            file.write(json.dumps(row) + "\n")
    return path


def write_tokenizer(directory: Path) -> Path:
    """A byte-level BPE tokenizer with <|endoftext|> as end of document, VOCABULARY ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(200), trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@dataclass(frozen=True)
class Site:
    """A user's directory: two corpora, a tokenizer, and the overrides of a run that takes seconds."""

    root: Path

    @classmethod
    def create(cls, root: Path) -> Site:
        write_tokenizer(root / "tokenizer")
        for corpus, start in (("general", 0), ("legal", 10_000)):
            for shard in range(2):
                write_shard(
                    root / corpus / f"train.{shard:05d}.json.gz", sentences(200, start + 1000 * shard)
                )
            write_shard(root / corpus / "validation.00000.json.gz", sentences(40, start + 5000))
        return cls(root)

    def overrides(self, steps: int = 8, global_batch: int = 8) -> list[str]:
        return [
            "model=llama-demo",
            f"model.tokenizer={self.root / 'tokenizer'}",
            "model.layers=2",
            "model.hidden=32",
            "model.heads=2",
            "model.ffn=64",
            f"model.vocabulary={VOCABULARY}",
            f"model.sequence_length={SEQUENCE_LENGTH}",
            "budget=tokens",
            f"budget.tokens={steps * global_batch * SEQUENCE_LENGTH}",
            "data=local",
            f"data.corpora.general.train={self.root / 'general'}/train.*",
            f"data.corpora.general.validation={self.root / 'general'}/validation.*",
            "data.corpora.general.weight=0.3",
            f"data.corpora.legal.train={self.root / 'legal'}/train.*",
            f"data.corpora.legal.validation={self.root / 'legal'}/validation.*",
            "data.corpora.legal.weight=0.7",
            "data.lanes=4",
            "data.shuffle_window=16",
            "precision=fp32",
            "optimizer.lr=1e-2",
            f"global_batch={global_batch}",
            "micro_batch=2",
            "log_every_steps=1",
            "run.export=false",
            f"run.directory={self.root / 'run'}",
        ]

    def trainyard(self, *arguments: str, timeout_seconds: float = 240) -> subprocess.CompletedProcess[str]:
        """Run the program as a user would, in this directory."""
        return subprocess.run(
            [sys.executable, "-P", "-m", "launcher", *arguments],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the program and go on while it runs."""
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "launcher", *arguments],
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"XDG_STATE_HOME": str(self.root / "state"), "HF_HUB_OFFLINE": "1"}


def metrics(run: Path) -> list[dict[str, Any]]:
    """Training rows of a run."""
    return [row for row in events.read(run / "metrics.jsonl") if "loss" in row]


def event_names(run: Path) -> list[str]:
    return [event["event"] for event in events.read(run / "events.jsonl")]
