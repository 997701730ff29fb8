"""Time to the first global batch: after a start on 1,000 shards, and after a resume deep in large shards.

    python tests/benchmarks/stream_resume.py DIRECTORY LARGE [--peers PYTHON ...] [--rounds 3]

DIRECTORY as stream.py takes it; LARGE is a shard as large as C4's (839 MB of text). Shards are links to it,
and every cursor stands at 90 % of one: 16 lanes in as many shards, or 16 lanes in parts of one shard. Peers
have one cursor, in one shard. Prints a table in Markdown: seconds from when the libraries are imported, and
of importing them, medians and extremes of some rounds, in processes of their own; the files are in the page
cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from peers.task import Pipeline, Task
from stream import spread, task_of
from stream_processes import Failed, Pythons, run

FRACTION = 0.9
STARTED_ON, LANES = 1_000, 16
OURS = {"engine": "fastokens", "corpora": "one"}
PEERS = [
    Pipeline(
        "HF datasets, unshuffled",
        "huggingface:streaming",
        "datasets,torch",
        {"workers": "0", "shuffled": "no"},
    ),
    Pipeline("torchtitan's way", "torchtitan:windows", "grain,datasets"),
]


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    shards: int
    pipeline: Pipeline
    resume: bool = False
    index: bool = False

    @property
    def label(self) -> str:
        begin = f"resume at {FRACTION:.0%}" if self.resume else "start"
        index = ", with index" if self.index else ""
        return f"{begin}, {self.shards} shards: {self.pipeline.label}{index}"


FAST = Pipeline("ours, 16 lanes", "ours:loader", options=OURS)
SLOW = Pipeline("ours, 16 lanes, transformers", "ours:loader", options=OURS | {"engine": "transformers"})
CASES = [
    *(Case(STARTED_ON, pipeline) for pipeline in (FAST, SLOW, *PEERS)),
    *(Case(shards, FAST, True, index) for shards in (1, LANES) for index in (False, True)),
    *(Case(1, pipeline, True) for pipeline in PEERS),
]


def links(large: Path, directory: Path, count: int) -> list[str]:
    """Names of one file, as many shards."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"shard.{number:05d}-of-{count:05d}.json.gz" for number in range(count)]
    for path in paths:
        if not path.exists():
            os.link(large, path)
    return [str(path) for path in paths]


class States:
    """Where to resume, written once per pipeline and number of shards."""

    def __init__(self, work: Path) -> None:
        self._work = work / "resume"
        self._work.mkdir(exist_ok=True)
        self._documents = self._work / "documents"

    def of(self, case: Case, python: str, task: Task) -> Path:
        """The state of a case's pipeline; the first call is for ours, which says how far others have read."""
        module = case.pipeline.function.partition(":")[0]
        path = self._work / f"{module}.{case.shards}.json"
        if not path.exists():
            read = self._documents.read_text() if module != "ours" else str(self._documents)
            options = {"to": str(path), "fraction": str(FRACTION), "documents": read}
            told = replace(task, options=task.options | options)
            run(python, case.pipeline, told, -1, function=f"{module}:prepare_resume")
        return path

    def indexes(self, case: Case, python: str, task: Task) -> Path:
        directory = self._work / f"indexes.{case.shards}"
        if not directory.exists():
            told = replace(task, options=task.options | {"indexes": str(directory)})
            run(python, case.pipeline, told, -1, function="ours:write_indexes")
        return directory


def measure(case: Case, python: str, task: Task, states: States) -> dict[str, Any]:
    """One process, in a run directory that is new but for the indexes."""
    with TemporaryDirectory(dir=task.work) as directory:
        if case.resume:
            task = replace(task, state=str(states.of(case, python, task)))
        if case.index:
            shutil.copytree(
                states.indexes(case, python, task), Path(directory, "index"), copy_function=os.link
            )
        told = replace(task, options=task.options | {"run": directory})
        return run(python, case.pipeline, told, 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("large", type=Path)
    parser.add_argument("--peers", nargs="*", default=[], metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", type=int, default=[], metavar="N", help="cases by number")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    task = task_of(options.directory, options.threads)
    states, pythons = States(Path(task.work)), Pythons(options.peers)
    found: dict[int, list[dict[str, Any]]] = {}
    for turn in range(options.rounds):
        for number, case in enumerate(CASES):
            if options.only and number not in options.only:
                continue
            if (python := pythons.of(case.pipeline)) is None:
                print(f"{case.label}: {case.pipeline.needs} not installed", file=sys.stderr)
                continue
            shards = links(options.large, Path(task.work, "links", str(case.shards)), case.shards)
            try:
                measured = measure(case, python, replace(task, shards=shards), states)
            except Failed as failure:
                print(failure, file=sys.stderr)
                continue
            found.setdefault(number, []).append(measured | {"load": os.getloadavg()[0]})
            print(f"round {turn + 1}: {case.label}: {measured}", file=sys.stderr)
    print("| # | case | first global batch, s | imports before, s | peak memory, MiB |")
    print("| --- | --- | --- | --- | --- |")
    for number, rounds in sorted(found.items()):
        seconds = spread([one["first_seconds"] for one in rounds])
        imports = median(one["import_seconds"] for one in rounds)
        print(
            f"| {number} | {CASES[number].label} | {seconds} | {imports:.1f} "
            f"| {median(one['peak_mib'] for one in rounds):.0f} |"
        )
    loads = [one["load"] for rounds in found.values() for one in rounds]
    print(f"\nLoad average {min(loads):.1f} to {max(loads):.1f}.")


if __name__ == "__main__":
    main()
