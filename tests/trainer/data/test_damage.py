"""Damage is told once in events.jsonl, or ends the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster import events
from configs.schema import ConfigError
from trainer.data.damage import MOST_PER_SHARD, Damage, DamagedShard, DamageReport


def told(run: Path) -> list[dict[str, Any]]:
    return [event for event in events.read(run / "events.jsonl") if event["event"] == "data_damage"]


def test_each_damage_is_recorded_once(tmp_path: Path) -> None:
    report = DamageReport(tmp_path, "skip", rank=3)
    for _ in range(2):
        report(Damage("a.jsonl", 7, "not JSON", rest_lost=False))
        report(Damage("b.json.gz", 9, "cut short", rest_lost=True))
        report(Damage("b.json.gz", 8, "cut short", rest_lost=True))  # as another lane of the shard sees it
    fields = ("shard", "document", "reason", "rest_lost", "rank")
    assert [tuple(event[field] for field in fields) for event in told(tmp_path)] == [
        ("a.jsonl", 7, "not JSON", False, 3),
        ("b.json.gz", 9, "cut short", True, 3),
    ]


def test_a_shard_of_damaged_documents_does_not_flood_the_events(tmp_path: Path) -> None:
    report = DamageReport(tmp_path, "skip", rank=0)
    for document in range(10 * MOST_PER_SHARD):
        report(Damage("a.jsonl", document, "no field text", rest_lost=False))
    report(Damage("a.jsonl", document, "cut short", rest_lost=True))
    assert len(told(tmp_path)) == MOST_PER_SHARD + 1
    assert "further damaged documents are not listed" in told(tmp_path)[-2]["reason"]


def test_with_fail_damage_ends_the_run_and_names_shard_and_document(tmp_path: Path) -> None:
    report = DamageReport(tmp_path, "fail", rank=0)
    with pytest.raises(DamagedShard, match=r"data\.on_corrupt=fail: a\.jsonl, document 7: not JSON"):
        report(Damage("a.jsonl", 7, "not JSON", rest_lost=False))
    assert issubclass(DamagedShard, ConfigError)  # input is bad: such a run is never retried


def test_ranks_that_read_the_same_file_leave_the_telling_to_one(tmp_path: Path) -> None:
    DamageReport(tmp_path, "skip", rank=1, silent=True)(Damage("a.jsonl", 7, "not JSON", rest_lost=False))
    assert told(tmp_path) == []
