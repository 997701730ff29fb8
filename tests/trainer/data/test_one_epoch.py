"""Whatever the layout and wherever it stops, an epoch is every document once, and shares are exact."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter, defaultdict
from contextlib import closing
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from configs.compose import compose
from configs.schema import Config
from trainer.data.blocks import Corpus
from trainer.data.damage import DamageReport
from trainer.data.listing import list_shards
from trainer.data.loader import Loader, Position
from trainer.data.order import Order
from trainer.data.shards import Reading
from trainer.data.texts import TextCorpus
from trainer.data.tokenizer import DocumentTokenizer

MOST_ROWS = 30_000


def write(root: Path, layout: dict[str, list[int]], lanes: int) -> dict[str, set[str]]:
    """Corpora with shards of `lanes` and some more documents, all different."""
    written: dict[str, set[str]] = {}
    for name, shards in layout.items():
        (root / name).mkdir()
        written[name] = set()
        for shard, more in enumerate(shards):
            texts = [f"{name}{shard}.{number}" for number in range(lanes + more)]
            written[name].update(texts)
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (root / name / f"{shard}.jsonl").write_text(lines)
    return written


def config_of(root: Path, weights: dict[str, float], *options: str) -> Config:
    corpora = [
        part
        for name, weight in weights.items()
        for part in (f"data.corpora.{name}.train={root}/{name}/*", f"data.corpora.{name}.weight={weight}")
    ]
    # Rows of one target in batches of one row: each row's epoch can be told.
    small = ["model.sequence_length=1", "global_batch=1", "micro_batch=1", "model.tokenizer=unused"]
    return compose(["data=local", "budget=tokens", "budget.tokens=1", *small, *corpora, *options])


def corpora_of(config: Config, tokenizer: DocumentTokenizer) -> dict[str, Corpus]:
    run = Path(os.devnull)
    report, reading = DamageReport(run, config.data.faults, 0), Reading.of(config.data, run)
    return {
        name: TextCorpus(
            list_shards(name, corpus.train or []),
            "text",
            config.data.shuffle_window,
            tokenizer,
            report,
            reading,
        )
        for name, corpus in config.data.corpora.items()
    }


@settings(max_examples=25)
@given(
    layout=st.dictionaries(
        st.sampled_from("abc"), st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1
    ),
    weights=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    lanes=st.integers(1, 5),
    window=st.sampled_from([1, 2, 5, 64]),
    workers=st.sampled_from([0, 2]),
    stops=st.lists(st.integers(1, 300), max_size=4),
)
def test_nothing_is_lost_or_doubled(
    tokenizer: DocumentTokenizer,
    layout: dict[str, list[int]],
    weights: list[int],
    lanes: int,
    window: int,
    workers: int,
    stops: list[int],
) -> None:
    shares = dict(zip(layout, map(float, weights), strict=False))
    with tempfile.TemporaryDirectory() as directory:
        written = write(Path(directory), layout, lanes)
        options = [f"data.lanes={lanes}", f"data.shuffle_window={window}", f"data.workers={workers}"]
        config = config_of(Path(directory), shares, *options)
        order = Order(config.data, 1, config.seed)
        streams = {(name, lane) for name in layout for lane in range(lanes)}
        read: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        dealt: Counter[str] = Counter()
        position, ends = Position(0, {}), [*sorted(set(stops)), MOST_ROWS]
        while streams and position.rows < MOST_ROWS:
            with closing(
                Loader(config, corpora_of(config, tokenizer), rank=0, world_size=1, position=position)
            ) as one:
                while streams and position.rows < ends[0]:
                    corpora, numbers = order.sources(position.rows, 1)
                    stream = (order.corpora[corpora[0]], int(numbers[0]))
                    batch = one.next_batch()
                    assert batch is not None
                    if not read[stream]:
                        read[stream].append(int(batch.rows[0, 0]))
                    position = batch.position
                    dealt[stream[0]] += 1
                    for name in layout:
                        due = position.rows * shares[name] / sum(shares.values())
                        assert abs(dealt[name] - due) < 1
                    if position.cursors[stream].epoch:  # the row's last token begins the next epoch
                        streams.discard(stream)
                    elif stream in streams:
                        read[stream].append(int(batch.rows[0, 1]))
            ends.pop(0)
        assert not streams
        for name, texts in written.items():
            found = [
                text
                for lane in range(lanes)
                for text in tokenizer.pretrained.decode(read[name, lane]).split("<|endoftext|>")[:-1]
            ]
            assert Counter(found) == Counter(texts)
