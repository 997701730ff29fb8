"""One list of rows, whatever the cluster looks like, however often it stops, from text or from tokens."""

from __future__ import annotations

import hashlib
import json
import os
import random
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support import Site

from configs.compose import compose
from configs.schema import Config
from trainer.data.blocks import Corpus
from trainer.data.damage import DamageReport
from trainer.data.listing import list_shards
from trainer.data.loader import Loader, Position
from trainer.data.order import Order
from trainer.data.shards import Reading
from trainer.data.texts import TextCorpus
from trainer.data.tokenized import TokenizedCorpus
from trainer.data.tokenizer import DocumentTokenizer

ROWS = 2016
"""Some epochs of both corpora; a multiple of every batch."""
INTERRUPTIONS = 7


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Two corpora as text and as tokens."""
    site = Site.create(tmp_path_factory.mktemp("site"))
    tokenized = site.trainyard("tokenize", *site.overrides(), f"data.tokenized={site.root / 'tokens'}")
    assert tokenized.returncode == 0, tokenized.stderr
    return site


def config_of(site: Site, packing: str, *more: str) -> Config:
    return compose([*site.overrides(), f"data.packing={packing}", "data.lanes=8", *more])


def corpora_of(config: Config, tokenizer: DocumentTokenizer) -> dict[str, Corpus]:
    run, found = Path(os.devnull), dict[str, Corpus]()
    for name, corpus in config.data.corpora.items():
        shards = list_shards(f"data.corpora.{name}.train", corpus.train or [])
        if config.data.tokenized:
            found[name] = TokenizedCorpus.open(config.data, name, shards, {}, tokenizer)
        else:
            report, reading = DamageReport(run, config.data.faults, 0), Reading.of(config.data, run)
            found[name] = TextCorpus(shards, "text", config.data.shuffle_window, tokenizer, report, reading)
    return found


def hashes(
    config: Config, tokenizer: DocumentTokenizer, world_size: int, stops: list[int]
) -> tuple[list[str], Position]:
    """A hash of each row in the run's order; the run is stopped and resumed before the batches in `stops`."""
    order = Order(config.data, config.model.sequence_length, config.seed)
    count, position = config.global_batch, Position(0, {})
    found: list[str] = []
    borders = [0, *sorted(stops), ROWS // count]
    for begin, end in pairwise(borders):
        corpora = corpora_of(config, tokenizer)
        with ExitStack() as stack:
            loaders = [
                stack.enter_context(
                    closing(Loader(config, corpora, rank=rank, world_size=world_size, position=position))
                )
                for rank in range(world_size)
            ]
            for _ in range(begin, end):
                rows = np.empty((count, config.model.sequence_length + 1), np.int32)
                batches = [loader.next_batch() for loader in loaders]
                for rank, batch in enumerate(batches):
                    assert batch is not None
                    own = order.rows_of_rank(position.rows, count, rank, world_size)
                    rows[own - position.rows] = batch.rows
                position = Position.merged([batch.position for batch in batches if batch is not None])
                found += [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in rows]
        position = Position.from_json(json.loads(json.dumps(position.to_json())))
    return found, position


@pytest.fixture(scope="module")
def reference(site: Site, tokenizer: DocumentTokenizer) -> dict[str, tuple[list[str], Position]]:
    """Uninterrupted, on one rank, without threads, from text."""
    return {
        packing: hashes(config_of(site, packing, "data.workers=0"), tokenizer, 1, [])
        for packing in ("concatenate", "best_fit")
    }


@pytest.mark.parametrize("source", ["text", "tokenized"])
@pytest.mark.parametrize("global_batch", [8, 32])
@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_rows_are_the_same(
    site: Site,
    tokenizer: DocumentTokenizer,
    reference: dict[str, tuple[list[str], Position]],
    packing: str,
    world_size: int,
    workers: int,
    global_batch: int,
    source: str,
) -> None:
    options = [f"data.workers={workers}", f"global_batch={global_batch}", "micro_batch=1"]
    if source == "tokenized":
        options.append(f"data.tokenized={site.root / 'tokens'}")
    chance = random.Random(f"{world_size} {workers} {global_batch} {source}")
    stops = chance.sample(range(1, ROWS // global_batch), INTERRUPTIONS)
    found, position = hashes(config_of(site, packing, *options), tokenizer, world_size, stops)
    expected, end = reference[packing]
    assert found == expected
    assert {key: cursor._replace(offset=0) for key, cursor in position.cursors.items()} == {
        key: cursor._replace(offset=0) for key, cursor in end.cursors.items()
    }


def test_a_run_may_go_on_with_tokens_instead_of_text(
    site: Site, tokenizer: DocumentTokenizer, reference: dict[str, tuple[list[str], Position]]
) -> None:
    expected, _ = reference["concatenate"]
    options = [f"data.tokenized={site.root / 'tokens'}"]
    text, tokens = config_of(site, "concatenate"), config_of(site, "concatenate", *options)
    position = Position(0, {})
    for config, begin in ((text, 0), (tokens, 64), (text, 128), (tokens, 192)):
        with closing(
            Loader(config, corpora_of(config, tokenizer), rank=0, world_size=1, position=position)
        ) as one:
            for first in range(begin, begin + 64, 8):
                batch = one.next_batch()
                assert batch is not None
                rows = [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in batch.rows]
                assert rows == expected[first : first + 8]
                position = batch.position
