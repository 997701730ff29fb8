"""The report of a run: one page that anyone can open, whatever state the run is in."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from launcher.report import summary, write_report

TOKENS_PER_STEP = 1000
STARTED = 1_700_000_000.0
HOSTILE = "</script><script>alert('x')</script>&\"<img src=https://evil.example/x>"
VOID = {"meta", "br", "hr", "img", "link", "input"}


def step_row(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "loss": 5.0 - step / 100,
        "lr": 3e-4,
        "grad_norm": 1.0,
        "tokens_per_second": 500.0,
        "step_seconds": 2.0,
        "data_seconds": 0.5,
        "mfu": None,
        "memory_gib": 10.0,
    } | changes


def eval_row(step: int, **perplexity: float) -> dict[str, Any]:
    row: dict[str, Any] = {"step": step, "tokens": step * TOKENS_PER_STEP}
    for corpus, value in perplexity.items():
        row |= {f"eval/{corpus}/loss": 1.0, f"eval/{corpus}/perplexity": value}
    return row


def event(second: float, kind: str, attempt: int = 1, **fields: Any) -> dict[str, Any]:
    return {"time": STARTED + second, "event": kind, "attempt": attempt, **fields}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Forty steps; stopped after step 25, taken up again from the checkpoint of step 20."""
    directory = tmp_path / "some-run"
    directory.mkdir()
    config = {"run": {"name": "legal-7b"}, "model": {"name": "llama-7b"}, "optimizer": {"lr": 0.0003}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    plan = {
        "model": {"name": "llama-7b", "parameters": 6.7e9},
        "budget": {"tokens": 40_000, "steps": 40, "verdict": "less than one epoch"},
        "time": {"step_seconds": 1.6, "tokens_per_second": 625.0, "mfu": None, "seconds": 64.0},
        "memory": {"reserved_gib": 8.0, "verdict": "fits"},
        "assumptions": {"overlap": "Communication hides behind compute."},
    }
    (directory / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    write_lines(
        directory / "metrics.jsonl",
        [
            eval_row(0, legal=31.4, general=14.2),
            *(step_row(step) for step in range(1, 26)),
            *(step_row(step, loss=4.0) for step in range(21, 41)),
            eval_row(40, legal=15.7, general=14.91),
        ],
    )
    write_lines(
        directory / "events.jsonl",
        [
            event(0, "attempt", step=0),
            event(50, "checkpoint", step=20),
            event(60, "signal", signal="SIGTERM"),
            event(90, "attempt", 2, step=20),
            event(90.5, "attempt", 2, step=20),
            event(160, "finished", 2),
        ],
    )
    return directory


class Balance(HTMLParser):
    """Collects the tags of a page and complains where they do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(run: Path) -> str:
    """The report of `run`, after what holds for every report was checked."""
    path = write_report(run)
    assert path == run / "report.html"
    page = path.read_text(encoding="utf-8")
    tags = Balance(page).tags
    names = [tag for tag, _ in tags]
    assert not {"link", "img", "iframe", "object", "base"} & set(names)
    assert names.count("script") == 1
    assert not [value for _, attrs in tags for key, value in attrs.items() if key in ("src", "href")]
    assert not re.search(r"url\(|@import", page)
    for drawing in drawings(page):
        assert not re.search(r"nan|inf", " ".join(paths(drawing)))
    return page


def drawings(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def paths(drawing: ElementTree.Element) -> list[str]:
    return [path.get("d", "") for path in drawing.iter("path")]


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_states_perplexity_before_and_after_with_its_change(run: Path) -> None:
    text = text_of(page_of(run))
    assert "legal 0 – 40 31.40 15.70 −50.0 %" in text
    assert "general 0 – 40 14.20 14.91 +5.0 %" in text


def test_compares_plan_and_actual(run: Path) -> None:
    text = text_of(page_of(run))
    assert "Tokens 40K 40K 1.00 ×" in text
    assert "Time per step 1.6 s 2 s 1.25 ×" in text
    assert "Memory per GPU, peak 8.0 GiB 10.0 GiB 1.25 ×" in text
    assert "Total time 1 min 4 s 2 min 40 s 2.50 ×" in text
    assert "Communication hides behind compute." in text


def test_header_and_tiles(run: Path) -> None:
    text = text_of(page_of(run))
    assert "finished legal-7b llama-7b · 6.7B parameters · 40K tokens" in text
    assert "2023-11-14 22:13:20 to 2023-11-14 22:16:00 UTC, 2 attempts" in text
    assert "MFU not known" in text
    assert "Final loss 4.000" in text


def test_charts_are_drawn_with_a_mark_where_the_run_was_taken_up_again(run: Path) -> None:
    found = drawings(page_of(run))
    titles = [drawing.findtext("title") for drawing in found]
    assert titles == [
        f"{name} over tokens"
        for name in ("Held-out perplexity", "Loss", "Learning rate", "Gradient norm", "Tokens per second")
    ]
    for drawing in found:
        assert drawing.findtext("desc")
        marks = [path for path in drawing.iter("path") if path.get("class") == "mark"]
        assert [(mark.findtext("title"), mark.get("d")) for mark in marks] == [("attempt 2", "M500 0V1000")]


def test_summary_holds_the_numbers(run: Path) -> None:
    numbers = summary(run)
    json.dumps(numbers, allow_nan=False)
    assert numbers["state"] == "finished"
    assert numbers["attempts"] == 2
    assert (numbers["steps"], numbers["tokens"], numbers["final_loss"]) == (40, 40_000, 4.0)
    assert numbers["perplexity"]["legal"] == {
        "before_step": 0,
        "before": 31.4,
        "after_step": 40,
        "after": 15.7,
        "change": pytest.approx(-0.5),
    }
    assert numbers["plan_vs_actual"]["step_seconds"] == {"plan": 1.6, "actual": 2.0, "ratio": 1.25}
    assert numbers["plan_vs_actual"]["mfu"] == {"plan": None, "actual": None, "ratio": None}
    assert numbers["data_share"] == pytest.approx(0.25)


def test_goodput_counts_repeated_steps_once(run: Path) -> None:
    numbers = summary(run)
    assert numbers["productive_seconds"] == pytest.approx(40 * 2.0)
    assert numbers["wall_seconds"] == pytest.approx(160.0)
    assert numbers["goodput"] == pytest.approx(0.5)


def test_a_row_speaks_for_the_steps_since_the_row_before(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [step_row(10), step_row(20, step_seconds=3.0), step_row(25)])
    assert summary(run)["productive_seconds"] == pytest.approx(10 * 2.0 + 10 * 3.0 + 5 * 2.0)


def test_steps_of_a_lost_stretch_are_replaced_by_those_that_repeat_it(run: Path) -> None:
    write_lines(
        run / "metrics.jsonl",
        [*(step_row(step) for step in range(1, 26)), *(step_row(step) for step in range(21, 23))],
    )
    assert summary(run)["steps"] == 22
    assert "of 22 logged rows" in page_of(run)


def test_a_point_between_gaps_is_a_dot(run: Path) -> None:
    nan = float("nan")
    losses = [nan, 4.0, nan, 3.0, 2.0]
    write_lines(run / "metrics.jsonl", [step_row(step, loss=loss) for step, loss in enumerate(losses, 1)])
    loss_chart = drawings(page_of(run))[0]
    assert paths(loss_chart)[-3].startswith("M400 0 400 0M800 500 1000 1000")


def test_an_attempt_without_a_step_begins_at_the_newest_checkpoint(run: Path) -> None:
    write_lines(
        run / "events.jsonl",
        [event(0, "attempt"), event(9, "checkpoint", step=10), event(20, "attempt", 2)],
    )
    assert 'd="M250 0V1000"' in page_of(run)


def test_an_unfinished_run_says_so_and_its_time_goes_on_after_the_last_event(run: Path) -> None:
    write_lines(run / "events.jsonl", [event(0, "attempt", step=0), event(1, "node_checked")])
    numbers = summary(run)
    assert numbers["state"] == "unfinished"
    assert numbers["wall_seconds"] == pytest.approx(80.0)
    assert "those so far" in page_of(run)


def test_a_finished_run_that_was_begun_again_is_unfinished(run: Path) -> None:
    with (run / "events.jsonl").open("a") as events:
        events.write(json.dumps(event(500, "attempt", 3, step=40)) + "\n")
    assert summary(run)["state"] == "unfinished"


def test_survives_a_torn_last_line(run: Path) -> None:
    whole = summary(run)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (run / name).open("ab") as lines:
            lines.write(b'{"step": 41, "tok\xff')
    assert summary(run) == whole
    assert "2 damaged lines left out" in page_of(run)


def test_an_empty_run_directory_gives_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    text = text_of(page_of(tmp_path))
    for sentence in (
        "No step was logged.",
        "No evaluation was logged.",
        "No event was recorded.",
        "no readable plan.json",
        "no config.yaml",
    ):
        assert sentence in text
    assert tmp_path.name in text
    json.dumps(summary(tmp_path), allow_nan=False)


def test_a_path_that_is_no_run_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def test_training_without_evaluation(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [step_row(step) for step in range(1, 5)])
    page = page_of(run)
    assert "No evaluation was logged." in page
    assert len(drawings(page)) == 4


def test_one_evaluation_has_no_after(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [eval_row(0, legal=31.4)])
    assert summary(run)["perplexity"]["legal"]["after"] is None
    assert "legal 0 – – 31.40 – –" in text_of(page_of(run))


def test_one_step_is_enough(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [step_row(1)])
    assert len(drawings(page_of(run))) == 4


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(float("nan"), id="nan"),
        pytest.param(float("inf"), id="inf"),
        pytest.param(float("-inf"), id="-inf"),
        pytest.param(None, id="null"),
        pytest.param(1e308, id="overflowing"),
        pytest.param(10**400, id="beyond floats"),
        pytest.param("high", id="text"),
    ],
)
def test_a_loss_that_is_no_number_leaves_the_scale_alone(run: Path, bad: object) -> None:
    rows = [step_row(step) for step in range(1, 41)]
    write_lines(run / "metrics.jsonl", rows)
    scale = re.findall('data-y="[^"]*"', page_of(run))
    write_lines(run / "metrics.jsonl", [*rows[:20], step_row(21, loss=bad), *rows[21:]])
    page = page_of(run)
    assert re.findall('data-y="[^"]*"', page) == scale
    assert "1 of 40 values are not finite" in page
    json.dumps(summary(run), allow_nan=False)


def test_only_bad_losses(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [step_row(step, loss=float("nan")) for step in range(1, 9)])
    numbers = summary(run)
    assert (numbers["final_loss"], numbers["nonfinite_losses"]) == (None, 8)
    assert "no finite value was logged" in page_of(run)


def test_text_from_files_is_escaped(run: Path) -> None:
    (run / "config.yaml").write_text(
        yaml.safe_dump({"run": {"name": HOSTILE}, "model": {"name": HOSTILE}, HOSTILE: [HOSTILE]})
    )
    plan = {
        "model": {"name": HOSTILE},
        "budget": {"verdict": HOSTILE, "tokens": HOSTILE},
        "world": {"world_size": HOSTILE, "hardware": HOSTILE, "sharding": HOSTILE, "precision": [HOSTILE]},
        "assumptions": {HOSTILE: HOSTILE},
    }
    (run / "plan.json").write_text(json.dumps(plan))
    write_lines(
        run / "metrics.jsonl",
        [step_row(step) for step in range(1, 9)] + [eval_row(step, **{HOSTILE: 9.0}) for step in (0, 8)],
    )
    write_lines(
        run / "events.jsonl",
        [
            event(0, "attempt", step=0) | {"attempt": HOSTILE},
            event(1, HOSTILE) | {HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}},
            event(2, "checkpoint", step=4),
            event(3, "attempt") | {"attempt": HOSTILE + "2"},
        ],
    )
    page = page_of(run)
    assert page.count("<script>") == page.count("</script>") == 1
    assert "<img" not in page
    assert page.count("&lt;img src=https://evil.example/x&gt;") > 10


def test_text_that_utf8_cannot_hold_is_replaced(run: Path) -> None:
    with (run / "events.jsonl").open("a") as events:
        events.write('{"time": 1700000200, "event": "note", "text": "cut \\ud83d"}\n')
    assert "text cut ?" in page_of(run)


def test_many_events_and_a_long_message_do_not_swell_the_page(run: Path) -> None:
    events = [event(second, "checkpoint", step=1, text="x" * 10_000) for second in range(2000)]
    write_lines(run / "events.jsonl", events)
    page = page_of(run)
    assert len(page) < 400_000
    assert "1,800 events in the middle are left out" in page


def test_two_hundred_thousand_rows_stay_below_a_megabyte_and_keep_a_single_spike(run: Path) -> None:
    count, spike = 200_000, 123_457
    with (run / "metrics.jsonl").open("w") as lines:
        for step in range(1, count + 1):
            loss = 50.0 if step == spike else 4.0 + (step % 7) / 10
            lines.write(json.dumps(step_row(step, loss=loss)) + "\n")
    page = page_of(run)
    assert len(page) < 1_000_000
    loss_chart = next(chart for chart in drawings(page) if chart.findtext("title") == "Loss over tokens")
    logged = next(path for path in loss_chart.iter("path") if path.get("data-name") == "loss")
    pairs = re.findall(r"([\d.]+) ([\d.]+)", logged.get("d", ""))
    assert 500 < len(pairs) < 1100
    highest = min(pairs, key=lambda pair: float(pair[1]))
    assert float(highest[1]) == pytest.approx(0.0, abs=1e-6)
    assert float(highest[0]) == pytest.approx(1000 * spike / count, abs=0.1)


def test_perplexity_over_more_than_a_decade_is_logarithmic(run: Path) -> None:
    assert "data-log" not in page_of(run).split("<script>")[0]
    write_lines(run / "metrics.jsonl", [eval_row(0, legal=40_000.0), eval_row(40, legal=12.0)])
    page = page_of(run).split("<script>")[0]
    assert "data-log" in page
    assert 'data-y="10.0 100000.0"' in page


def test_writing_again_replaces_the_page_and_leaves_nothing_else(run: Path) -> None:
    before = {path.name for path in run.iterdir()}
    assert page_of(run) == page_of(run)
    assert {path.name for path in run.iterdir()} == before | {"report.html"}
