"""`python -P -m trainer.checkpoint ls|verify|convert RUN`: what is there, is it whole, other layouts."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster import exit_codes
from cluster.signals import die_with_parent
from configs.load import load
from configs.schema import ConfigError
from trainer.checkpoint import convert
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.places import Away, Place, places_of

GIB = 2**30


def inventory(run: Path, step: int | None = None) -> Iterator[tuple[Place, int]]:
    """The checkpoints of a run at all its places, newest first; a place that is away is told.

    Raises ConfigError.
    """
    config = load(run / "config.yaml")
    found: list[tuple[Place, int]] = []
    for place in places_of(run, config.checkpoint, config.run.name or ""):
        try:
            found += [(place, number) for number in place.steps()]
        except Away as error:
            print(f"trainyard: {error}", file=sys.stderr)
    if step is not None and step not in {number for _, number in found}:
        raise ConfigError(f"--step={step}: {run} has no checkpoint of this step")
    for place, number in sorted(found, key=lambda entry: entry[1], reverse=True):
        if step in (None, number):
            yield place, number


def describe(place: Place, step: int) -> dict[str, Any]:
    """One checkpoint in JSON values; `problem` is what its sizes give away, none if it looks whole."""
    row: dict[str, Any] = {"step": step, "place": place.address, "path": place.at(step)}
    try:
        whole = place.manifest(step)
        row["problem"] = _mismatch(whole, place.visible(whole))
        row |= {
            "time": whole.time or None,
            "bytes": whole.size_bytes,
            "world_size": whole.world_size,
            "strategy": whole.strategy,
            "tokens": place.state(whole).get("tokens"),
        }
    except (ValueError, FileNotFoundError) as error:
        row["problem"] = row.get("problem") or str(error)
    return row


def verify(place: Place, step: int) -> dict[str, Any]:
    """One checkpoint, every byte of it read; `problem` is what is wrong, none if it is whole."""
    try:
        problem = place.problem(place.manifest(step))
    except ValueError as error:
        problem = str(error)
    return {"step": step, "place": place.address, "path": place.at(step), "problem": problem}


def _mismatch(whole: Manifest, sizes: dict[str, int]) -> str | None:
    for file in whole.files:
        if file.name not in sizes:
            return f"{file.name} is missing"
        if sizes[file.name] != file.size_bytes:
            return f"{file.name} has {sizes[file.name]} bytes instead of {file.size_bytes}"
    return None


def _list(arguments: argparse.Namespace) -> int:
    rows = [describe(*found) for found in inventory(arguments.run, arguments.step)]
    if arguments.json:
        print(json.dumps({"checkpoints": rows}))
        return exit_codes.DONE
    table = Table(box=None, pad_edge=False)
    for column in ("step", "tokens", "when", "GiB", "ranks", "strategy", "place", "whole"):
        table.add_column(column, overflow="fold")
    for row in rows:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"])) if row.get("time") else ""
        size = f"{row['bytes'] / GIB:.3g}" if "bytes" in row else ""
        told = [row.get(key) for key in ("tokens", "world_size", "strategy")]
        tokens, ranks, strategy = ("" if value is None else str(value) for value in told)
        state = row["problem"] or "yes"
        table.add_row(str(row["step"]), tokens, when, size, ranks, strategy, row["place"], state)
    Console(highlight=False, markup=False).print(table)
    return exit_codes.DONE


def _verify(arguments: argparse.Namespace) -> int:
    rows = [verify(*found) for found in inventory(arguments.run, arguments.step)]
    if arguments.json:
        print(json.dumps({"checkpoints": rows}))
    for row in rows:
        if row["problem"]:
            print(f"trainyard: {row['path']}: damaged: {row['problem']}", file=sys.stderr)
        elif not arguments.json:
            print(f"{row['path']}: whole")
    return exit_codes.BAD_INPUT if any(row["problem"] for row in rows) else exit_codes.DONE


def main() -> int:
    die_with_parent()
    parser = argparse.ArgumentParser(prog="trainyard checkpoint")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, action, text in (
        ("ls", _list, "checkpoints at all places of a run, and whether their sizes are right"),
        ("verify", _verify, "read every byte; exit code 2 if a checkpoint is damaged"),
    ):
        listing = actions.add_parser(name, help=text, description=text)
        listing.add_argument("run", type=Path, metavar="RUN", help="a run's directory")
        listing.add_argument("--step", type=int, help="only the checkpoint of this step")
        listing.add_argument("--json", action="store_true", help="print one JSON object")
        listing.set_defaults(action=action)
    text = "to and from Hugging Face directories and DeepSpeed's universal layout"
    converting = actions.add_parser("convert", help=text, description=text)
    convert.add_arguments(converting)
    converting.set_defaults(action=convert.run)
    arguments = parser.parse_args()
    try:
        code: int = arguments.action(arguments)
    except ConfigError as error:
        print(f"trainyard: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except OSError as error:
        print(f"trainyard: {error}", file=sys.stderr)
        return exit_codes.MISSING_FROM_ENVIRONMENT
    return code


if __name__ == "__main__":
    sys.exit(main())
