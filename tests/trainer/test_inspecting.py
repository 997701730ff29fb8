"""`trainyard data inspect`: how much text there is, how often a run reads it, and what is wrong with it."""

from __future__ import annotations

import json
import tracemalloc
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress
from support import SEQUENCE_LENGTH, Site, sentences, write_shard

from configs.compose import compose
from configs.section import printable
from trainer.corpora import steps_of
from trainer.data import census
from trainer.data.damage import Damage
from trainer.data.tokenizer import load_tokenizer
from trainer.inspecting import render
from trainer.inspection import Faults, Inspection


def inspect(site: Site, *overrides: str, exact: bool = False) -> dict[str, Any]:
    config = compose([*site.overrides(), *overrides])
    report = Inspection(config, site.root, Progress(disable=True), exact=exact).run()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    return report


def shown(report: dict[str, Any], width: int = 100) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(render(report))
    return capture.get()


def tokens_of(site: Site, texts: list[str]) -> int:
    tokenizer = load_tokenizer(compose(site.overrides()).model)
    return sum(map(len, tokenizer.encode_stream(texts)))


def test_sizes_are_those_of_the_text(site: Site) -> None:
    legal = inspect(site)["corpora"]["legal"]
    texts = sentences(200, 10_000) + sentences(200, 11_000)
    files = list((site.root / "legal").glob("train.*"))
    assert (legal["shards"], legal["counted"], legal["documents"]) == (2, True, 400)
    assert legal["bytes"] == sum(file.stat().st_size for file in files)
    assert legal["tokens"] == tokens_of(site, texts)
    assert legal["text_bytes"] == sum(len(text) for text in texts)
    assert legal["tokens_error"] == legal["documents_error"] == 0
    assert legal["bytes_per_token"] == legal["text_bytes"] / legal["tokens"]
    assert legal["faults"] == {}


def test_repeats_are_what_the_budget_draws_of_the_text_there_is(site: Site) -> None:
    report = inspect(site, "budget.tokens=100_000")
    rows = report["budget"]["rows"]
    assert rows == report["budget"]["steps"] * 8 == -(-100_000 // (8 * SEQUENCE_LENGTH)) * 8
    legal = report["corpora"]["legal"]
    assert legal["rows"] == pytest.approx(0.7 * rows, abs=1)
    assert legal["repeats"] == legal["rows"] * SEQUENCE_LENGTH / legal["tokens"]


def test_an_epoch_budget_reads_the_heaviest_corpus_as_often_as_it_says(site: Site) -> None:
    stages = "data.stages=[{until_tokens:9000,weights:{general:1}},{weights:{general:1,legal:1}}]"
    overrides = ("budget=epochs", "budget.tokens=null", "budget.epochs=3")
    for more in ((), ("data.temperature=4",), (stages,)):
        repeats = inspect(site, *overrides, *more)["corpora"]["legal"]["repeats"]
        assert repeats == pytest.approx(3, rel=0.01)


def test_an_epoch_budget_has_as_many_steps_as_training_will_take(site: Site) -> None:
    overrides = ("budget=epochs", "budget.tokens=null", "budget.epochs=2.7", "data.temperature=2")
    report = inspect(site, *overrides)
    config = compose([*site.overrides(), *overrides])
    tokens = report["corpora"]["legal"]["tokens"]
    corpora = SimpleNamespace(train=dict.fromkeys(report["corpora"]), epoch_tokens=tokens)
    assert report["budget"]["steps"] == steps_of(config, corpora)


def test_more_than_four_readings_are_warned_of(site: Site) -> None:
    warnings = inspect(site, "budget.tokens=1_000_000")["warnings"]
    assert [warning for warning in warnings if "legal: is read " in warning and "Muennighoff" in warning]
    assert inspect(site, "budget.tokens=10_000")["warnings"] == []


def test_stages_are_shown_with_the_shares_that_rows_are_dealt_by(site: Site) -> None:
    report = inspect(
        site,
        "budget.tokens=32_000",
        "data.stages=[{until_tokens:16000,weights:{legal:1}},{weights:{legal:1,general:3}}]",
    )
    first, second = report["stages"]
    assert first == {"until_tokens": 16_000, "rows": 1000, "shares": {"general": 0.0, "legal": 1.0}}
    assert second["shares"] == {
        "general": pytest.approx(0.75, abs=0.001),
        "legal": pytest.approx(0.25, abs=0.001),
    }
    assert "16K" in shown(report)


def test_the_sample_is_the_first_row_of_a_lane_cut_where_documents_end(site: Site) -> None:
    row = inspect(site, "model.sequence_length=256")["corpora"]["legal"]["sample_row"]
    assert len(row) > 2
    assert all(document.endswith("<|endoftext|>") for document in row[:-1])
    texts = set(sentences(200, 10_000) + sentences(200, 11_000))
    assert {document.removesuffix("<|endoftext|>") for document in row[:-1]} <= texts


def test_faults_are_counted_by_kind_and_told_where_they_are(site: Site) -> None:
    broken = site.root / "legal" / "train.00000.json.gz"
    broken.write_bytes(broken.read_bytes()[:-20])
    (site.root / "legal" / "train.00002.jsonl").write_text('{"text": "one"}\n{"txet": "two"}\nnot json\n')
    (site.root / "legal" / "train.00003.jsonl").touch()
    report = inspect(site, "data.faults.document=fail")
    legal = report["corpora"]["legal"]
    assert legal["faults"] == {"document": 2, "shard": 2}
    assert any("train.00002.jsonl, document 1: no field text" in line for line in legal["fault_examples"])
    assert report["corpora"]["general"]["faults"] == {}
    (warning,) = [line for line in report["warnings"] if "data.faults" in line]
    assert warning == "legal: data.faults.document=fail, and 2 such were met: training would end there"
    assert "legal: faults met: " in shown(report)


def test_counting_faults_takes_no_more_memory_for_more_of_them() -> None:
    faults = Faults()
    tracemalloc.start()
    for _ in range(2):
        for document in range(10_000):
            faults("x", Damage("document", "a.jsonl", document, "no field text"))
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    assert faults.counts["x"] == {"document": 10_000}


def test_held_out_documents_in_the_training_text_are_counted(site: Site) -> None:
    poem = "Tyger tyger burning bright in the forests of the night what immortal hand or eye"
    write_shard(
        site.root / "general" / "validation.00000.json.gz", [f"William Blake: {poem}", "Call me Ishmael."]
    )
    leaked = ["CALL me\nIshmael.", f"He wrote: {poem.replace(' ', ', ')}!", "Call me Ishmael. Some years ago"]
    write_shard(site.root / "legal" / "train.00002.json.gz", leaked)
    before = inspect(site)["corpora"]["legal"]
    assert before["dropped"] == {"exact": 0, "ngram": 0}
    own = "data.corpora.legal.validation=null"  # its sentences have many words in a row in common
    for kind, dropped in (("exact", {"exact": 1, "ngram": 0}), ("ngram", {"exact": 1, "ngram": 1})):
        report = inspect(site, f"data.decontaminate={kind}", own)
        found = report["corpora"]["legal"]
        assert found["dropped"] == dropped
        assert found["documents"] == before["documents"] - sum(dropped.values())
        assert f"legal: dropped as held out: 1 equal, {dropped['ngram']} by 13 words" in shown(report, 200)


def test_text_too_little_for_the_lanes_is_told_before_training(site: Site) -> None:
    write_shard(site.root / "few" / "train.json.gz", ["one document"])
    (warning,) = [
        line
        for line in inspect(site, f"data.corpora.few.train={site.root}/few/*", "data.lanes=64")["warnings"]
        if "few" in line and "lanes" in line
    ]
    assert warning.startswith("training would end: data.lanes=64: corpus few has too few readable documents")


def test_large_corpora_are_estimated_from_a_sample_and_counted_if_asked(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in range(2, 40):
        write_shard(site.root / "legal" / f"train.{shard:05d}.json.gz", sentences(40 + shard, 100 * shard))
    monkeypatch.setattr(census, "WHOLE_BYTES", 1000)
    report = inspect(site)
    counted = inspect(site, exact=True)["corpora"]["legal"]
    legal = report["corpora"]["legal"]
    assert legal["read"]["shards"] == census.SAMPLED_SHARDS < legal["shards"] == counted["read"]["shards"]
    assert (legal["counted"], counted["counted"]) == (False, True)
    for key in ("documents", "tokens", "text_bytes"):
        assert counted[f"{key}_error"] == 0
        assert 0 < legal[f"{key}_error"] < 0.1
        assert legal[key] == pytest.approx(counted[key], rel=legal[f"{key}_error"])
    assert "estimated" in shown(report)
    assert "\N{PLUS-MINUS SIGN}" in shown(report)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_name_every_corpus_at_any_width(site: Site, width: int) -> None:
    lines = shown(inspect(site), width).splitlines()
    for name in ("general", "legal"):
        assert sum(line.startswith(name) for line in lines) >= 2


def test_hostile_text_cannot_drive_the_terminal(site: Site) -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J \u202ereversed\u2066 \x9b31m [bold]markup[/bold] \r\n" * 3
    for file in (site.root / "legal").glob("train.*"):
        file.unlink()
    write_shard(site.root / "legal" / "train.00000.json.gz", [hostile] * 64)
    (site.root / "legal" / "train.\x1b[31m.jsonl").write_text("{\n")
    printed = shown(inspect(site, "model.sequence_length=512"))
    assert all(character.isprintable() for character in printed.replace("\n", ""))
    assert r"\x1b]0;owned" in printed
    assert "[bold]markup[/bold]" in printed


def test_escapes_leave_readable_text_alone() -> None:
    text = "Größe, 大小, القانون 👍"
    assert printable(text) == text
    assert printable("a\tb\nc\x00\u200b\u2028") == r"a\tb\nc\x00\u200b\u2028"


def test_programs_get_one_json_object(site: Site) -> None:
    answer = site.trainyard("data", "inspect", "--json", *site.overrides())
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == inspect(site)


def test_people_get_tables_and_nothing_is_left_behind(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = site.root / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    answer = site.trainyard("data", "inspect", *site.overrides(), "budget=chinchilla", "budget.tokens=null")
    assert answer.returncode == 0, answer.stderr
    assert "a row of legal" in answer.stdout
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["data"], "the following arguments are required: ACTION"),
        (["data", "inspekt"], "invalid choice: 'inspekt'"),
        (["data", "inspect", "data.lane=3"], "data.lane: no such key; did you mean data.lanes?"),
        (["data", "inspect", "data=local", "data.corpora.a.train=/absent/*"], "/absent/*: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(site: Site, arguments: list[str], line: str) -> None:
    model = [f"model.tokenizer={site.root}/tokenizer"] if arguments[1:2] == ["inspect"] else []
    outcome = site.trainyard(*arguments, *model)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    (only,) = outcome.stderr.splitlines()
    assert line in only
