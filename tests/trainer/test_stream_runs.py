"""What the stream tells a run, and what a run tells of its text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import Job, freeze, train_all
from support import Site, metrics, sentences, write_shard

from cluster import events
from configs.compose import compose
from configs.schema import ConfigError
from trainer.corpora import fingerprints
from trainer.data.damage import DamageReport
from trainer.data.sources import list_corpora
from trainer.data.tokenizer import load_tokenizer
from trainer.session import check_order

STEPS = 8
RUNS = {
    "plain": [f"checkpoint.every_steps={STEPS // 2}"],
    "masked": ["objective.mask_documents=true"],
    "packed": ["data.packing=best_fit", "model.sequence_length=64"],
    "long": ["budget.tokens=40000", "data.decontaminate=exact"],
    "other lanes": ["data.lanes=2"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Path, str]]:
    """A directory of runs, and the traceback of each that failed; some text is damaged or held out."""
    site = Site.create(tmp_path_factory.mktemp("runs"))
    held_out = sentences(3, 5000)
    write_shard(site.root / "general" / "train.00002.json.gz", [*sentences(30, 7000), *held_out])
    shard = site.root / "general" / "train.00003.jsonl"
    shard.write_text("".join(json.dumps({"text": text}) + "\n{damaged\n" for text in sentences(20, 8000)))
    jobs: list[Job] = []
    for name, options in RUNS.items():
        config = compose([*site.overrides(STEPS), *options])
        source = (site.root / "plain", STEPS // 2) if name == "other lanes" else (None, 0)
        jobs.append(freeze(config, site.root / name, *source))
    return site.root, train_all(jobs, 1)


def happened(run: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in events.read(run / "events.jsonl") if event["event"] == name]


def rows_of(runs: tuple[Path, dict[Path, str]], name: str) -> list[dict[str, Any]]:
    root, failures = runs
    assert root / name not in failures, failures[root / name]
    return metrics(root / name)


def test_masked_documents_change_the_loss_and_leave_out_their_first_tokens(
    runs: tuple[Path, dict[Path, str]],
) -> None:
    plain, masked = rows_of(runs, "plain")[0], rows_of(runs, "masked")[0]
    assert (plain["tokens"], plain["utilisation"]) == (8 * 16, 1)
    assert masked["tokens"] < 8 * 16
    assert masked["utilisation"] == pytest.approx(masked["tokens"] / (8 * 16))
    assert masked["loss"] != plain["loss"]


def test_padding_is_no_target(runs: tuple[Path, dict[Path, str]]) -> None:
    rows = rows_of(runs, "packed")
    assert 0.8 < rows[-1]["utilisation"] < 1
    shares = [row["utilisation"] for row in rows]
    assert rows[-1]["tokens"] == round(sum(shares) * 8 * 64)


def test_each_time_a_corpus_begins_again_is_told_once(runs: tuple[Path, dict[Path, str]]) -> None:
    assert rows_of(runs, "long")
    told = [(event["corpus"], event["epoch"]) for event in happened(runs[0] / "long", "epoch")]
    assert len(told) == len(set(told)) >= 3
    assert {corpus for corpus, _ in told} == {"general", "legal"}
    for corpus in ("general", "legal"):
        epochs = [epoch for name, epoch in told if name == corpus]
        assert epochs == list(range(1, len(epochs) + 1))


def test_what_was_left_out_is_counted(runs: tuple[Path, dict[Path, str]]) -> None:
    rows_of(runs, "long")
    [skipped] = happened(runs[0] / "long", "skipped")
    assert skipped["document"] >= 20
    [dropped] = happened(runs[0] / "long", "decontaminated")
    assert (dropped["corpus"], dropped["ngram"]) == ("general", 0)
    assert dropped["exact"] >= 3


def test_a_checkpoint_is_not_resumed_in_another_order(runs: tuple[Path, dict[Path, str]]) -> None:
    root, failures = runs
    assert "ConfigError: data.lanes=2: the checkpoint's rows follow from 4" in failures[root / "other lanes"]


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("seed=1", "seed"),
        ("model.sequence_length=17", "model.sequence_length"),
        ("data.lanes=5", "data.lanes"),
        ("data.shuffle_window=17", "data.shuffle_window"),
        ("data.packing=best_fit", "data.packing"),
        ("data.temperature=2", "data.temperature"),
        ("data.decontaminate=exact", "data.decontaminate"),
        ("data.stages=[{weights:{legal:1}}]", "data.stages"),
        ("data.corpora.legal.weight=0.6", "data.corpora.legal.weight"),
        ("data.corpora.legal.text_field=body", "data.corpora.legal.text_field"),
    ],
)
def test_what_the_order_follows_from_is_named_when_it_changes(site: Site, option: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}="):
        check_order(decided(site), decided(site, option))


def test_another_tokenizer_or_other_shards_are_named(site: Site) -> None:
    then, held_out = decided(site), decided(site, "data.decontaminate=exact")
    file = site.root / "tokenizer" / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["merges"].pop()
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"^model\.tokenizer="):
        check_order(then, decided(site))

    write_shard(site.root / "legal" / "train.00009.json.gz", ["more"])
    with pytest.raises(ConfigError, match=r"^data\.corpora\.legal\.train="):
        check_order(
            decided(site) | {"data.corpora.legal.train": then["data.corpora.legal.train"]}, decided(site)
        )
    write_shard(site.root / "legal" / "validation.00009.json.gz", ["more"])
    now = decided(site, "data.decontaminate=exact")
    key = "data.corpora.legal.validation"
    with pytest.raises(ConfigError, match=r"^data\.corpora\.legal\.validation="):
        check_order(now | {key: held_out[key]}, now)


def decided(site: Site, *options: str) -> dict[str, Any]:
    config = compose([*site.overrides(), *options])
    shards = list_corpora(config.data, DamageReport(site.root, config.data.faults, 0))
    return fingerprints(config, *shards, load_tokenizer(config.model))
