"""Faults in the text: told once in RUN/events.jsonl, or the end of the run."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster import events
from configs.schema import ConfigError
from configs.text import Faults

MOST_PER_SHARD = 100
"""Damaged documents of a shard that are told one by one; a wrong text_field damages all of them."""


@dataclass(frozen=True)
class Damage:
    """What is wrong with a shard: at a document, or for the other kinds from a document on."""

    kind: Literal["document", "shard", "changed", "store"]
    """The key under data.faults that says what it does."""
    shard: str
    document: int
    reason: str


class DamagedShard(ConfigError):
    """A fault whose policy is fail."""


class Unavailable(RuntimeError):
    """Text does not come, for a reason that may have passed by the next attempt."""


class DamageReport:
    """Called with each damage, by any thread: records it once, or raises DamagedShard, or Unavailable for one
    of a store."""

    def __init__(self, run: Path, faults: Faults, rank: int, silent: bool = False) -> None:
        self._run = run
        self._faults = faults
        self._rank = rank
        self._silent = silent
        self._lock = threading.Lock()
        self.skipped: Counter[str] = Counter()
        """Faults by kind; what is read again counts again."""
        self._told: defaultdict[str, set[tuple[str, int]]] = defaultdict(set)

    def __call__(self, damage: Damage) -> None:
        if getattr(self._faults, damage.kind) == "fail":
            error = Unavailable if damage.kind == "store" else DamagedShard
            raise error(
                f"data.faults.{damage.kind}=fail: {damage.shard}, document {damage.document}: {damage.reason}"
            )
        single = damage.kind == "document"
        place = (damage.kind, damage.document if single else -1)
        with self._lock:
            self.skipped[damage.kind] += 1
            told = self._told[damage.shard]
            if self._silent or place in told or (single and len(told) >= MOST_PER_SHARD):
                return
            told.add(place)
        fields = vars(damage) | {"rest_lost": not single}
        if single and len(told) == MOST_PER_SHARD:
            fields["reason"] = f"{damage.reason}; further damaged documents are not listed"
        events.record(self._run, "data_damage", rank=self._rank, **fields)
