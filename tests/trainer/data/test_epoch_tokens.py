"""A run's corpora are those it began with; with budget=epochs, its length follows from counting one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import Site, write_shard

from configs.compose import compose
from configs.schema import Config, ConfigError
from trainer import corpora
from trainer.corpora import load_corpora, steps_of
from trainer.data.lanes import Cursor, Lane
from trainer.data.listing import list_shards
from trainer.data.shards import Reading, documents
from trainer.data.tokenizer import DocumentTokenizer
from trainer.data.workers import Workers
from trainer.distributed import World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"), dist.new_group(backend="gloo"))
    dist.destroy_process_group()


def config_of(site: Site, *more: str) -> Config:
    overrides = [text for text in site.overrides() if not text.startswith("budget")]
    return compose([*overrides, "budget=epochs", "budget.epochs=2", *more])


def test_the_corpus_with_the_largest_weight_is_read_as_often_as_asked(
    site: Site, world: World, tokenizer: DocumentTokenizer
) -> None:
    config = config_of(site)  # legal has weight 0.7
    loaded = load_corpora(site.root, config, world)
    shards, reading = list_shards("legal", [f"{site.root}/legal/train.*"]), Reading.of(config.data, site.root)
    texts = [text for shard in shards for _, text in documents(shard, "text", pytest.fail, reading)]
    tokens = len(tokenizer.encode(texts).ids)
    assert loaded.epoch_tokens == tokens
    rows = steps_of(config, loaded) * config.global_batch
    assert 0.7 * rows * config.model.sequence_length == pytest.approx(2 * tokens, rel=0.02)


def test_packed_rows_are_counted_with_their_padding(site: Site, world: World) -> None:
    config = config_of(site, "data.packing=best_fit", "model.sequence_length=40")
    loaded = load_corpora(site.root, config, world)
    rows, corpus = 0, loaded.train["legal"]
    for number in range(config.data.lanes):
        options = {"sequence_length": 40, "seed": 0, "cursor": Cursor(), "workers": Workers(0)}
        lane = Lane("legal", number, corpus, config.data, **options)
        while lane.mark.epoch == 0:
            lane.take(1)
            rows += 1
    assert loaded.epoch_tokens == pytest.approx(40 * rows, rel=0.03)


def test_a_long_count_that_meets_often_gives_the_same_number(
    site: Site, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for run, seconds in (("a", 60.0), ("b", 0.0)):
        monkeypatch.setattr(corpora, "MEET_SECONDS", seconds)
        (site.root / run).mkdir()
        counts.append(load_corpora(site.root / run, config_of(site), world).epoch_tokens)
    assert counts[0] == counts[1]


def test_a_count_is_kept_for_the_next_attempt(site: Site, world: World) -> None:
    load_corpora(site.root, config_of(site), world)
    (site.root / "epoch-tokens").write_text("12345")
    assert load_corpora(site.root, config_of(site), world).epoch_tokens == 12345


def test_a_shard_that_comes_later_does_not_join_a_run(site: Site, world: World) -> None:
    before = load_corpora(site.root, config_of(site), world)
    write_shard(site.root / "legal" / "train.00000a.json.gz", ["late"])
    after = load_corpora(site.root, config_of(site), world)
    assert after.train["legal"].addresses == before.train["legal"].addresses
    assert after.epoch_tokens == before.epoch_tokens


@pytest.mark.parametrize("change", ["gone", "other size"])
def test_a_shard_that_changed_since_the_run_began_ends_it(site: Site, world: World, change: str) -> None:
    load_corpora(site.root, config_of(site), world)
    shard = site.root / "legal" / "train.00001.json.gz"
    shard.unlink()
    if change == "other size":
        write_shard(shard, ["other text"])
    with pytest.raises(ConfigError, match=r"data\.faults\.changed=fail: .*legal/train\.00001"):
        load_corpora(site.root, config_of(site), world)


@pytest.mark.parametrize("budget", ["budget=tokens", "budget=flops"])
def test_nothing_is_counted_for_other_budgets(site: Site, world: World, budget: str) -> None:
    kind = budget.removeprefix("budget=")
    overrides = [text for text in site.overrides() if not text.startswith("budget")]
    config = compose([*overrides, budget, f"budget.{kind}=1000000"])
    assert load_corpora(site.root, config, world).epoch_tokens is None


def test_a_text_field_that_no_document_has_names_the_corpus_and_the_field(site: Site, world: World) -> None:
    with pytest.raises(ConfigError, match=r"data\.corpora\.legal\.validation: .*field body"):
        load_corpora(site.root, config_of(site, "data.corpora.legal.text_field=body"), world)


def test_an_empty_shard_is_told_and_left_out(site: Site, world: World, tmp_path: Path) -> None:
    (site.root / "legal" / "train.99999.json.gz").touch()
    loaded = load_corpora(tmp_path, config_of(site), world)
    assert len(loaded.train["legal"].addresses) == 2
    assert "empty file" in (tmp_path / "events.jsonl").read_text()
