"""What all pipelines are given, and what a process reports of one. Needs nothing but the standard library."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Pipeline:
    """One row of a table."""

    label: str
    function: str
    """MODULE:FUNCTION in this package."""
    needs: str = ""
    """Module that must be importable; empty for ours and those written by hand, which need only our
    environment."""
    options: dict[str, str] = field(default_factory=dict)
    prepare: str = ""
    """Function of the same module that writes what the pipeline reads, once; empty if it reads the shards."""


@dataclass(frozen=True)
class Task:
    """The same text, row shape and threads for every pipeline."""

    shards: list[str]
    """C4-shaped: json lines with text, timestamp and url, as gzip."""
    tokenizer: str
    """Hugging Face directory."""
    work: str
    """Directory for what is written."""
    rows: int = 64
    """Of a global batch."""
    length: int = 2048
    """Targets of a row; rows have one more token."""
    threads: int = 2
    state: str = ""
    """File that tells where to resume; empty for the beginning."""
    options: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        return cls(**json.loads(text))
