"""`python -P -m trainer.tokenizing CONFIG_FILE`: corpora to tokens ahead of training."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster import events, exit_codes
from cluster.signals import die_with_parent
from cluster.streams import libraries_to_stderr
from configs.load import load, reason
from configs.schema import Config, ConfigError
from configs.section import printable
from configs.text import Data
from trainer.data.damage import DamageReport, Unavailable
from trainer.data.decontaminate import Decontamination, HeldOut
from trainer.data.listing import Shard
from trainer.data.shards import Reading
from trainer.data.sources import Shards, first_texts, list_corpora, texts_of
from trainer.data.tokenized import MANIFEST, Entry, base_of, read_manifest
from trainer.data.tokenized_writer import Writer, remove
from trainer.data.tokenizer import Encoder, choose_engine, load_tokenizer

LOOK_SECONDS = 0.2
HASHED_BYTES = 1 << 20
PART = re.compile(r"([1-9][0-9]*)/([1-9][0-9]*)")


class Job(NamedTuple):
    """A shard of a corpus by its number among those that are not empty."""

    corpus: str
    number: int
    shard: Shard


class Share(NamedTuple):
    """Which of the shards are this program's: every `parts`-th from `part` on, `part` counting from 0."""

    part: int
    parts: int

    @classmethod
    def of(cls, text: str) -> Share:
        """Read I/N. Raises ConfigError."""
        match = PART.fullmatch(text)
        if match is None or int(match[1]) > int(match[2]):
            raise ConfigError(f"--part={text}: must be I/N with I from 1 to N, such as 2/8")
        return cls(int(match[1]) - 1, int(match[2]))


def tokenize(config: Config, share: Share) -> dict[str, Any]:
    """Tokenize what is missing; returns what was done. Raises ConfigError, Unavailable or OSError."""
    began = time.monotonic()
    directory = _directory(config.data)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"data.tokenized={directory}: must be a directory") from None
    data = config.data
    train, held_out = list_corpora(data, DamageReport(directory, data.faults, rank=0))
    tokenizer = load_tokenizer(config.model)
    writer = Writer(directory, data, held_out, tokenizer.encoder, None, lambda tokens: None)
    jobs = [Job(name, number, shard) for name in train for number, shard in enumerate(train[name])]
    found = {job: writer.finished(*job) for job in jobs}
    missing = [job for job in jobs if found[job] is None]
    own = [job for job in jobs[share.part :: share.parts] if found[job] is None]
    if missing:
        remove(directory / MANIFEST)
    if own:
        _, why_not = choose_engine(
            tokenizer, data.engine, first_texts(data, train, Reading.of(data, directory))
        )
        events.record(directory, "tokenizer_engine", engine=tokenizer.engine, reason=why_not)
        if why_not:
            print(f"trainyard: transformers tokenizes, not fastokens: {why_not}", file=sys.stderr)
        found |= _in_processes(data, held_out, tokenizer.encoder, own)
    # Other programs may have finished their shares meanwhile.
    entries = {job: entry or writer.finished(*job) for job, entry in found.items()}
    done = {job: entry for job, entry in entries.items() if entry is not None}
    if len(done) == len(jobs):
        writer.finish({name: [done[job] for job in jobs if job.corpus == name] for name in train})
    return {
        "directory": str(directory),
        "complete": len(done) == len(jobs),
        "shards": len(jobs),
        "finished": len(done),
        "tokenized": len(own),
        "documents": sum(entry.documents for entry in done.values()),
        "tokens": sum(entry.tokens for entry in done.values()),
        "dropped": sum(entry.dropped for entry in done.values()),
        "faults": dict(sum((Counter(entry.faults) for entry in done.values()), Counter())),
        "engine": tokenizer.engine if own else None,
        "seconds": round(time.monotonic() - began, 3),
    }


def verify(config: Config) -> dict[str, Any]:
    """Read all files that the manifest names and compare their digests. Raises ConfigError without it."""
    directory = _directory(config.data)
    files = [
        (base_of(directory, name, number).with_suffix(suffix), digest)
        for name, corpus in read_manifest(directory).items()
        for number, entry in enumerate(corpus.shards)
        for suffix, digest in entry.sha256.items()
    ]
    with ThreadPoolExecutor(max(1, config.data.workers)) as pool:
        digests = pool.map(lambda file: _sha256(file[0]), files)
        damaged = [str(path) for (path, digest), found in zip(files, digests, strict=True) if found != digest]
    return {"directory": str(directory), "files": len(files), "damaged": damaged}


def _directory(data: Data) -> Path:
    if data.tokenized is None:
        raise ConfigError("data.tokenized=null: give the directory to write, data.tokenized=DIR")
    return Path(data.tokenized)


def _sha256(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while data := file.read(HASHED_BYTES):
                digest.update(data)
    except FileNotFoundError:
        return None
    return digest.hexdigest()


def _in_processes(data: Data, held_out: Shards, encoder: Encoder, jobs: list[Job]) -> dict[Job, Entry | None]:
    """Tokenize shards, the largest first, so that none is left over at the end.

    Raises what the first failure raises, once the other processes have been ended.
    """
    processes = min(len(jobs), max(1, data.workers))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, cores // processes)))
    os.environ["TRAINYARD_PARENT"] = str(os.getpid())
    context = multiprocessing.get_context("spawn")
    tokens = context.Value("q", 0)
    done = dict[Job, Entry | None]()
    pool = ProcessPoolExecutor(
        processes, context, initializer=_begin, initargs=(data, held_out, encoder, tokens)
    )
    try:
        with _progress(len(jobs), lambda: tokens.value) as show:
            ordered = sorted(jobs, key=lambda job: -(job.shard.size_bytes or 0))
            waiting: set[Future[tuple[Job, Entry]]] = {pool.submit(_tokenize, job) for job in ordered}
            while waiting:
                ended, waiting = wait(waiting, LOOK_SECONDS, FIRST_COMPLETED)
                done |= dict(future.result() for future in ended)
                show(len(done))
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return done


_writer: Callable[[], Writer]
"""Of a process that tokenizes."""


def _begin(data: Data, held_out: Shards, encoder: Encoder, tokens: Any) -> None:
    """Make ready to tokenize in a new process; what can fail is left to the first shard, which tells it."""
    global _writer
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    _writer = cache(partial(_open, data, held_out, encoder, tokens))


def _open(data: Data, held_out: Shards, encoder: Encoder, tokens: Any) -> Writer:
    directory, decontamination = _directory(data), None
    if data.decontaminate != "none":
        report = DamageReport(directory, data.faults, rank=0, silent=True)
        reading = Reading.of(data, directory)
        texts = (text for name in held_out for text in texts_of(data, name, held_out[name], report, reading))
        decontamination = Decontamination(HeldOut.of(texts, data.decontaminate))

    def count(number: int) -> None:
        with tokens.get_lock():
            tokens.value += number

    return Writer(directory, data, held_out, encoder, decontamination, count)


def _tokenize(job: Job) -> tuple[Job, Entry]:
    with libraries_to_stderr():
        return job, _writer().write(*job)


@contextmanager
def _progress(shards: int, tokens: Callable[[], int]) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's standard error; called with the shards that are done."""
    console = Console(stderr=True)
    columns = (
        TextColumn("tokenizing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards, {task.fields[millions]:.1f} M tokens"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=shards, millions=0.0)
        yield lambda done: progress.update(task, completed=done, millions=tokens() / 1e6)


def _told(summary: dict[str, Any]) -> str:
    faults = "".join(f", {count} {kind} faults skipped" for kind, count in sorted(summary["faults"].items()))
    dropped = f", {summary['dropped']} documents dropped" if summary["dropped"] else ""
    rest = summary["shards"] - summary["finished"]
    state = "complete" if summary["complete"] else f"{rest} of {summary['shards']} shards are still missing"
    return (
        f"{summary['directory']}: {summary['tokenized']} shards tokenized in {summary['seconds']:.1f} s; "
        f"{summary['documents']} documents, {summary['tokens']} tokens{dropped}{faults}; {state}"
    )


def _failed(code: int, message: str) -> int:
    print(f"trainyard: {printable(message)}", file=sys.stderr)
    return code


def main() -> int:
    die_with_parent()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    parser = argparse.ArgumentParser(prog="trainyard tokenize")
    parser.add_argument("config", type=Path, help="file with a resolved configuration")
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", help="do every N-th shard only, from the I-th on"
    )
    parser.add_argument("--verify", action="store_true", help="compare all files with their digests instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    try:
        with libraries_to_stderr():
            config = load(options.config)
            summary = verify(config) if options.verify else tokenize(config, Share.of(options.part))
    except ConfigError as error:
        return _failed(exit_codes.BAD_INPUT, str(error))
    except Unavailable as error:
        return _failed(exit_codes.MISSING_FROM_ENVIRONMENT, f"{error}; what is done is kept, run it again")
    except BrokenProcessPool:
        return _failed(
            exit_codes.MISSING_FROM_ENVIRONMENT,
            "a process was killed; is memory short? use fewer data.workers",
        )
    except OSError as error:
        return _failed(
            exit_codes.MISSING_FROM_ENVIRONMENT, f"{reason(error)}; what is done is kept, run it again"
        )
    except KeyboardInterrupt:
        return _failed(128 + signal.SIGINT, "interrupted; what is done is kept, run it again to go on")
    damaged = summary.get("damaged", [])
    for path in damaged:
        print(f"trainyard: {printable(path)}: damaged; remove it and tokenize again", file=sys.stderr)
    if options.json:
        print(json.dumps(summary))
    elif not options.verify:
        print(_told(summary))
    elif not damaged:
        print(f"{summary['directory']}: {summary['files']} files are whole")
    return exit_codes.BAD_INPUT if damaged else exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
