"""Our stream of text beside hand-written floors and other libraries, on the same text in the same run.

    python tests/benchmarks/stream.py DIRECTORY [--peers PYTHON ...] [--rounds 3] [--only N ...]

DIRECTORY has shards/*.json.gz, C4-shaped, and tokenizer/, a Hugging Face directory with tokenizer.json.
PYTHON are interpreters with some of datasets, grain, litdata and mosaicml-streaming; a pipeline whose
library none of them has is told as not installed. Prints a table in Markdown. Not a test: it takes minutes
of a quiet machine.

Every pipeline runs in a process of its own, in rounds, each round beginning with another one. Start-up and
the first batches are left out. Text is read no more than once, so that nobody gains by having seen its words
before; files are in the page cache for all.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

from peers.task import Pipeline, Task
from stream_processes import Failed, Pythons, prepare, run

OURS = "ours, lanes, mixture, shuffle, packing: "
TEXT = [
    Pipeline(OURS + "fastokens", "ours:loader", options={"engine": "fastokens"}),
    Pipeline("floor by hand: isal, orjson, fastokens, numpy", "floors:fast"),
    Pipeline(OURS + "transformers", "ours:loader", options={"engine": "transformers"}),
    Pipeline("floor by hand: isal, orjson, tokenizers, numpy", "floors:transformers"),
    Pipeline("torchtitan's way (Grain, window shuffle)", "torchtitan:windows", "grain,datasets"),
    Pipeline(
        "HF datasets streaming, batched map",
        "huggingface:streaming",
        "datasets,torch",
        {"workers": "0", "shuffled": "yes"},
    ),
    Pipeline(
        "HF datasets streaming, 2 workers",
        "huggingface:streaming",
        "datasets,torch",
        {"workers": "2", "shuffled": "yes"},
    ),
]
TOKENS = [
    Pipeline(
        "ours, tokenized before",
        "ours:loader",
        options={"engine": "fastokens", "tokenized": "yes"},
        prepare="ours:write_tokenized",
    ),
    Pipeline("floor by hand: rows of a memory map", "pretokenized:memmap"),
    Pipeline(
        "LitData", "pretokenized:litdata", "litdata", {"workers": "0"}, prepare="pretokenized:write_litdata"
    ),
    Pipeline(
        "LitData, 2 workers",
        "pretokenized:litdata",
        "litdata",
        {"workers": "2"},
        prepare="pretokenized:write_litdata",
    ),
    Pipeline(
        "MosaicML Streaming",
        "pretokenized:mosaic",
        "streaming",
        {"workers": "0"},
        prepare="pretokenized:write_mosaic",
    ),
]
PIPELINES = TEXT + TOKENS
RATIOS = [
    (0, 1, "tokens/s", "ours / its floor, fastokens"),
    (2, 3, "tokens/s", "ours / its floor, transformers"),
    (0, 4, "tokens/CPU-s", "ours, fastokens / torchtitan's way"),
    (2, 4, "tokens/CPU-s", "ours, transformers / torchtitan's way"),
    (7, 8, "tokens/s", "ours, tokenized before / memory map"),
    (7, 9, "tokens/s", "ours, tokenized before / LitData"),
]
"""Of which pipeline to which other one, in what."""


def measure(options: argparse.Namespace, task: Task, tokens: int) -> dict[int, list[dict[str, Any]]]:
    """Rounds of what each pipeline measured, by its number; those that cannot be run are left out."""
    pythons, able = Pythons(options.peers), {}
    for number, pipeline in enumerate(PIPELINES):
        if options.only and number not in options.only:
            continue
        if (python := pythons.of(pipeline)) is None:
            print(f"{pipeline.label}: {pipeline.needs} not installed", file=sys.stderr)
            continue
        prepare(python, pipeline, task)
        able[number] = python
    found: dict[int, list[dict[str, Any]]] = {number: [] for number in able}
    for turn in range(options.rounds):
        numbers = list(able)
        for number in numbers[turn % len(numbers) :] + numbers[: turn % len(numbers)]:
            pipeline = PIPELINES[number]
            limit = tokens if number < len(TEXT) else 0
            try:
                measured = run(able[number], pipeline, task, options.seconds, limit)
            except Failed as failure:
                print(failure, file=sys.stderr)
                continue
            measured["tokens/s"] = measured["tokens"] / measured["seconds"]
            measured["tokens/CPU-s"] = measured["tokens"] / measured["cpu_seconds"]
            measured["load"] = os.getloadavg()[0]
            found[number].append(measured)
            print(f"round {turn + 1}: {pipeline.label}: {measured}", file=sys.stderr)
    return found


def table(found: dict[int, list[dict[str, Any]]]) -> str:
    """Medians over the rounds, the least and most in brackets."""
    lines = [
        "| # | pipeline | M tokens/s | CPU-seconds per M tokens | start-up, s | peak memory, MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for number, rounds in found.items():
        if not rounds:
            lines.append(f"| {number} | {PIPELINES[number].label} | failed | | | |")
            continue
        rate = spread([one["tokens/s"] / 1e6 for one in rounds])
        cost = spread([1e6 / one["tokens/CPU-s"] for one in rounds])
        startup = median(one["import_seconds"] + one["first_seconds"] for one in rounds)
        peak = median(one["peak_mib"] for one in rounds)
        lines.append(
            f"| {number} | {PIPELINES[number].label} | {rate} | {cost} | {startup:.1f} | {peak:.0f} |"
        )
    for upper, lower, unit, label in RATIOS:
        if found.get(upper) and found.get(lower):
            pairs = zip(found[upper], found[lower], strict=False)
            lines.append(f"\n{label}, {unit}: {spread([a[unit] / b[unit] for a, b in pairs])}")
    loads = [one["load"] for rounds in found.values() for one in rounds]
    return "\n".join([*lines, f"\nLoad average {min(loads):.1f} to {max(loads):.1f}."])


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def task_of(directory: Path, threads: int) -> Task:
    """The text of a directory, with its tokens written beside it."""
    directory = directory.resolve()
    shards = sorted(map(str, directory.glob("shards/*.gz")))
    work = directory / "work"
    work.mkdir(exist_ok=True)
    task = Task(shards, str(directory / "tokenizer"), str(work), threads=threads)
    prepare(sys.executable, Pipeline("tokens of the text", "", prepare="floors:write_tokens"), task)
    return task


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--peers", nargs="*", default=[], metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="per pipeline and round")
    parser.add_argument("--only", nargs="*", type=int, default=[], metavar="N", help="pipelines by number")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    task = task_of(options.directory, options.threads)
    tokens = Path(task.work, "tokens.uint16").stat().st_size // 2
    print(f"{len(task.shards)} shards, {tokens / 1e6:.1f} M tokens, {options.threads} threads\n")
    print(table(measure(options, task, tokens)))


if __name__ == "__main__":
    main()
