"""Damaged documents and shards: told once in RUN/events.jsonl, or the end of the run."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster import events
from configs.schema import ConfigError

MOST_PER_SHARD = 100
"""Damaged documents of a shard that are told one by one; a wrong text_field damages all of them."""


@dataclass(frozen=True)
class Damage:
    """What is wrong with a shard: at a document, or from a document on."""

    shard: str
    document: int
    reason: str
    rest_lost: bool


class DamagedShard(ConfigError):
    """A damaged document or shard under data.on_corrupt=fail."""


class DamageReport:
    """Called with each damage: records it once, or raises DamagedShard."""

    def __init__(
        self, run: Path, on_corrupt: Literal["skip", "fail"], rank: int, silent: bool = False
    ) -> None:
        self._run = run
        self._on_corrupt = on_corrupt
        self._rank = rank
        self._silent = silent
        self._told: defaultdict[str, set[int]] = defaultdict(set)

    def __call__(self, damage: Damage) -> None:
        if self._on_corrupt == "fail":
            raise DamagedShard(
                f"data.on_corrupt=fail: {damage.shard}, document {damage.document}: {damage.reason}"
            )
        told = self._told[damage.shard]
        document = -1 if damage.rest_lost else damage.document
        if self._silent or document in told or (len(told) >= MOST_PER_SHARD and not damage.rest_lost):
            return
        told.add(document)
        fields = vars(damage)
        if len(told) == MOST_PER_SHARD and not damage.rest_lost:
            fields = fields | {"reason": f"{damage.reason}; further damaged documents are not listed"}
        events.record(self._run, "data_damage", rank=self._rank, **fields)
