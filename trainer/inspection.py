"""What a run's text is: counted or estimated, and set against the budget."""

from __future__ import annotations

import math
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress, TaskID

from configs.schema import Config, ConfigError
from trainer.data import census
from trainer.data.census import Counted
from trainer.data.damage import Damage
from trainer.data.decontaminate import Decontamination, HeldOut
from trainer.data.lanes import Cursor, Lane
from trainer.data.listing import Shard, list_shards
from trainer.data.order import Order
from trainer.data.packing import PADDING
from trainer.data.shards import Reading, documents
from trainer.data.sources import first_texts
from trainer.data.texts import TextCorpus
from trainer.data.tokenizer import choose_engine, load_tokenizer
from trainer.data.workers import Workers

ALMOST_FREE_EPOCHS = 4
"""Up to so many passes repeated text is worth almost as much as new text (Muennighoff et al. 2023)."""
LOOSE = 0.05
"""Error of an estimate from which on counting is advised."""
EXAMPLES = 3
CLOSE_SECONDS = 1.0


class Faults:
    """Faults that were met, by corpus and kind; none of them ends an inspection. Threads may share it."""

    def __init__(self) -> None:
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.examples: defaultdict[str, list[str]] = defaultdict(list)
        self._met: dict[tuple[str, str, str], int] = {}
        """By corpus, shard and kind, the last document: shards are read in order, some a second time."""
        self._lock = threading.Lock()

    def __call__(self, corpus: str, damage: Damage) -> None:
        with self._lock:
            place = corpus, damage.shard, damage.kind
            if damage.document <= self._met.get(place, -1):  # seen again where the sample row is read
                return
            self._met[place] = damage.document
            self.counts[corpus][damage.kind] += 1
            if len(self.examples[corpus]) < EXAMPLES:
                self.examples[corpus].append(f"{damage.shard}, document {damage.document}: {damage.reason}")


class Inspection:
    """A run's text, read as training would read it."""

    def __init__(self, config: Config, scratch: Path, progress: Progress, *, exact: bool) -> None:
        """List shards, load the tokenizer, read held-out documents. Raises ConfigError naming a key.

        exact: read everything, whatever the size; a sample goes past the cache, which keeps whole shards.
        """
        self._config = config
        self._exact = exact
        self._reading = Reading(config.data.retry)
        if exact:
            self._reading = replace(Reading.of(config.data, scratch), indexes=None)
        self._progress = progress
        task = progress.add_task("shards and tokenizer", total=None)
        self._faults = Faults()
        self._order = Order(config.data, config.model.sequence_length, config.seed)
        self._shards = {name: self._list(name, "train") for name in self._order.corpora}
        self._tokenizer, self._engine_reason = choose_engine(
            load_tokenizer(config.model),
            config.data.engine,
            first_texts(config.data, self._shards, self._reading),
        )
        progress.remove_task(task)
        self._clean = self._decontamination()

    def run(self) -> dict[str, Any]:
        """All there is to say, as JSON values."""
        corpora = self._count()
        dropped = self._clean.dropped() if self._clean else {}
        tokens = self._budget_tokens(corpora)
        row_tokens = self._config.model.sequence_length
        steps = max(1, math.ceil(tokens / (self._config.global_batch * row_tokens)))
        total = steps * self._config.global_batch
        warnings = []
        for name, rows in self._order.rows_of(total).items():
            corpus = corpora[name]
            drawn = rows * row_tokens
            repeats = drawn / corpus["tokens"] if corpus["tokens"] else None
            corpus |= {"share": rows / total, "rows": rows, "tokens_drawn": drawn, "repeats": repeats}
            corpus["dropped"] = dropped.get(name, {"exact": 0, "ngram": 0})
            try:
                corpus["sample_row"] = self._sample_row(name)
            except ConfigError as error:
                corpus["sample_row"] = []
                warnings.append(f"training would end: {error}")
            corpus["faults"] = dict(self._faults.counts[name])
            corpus["fault_examples"] = self._faults.examples[name]
            warnings += self._warnings(name, corpus)
        return {
            "tokenizer": {"engine": self._tokenizer.engine, "why_not_faster": self._engine_reason},
            "decontaminate": self._config.data.decontaminate,
            "budget": {"kind": self._config.budget.kind, "tokens": tokens, "steps": steps, "rows": total},
            "corpora": corpora,
            "stages": self._stages(total),
            "warnings": warnings,
        }

    def _list(self, name: str, split: str) -> list[Shard]:
        patterns = getattr(self._config.data.corpora[name], split)
        return list_shards(f"data.corpora.{name}.{split}", patterns)

    def _texts(self, name: str, shards: Sequence[Shard]) -> Iterator[str]:
        field = self._config.data.corpora[name].text_field
        for shard in shards:
            for _, text in documents(shard, field, partial(self._faults, name), self._reading):
                yield text

    def _decontamination(self) -> Decontamination | None:
        kind = self._config.data.decontaminate
        if kind == "none":
            return None
        texts = (
            text
            for name, corpus in self._config.data.corpora.items()
            if corpus.validation
            for text in self._texts(name, self._list(name, "validation"))
        )
        tracked = self._progress.track(texts, total=math.inf, description="held-out documents")
        return Decontamination(HeldOut.of(tracked, kind))

    def _count(self) -> dict[str, dict[str, Any]]:
        """Sizes of each corpus. Several shards are read at a time."""
        workers = Workers(os.cpu_count() or 1)
        begun: dict[str, list[tuple[Shard, Future[Counted]]]] = {}
        for name, shards in self._shards.items():
            whole = self._exact or sum(shard.size_bytes or 0 for shard in shards) <= census.WHOLE_BYTES
            chosen = shards if whole else census.sampled(shards)
            most = math.inf if whole else census.SAMPLED_TEXT_BYTES
            task = self._progress.add_task(name, total=len(chosen))
            calls = [partial(self._count_shard, name, shard, most, task) for shard in chosen]
            begun[name] = [(shard, workers.submit(call)) for shard, call in zip(chosen, calls, strict=True)]
        counts = {
            name: [(shard, future.result()) for shard, future in futures] for name, futures in begun.items()
        }
        workers.close()
        return {name: self._sizes(self._shards[name], counted) for name, counted in counts.items()}

    def _count_shard(self, name: str, shard: Shard, most_text_bytes: float, task: TaskID) -> Counted:
        counted = census.count(
            shard,
            self._config.data.corpora[name].text_field,
            self._tokenizer,
            self._reading,
            on_damage=partial(self._faults, name),
            kept=None if self._clean is None else partial(self._clean.kept, name),
            most_text_bytes=most_text_bytes,
        )
        self._progress.advance(task)
        return counted

    def _sizes(self, shards: list[Shard], counts: list[tuple[Shard, Counted]]) -> dict[str, Any]:
        sizes = [shard.size_bytes for shard in shards]
        size_bytes = None if None in sizes else sum(size or 0 for size in sizes)
        found = {
            key: census.estimate(counts, shards, attrgetter(key))
            for key in ("documents", "text_bytes", "tokens")
        }
        read = {key: sum(getattr(counted, key) for _, counted in counts) for key in found}
        counted = len(counts) == len(shards) and all(part.share == 1 for _, part in counts)
        return {
            "shards": len(shards),
            "bytes": size_bytes,
            "counted": counted,
            "read": {"shards": len(counts), **read},
            **{key: estimate.value for key, estimate in found.items()},
            **{f"{key}_error": estimate.error for key, estimate in found.items()},
            "tokens_per_document": _ratio(found["tokens"].value, found["documents"].value),
            "bytes_per_token": _ratio(found["text_bytes"].value, found["tokens"].value),
        }

    def _budget_tokens(self, corpora: dict[str, dict[str, Any]]) -> int:
        """Tokens of the run; of an epoch budget, until the heaviest corpus has been read so often."""
        budget, weights = self._config.budget, self._config.data.corpora
        if budget.tokens is not None:
            return budget.tokens
        if budget.epochs is None:
            raise ConfigError(f"budget={budget.kind}: must be resolved to tokens or epochs")
        name = min(corpora, key=lambda name: (-weights[name].weight, name))
        length = self._config.model.sequence_length
        wanted = math.ceil(budget.epochs * int(corpora[name]["tokens"]) / length)
        return census.rows_for(self._order, name, wanted) * length

    def _stages(self, rows: int) -> list[dict[str, Any]]:
        """Shares of the corpora in each stage that the run reaches, as rows are dealt."""
        stages, length = self._config.data.stages, self._config.model.sequence_length
        ends = [rows if stage.until_tokens is None else -(-stage.until_tokens // length) for stage in stages]
        dealt = [self._order.rows_of(min(end, rows)) for end in (0, *ends)]
        return [
            {
                "until_tokens": stage.until_tokens,
                "rows": sum(after.values()) - sum(before.values()),
                "shares": {
                    name: _ratio(after[name] - before[name], sum(after.values()) - sum(before.values()))
                    for name in after
                },
            }
            for stage, (before, after) in zip(stages, pairwise(dealt), strict=True)
        ]

    def _sample_row(self, name: str) -> list[str]:
        """The first row of the corpus's first lane, cut where documents end. Raises ConfigError."""
        data = self._config.data
        corpus = TextCorpus(
            [shard for shard in self._shards[name] if shard.size_bytes != 0],
            data.corpora[name].text_field,
            data.shuffle_window,
            self._tokenizer,
            partial(self._faults, name),
            self._reading,
            None if self._clean is None else partial(self._clean.kept, name),
        )
        lane = Lane(
            name,
            0,
            corpus,
            data,
            sequence_length=self._config.model.sequence_length,
            seed=self._config.seed,
            cursor=Cursor(),
            workers=Workers(0),
        )
        row = lane.take(1)[0][0]
        lane.close(CLOSE_SECONDS)
        row = row[row != PADDING]
        borders = np.flatnonzero(row == self._tokenizer.end_of_document) + 1
        decode = self._tokenizer.pretrained.decode
        return [str(decode(part)) for part in np.split(row, borders) if len(part)]

    def _warnings(self, name: str, corpus: dict[str, Any]) -> Iterator[str]:
        if not corpus["tokens"]:
            yield f"{name}: no readable text in field {self._config.data.corpora[name].text_field}"
        if (corpus["repeats"] or 0) > ALMOST_FREE_EPOCHS:
            yield (
                f"{name}: is read {corpus['repeats']:.1f} times; beyond {ALMOST_FREE_EPOCHS} times repeats "
                "are worth less and less (Muennighoff et al. 2023)"
            )
        if (corpus["tokens_error"] or 0) > LOOSE:
            yield f"{name}: its shards differ, so that tokens are uncertain; --exact counts them"
        for kind, count in corpus["faults"].items():
            if getattr(self._config.data.faults, kind) == "fail":
                yield f"{name}: data.faults.{kind}=fail, and {count} such were met: training would end there"


def _ratio(value: float, by: float) -> float | None:
    return value / by if by else None
