"""What a run's text is: `python -P -m trainer.inspecting CONFIG_FILE [--exact] [--json]`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from cluster import exit_codes
from cluster.signals import die_with_parent
from cluster.streams import libraries_to_stderr
from configs.load import load
from configs.schema import ConfigError
from configs.section import printable
from trainer.inspection import Inspection

UNKNOWN = "\N{EN DASH}"
SHOWN_DOCUMENTS = 4
SHOWN_CHARACTERS = 240
"""Of a document in a sample row; the middle of longer ones is left out."""
_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
_BINARY = ((2**40, " TiB"), (2**30, " GiB"), (2**20, " MiB"), (2**10, " KiB"))


def render(report: dict[str, Any]) -> Group:
    """Tables and sample rows for people."""
    corpora: dict[str, dict[str, Any]] = report["corpora"]
    parts: list[Any] = [_text_table(corpora), Text(), _run_table(report), Text()]
    if report["stages"]:
        parts += [_stage_table(report["stages"]), Text()]
    parts += [Text(line) for line in _notes(report)]
    for name, corpus in corpora.items():
        if corpus["sample_row"]:
            parts += [Text(), _sample(name, corpus["sample_row"])]
    return Group(*parts)


def _text_table(corpora: dict[str, dict[str, Any]]) -> Table:
    table = _table(
        "text", "shards", "size", "documents", "tokens", "tokens per\ndocument", "bytes per\ntoken"
    )
    for name, corpus in corpora.items():
        table.add_row(
            name,
            f"{corpus['shards']:,}",
            _short(corpus["bytes"], _BINARY),
            _with_error(corpus["documents"], corpus["documents_error"]),
            _with_error(corpus["tokens"], corpus["tokens_error"]),
            _short(corpus["tokens_per_document"]),
            _short(corpus["bytes_per_token"]),
        )
    return table


def _run_table(report: dict[str, Any]) -> Table:
    table = _table("this run", "share", "rows", "tokens drawn", "times read")
    for name, corpus in report["corpora"].items():
        drawn, repeats = _short(corpus["tokens_drawn"]), corpus["repeats"]
        times = UNKNOWN if repeats is None else f"{repeats:.3g}"
        table.add_row(name, f"{corpus['share']:.2%}", f"{corpus['rows']:,}", drawn, times)
    return table


def _stage_table(stages: list[dict[str, Any]]) -> Table:
    table = _table("stage", "until tokens", "rows", *stages[0]["shares"])
    for number, stage in enumerate(stages):
        shares = (UNKNOWN if share is None else f"{share:.2%}" for share in stage["shares"].values())
        until = "end" if stage["until_tokens"] is None else _short(stage["until_tokens"])
        table.add_row(str(number), until, f"{stage['rows']:,}", *shares)
    return table


def _notes(report: dict[str, Any]) -> Iterator[str]:
    budget, engine = report["budget"], report["tokenizer"]
    yield f"budget {budget['kind']}: {_short(budget['tokens'])} tokens, {budget['steps']:,} steps"
    why = f": {printable(engine['why_not_faster'])}" if engine["why_not_faster"] else ""
    yield f"tokenized by {engine['engine']}{why}"
    for name, corpus in report["corpora"].items():
        read = corpus["read"]
        how = "counted in full" if corpus["counted"] else "estimated, with 95 % intervals,"
        yield (
            f"{name}: {how} from {read['shards']:,} of {corpus['shards']:,} shards, "
            f"{read['documents']:,} documents, {_short(read['tokens'])} tokens"
        )
        if report["decontaminate"] != "none":
            dropped = corpus["dropped"]
            yield f"{name}: dropped as held out: {dropped['exact']:,} equal, {dropped['ngram']:,} by 13 words"
        if corpus["faults"]:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in corpus["faults"].items())
            yield f"{name}: faults met: {kinds}"
            yield from (f"  {printable(example)}" for example in corpus["fault_examples"])
    yield from (f"warning: {printable(warning)}" for warning in report["warnings"])


def _sample(name: str, documents: list[str]) -> Text:
    text = Text(f"a row of {name}\n", style="bold")
    for number, document in enumerate(documents[:SHOWN_DOCUMENTS]):
        shown = printable(document)
        if len(shown) > SHOWN_CHARACTERS:
            half = SHOWN_CHARACTERS // 2
            shown = f"{shown[:half]} ... {shown[-half:]}"
        text.append(f"  {number + 1}  ", style="dim")
        text.append(f"{shown}\n", style="not bold")
    if len(documents) > SHOWN_DOCUMENTS:
        text.append(f"  and {len(documents) - SHOWN_DOCUMENTS} more\n", style="dim")
    text.rstrip()
    return text


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold", min_width=8)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _short(value: float | None, suffixes: tuple[tuple[float, str], ...] = _SUFFIXES) -> str:
    if value is None:
        return UNKNOWN
    for unit, suffix in suffixes:
        if value >= 0.9995 * unit:
            return f"{value / unit:.4g}{suffix}"
    return f"{value:.4g}"


def _with_error(value: int, error: float | None) -> str:
    if error == 0:
        return f"{value:,}"
    return f"{_short(value)} \N{PLUS-MINUS SIGN} {'?' if error is None else f'{error:.1%}'}"


def main() -> int:
    die_with_parent()
    parser = argparse.ArgumentParser(prog="trainyard data inspect")
    parser.add_argument("config", type=Path, help="a run's config.yaml")
    parser.add_argument("--exact", action="store_true", help="read everything instead of a sample")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    try:
        with libraries_to_stderr(), tempfile.TemporaryDirectory() as scratch:
            config = load(arguments.config)
            with progress:
                report = Inspection(config, Path(scratch), progress, exact=arguments.exact).run()
    except ConfigError as error:
        print(f"trainyard: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if arguments.json:
        print(json.dumps(report, allow_nan=False))
    else:
        Console(highlight=False).print(render(report))
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
