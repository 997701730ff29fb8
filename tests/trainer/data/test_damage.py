"""Damage is told once in events.jsonl, or ends the run, as the policy for its kind says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from cluster import events
from configs.schema import ConfigError
from configs.text import Faults
from trainer.data.damage import MOST_PER_SHARD, Damage, DamagedShard, DamageReport, Unavailable

Kind = Literal["document", "shard", "changed", "store"]
KINDS: tuple[Kind, ...] = ("document", "shard", "changed", "store")
SKIP = Faults(document="skip", shard="skip", changed="skip", store="skip")


def told(run: Path) -> list[dict[str, Any]]:
    return [event for event in events.read(run / "events.jsonl") if event["event"] == "data_damage"]


def test_each_damage_is_recorded_once(tmp_path: Path) -> None:
    report = DamageReport(tmp_path, SKIP, rank=3)
    for _ in range(2):
        report(Damage("document", "a.jsonl", 7, "not JSON"))
        report(Damage("shard", "b.json.gz", 9, "cut short"))
        report(Damage("shard", "b.json.gz", 8, "cut short"))  # as another lane of the shard sees it
        report(Damage("store", "b.json.gz", 8, "gone"))
    fields = ("kind", "shard", "document", "reason", "rest_lost", "rank")
    assert [tuple(event[field] for field in fields) for event in told(tmp_path)] == [
        ("document", "a.jsonl", 7, "not JSON", False, 3),
        ("shard", "b.json.gz", 9, "cut short", True, 3),
        ("store", "b.json.gz", 8, "gone", True, 3),
    ]


def test_a_shard_of_damaged_documents_does_not_flood_the_events(tmp_path: Path) -> None:
    report = DamageReport(tmp_path, SKIP, rank=0)
    for document in range(10 * MOST_PER_SHARD):
        report(Damage("document", "a.jsonl", document, "no field text"))
    report(Damage("shard", "a.jsonl", document, "cut short"))
    assert len(told(tmp_path)) == MOST_PER_SHARD + 1
    assert "further damaged documents are not listed" in told(tmp_path)[-2]["reason"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["skip", "fail"])
def test_the_policy_of_a_kind_is_its_own(tmp_path: Path, kind: Kind, policy: str) -> None:
    others = {other: "skip" if policy == "fail" else "fail" for other in KINDS if other != kind}
    report = DamageReport(tmp_path, Faults.model_validate(others | {kind: policy}), rank=0)
    if policy == "skip":
        report(Damage(kind, "a.jsonl", 7, "broken"))
        assert [event["kind"] for event in told(tmp_path)] == [kind]
        return
    # Bad input is never retried; a store may be back at the next attempt.
    error = Unavailable if kind == "store" else DamagedShard
    with pytest.raises(error, match=rf"data\.faults\.{kind}=fail: a\.jsonl, document 7: broken"):
        report(Damage(kind, "a.jsonl", 7, "broken"))
    assert issubclass(DamagedShard, ConfigError)
    assert not issubclass(Unavailable, ConfigError)


def test_ranks_that_read_the_same_file_leave_the_telling_to_one(tmp_path: Path) -> None:
    DamageReport(tmp_path, SKIP, rank=1, silent=True)(Damage("document", "a.jsonl", 7, "not JSON"))
    assert told(tmp_path) == []
