"""`trainyard tokenize` does each shard once, whatever interrupts it, and says in one line how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support import Site, sentences, write_shard, write_tokenizer

from configs.compose import compose
from trainer.data.sources import list_corpora
from trainer.data.tokenized import MANIFEST, TokenizedCorpus
from trainer.data.tokenizer import load_tokenizer

SHARDS = 12
DISK_KIB = 160


class Tokenizing(Site):
    """A user's directory with one corpus of several shards."""

    def keys(self, out: Path, *more: str) -> list[str]:
        return [
            "model=llama-demo",
            f"model.tokenizer={self.root / 'tokenizer'}",
            "budget=tokens",
            "budget.tokens=1000",
            "data=local",
            f"data.corpora.x.train={self.root / 'x'}/train.*",
            f"data.corpora.x.validation={self.root / 'x'}/validation.*",
            f"data.tokenized={out}",
            "data.engine=transformers",
            "data.workers=1",
            *more,
        ]

    def command(self, out: Path, *arguments: str, more: tuple[str, ...] = ()) -> list[str]:
        """The program as the verb starts it."""
        file = self.root / f"{out.name}.yaml"
        file.write_text(yaml.safe_dump(compose(self.keys(out, *more)).model_dump()))
        return [sys.executable, "-P", "-m", "trainer.tokenizing", str(file), *arguments]

    def run(self, out: Path, *arguments: str, more: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        command = self.command(out, *arguments, more=more)
        return subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=120
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Tokenizing:
    root = tmp_path_factory.mktemp("site")
    write_tokenizer(root / "tokenizer")
    for shard in range(SHARDS):
        write_shard(root / "x" / f"train.{shard:05d}.json.gz", sentences(300 + shard, 1000 * shard))
    write_shard(root / "x" / "validation.00000.json.gz", sentences(10, 3000))
    return Tokenizing(root)


@pytest.fixture(scope="module")
def whole(place: Tokenizing) -> Path:
    """What an uninterrupted program writes."""
    out = place.root / "whole"
    outcome = place.run(out)
    assert outcome.returncode == 0, outcome.stderr
    return out


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("0*") if path.is_file()}


def inodes(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in out.rglob("0*.tokens")}


def test_the_verb_prints_one_json_object_and_training_can_read_the_result(
    place: Tokenizing, tmp_path: Path
) -> None:
    keys = place.keys(tmp_path / "out", "data.workers=2", "data.engine=auto")
    outcome = place.trainyard("tokenize", *keys, "--json")
    assert outcome.returncode == 0, outcome.stderr
    summary = json.loads(outcome.stdout)
    counted = {key: summary[key] for key in ("complete", "shards", "finished", "tokenized", "faults")}
    assert counted == {"complete": True, "shards": 12, "finished": 12, "tokenized": 12, "faults": {}}
    assert summary["documents"] == sum(300 + shard for shard in range(SHARDS))
    config = compose(keys)
    train, held_out = list_corpora(config.data, [].append)
    corpus = TokenizedCorpus.open(config.data, "x", train["x"], held_out, load_tokenizer(config.model))
    assert len(corpus.addresses) == SHARDS


def test_without_a_directory_there_is_nothing_to_write(place: Tokenizing) -> None:
    outcome = place.trainyard("tokenize", *place.keys(Path("null")))
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert (
        outcome.stderr == "trainyard: data.tokenized=null: give the directory to write, data.tokenized=DIR\n"
    )


@pytest.mark.parametrize("options", [[], ["--verify"]])
def test_a_file_in_place_of_the_directory_is_a_mistake(
    place: Tokenizing, tmp_path: Path, options: list[str]
) -> None:
    (tmp_path / "file").touch()
    outcome = place.run(tmp_path / "file", *options)
    assert outcome.returncode == 2
    assert outcome.stderr == f"trainyard: data.tokenized={tmp_path / 'file'}: must be a directory\n"


def test_overrides_may_follow_options(place: Tokenizing, tmp_path: Path) -> None:
    first, *rest = place.keys(tmp_path / "out")
    outcome = place.trainyard("tokenize", first, "--part", "5/4", *rest)
    assert outcome.stderr.startswith("trainyard: --part=5/4: must be I/N")


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "1/0", "a/b"])
def test_a_share_that_is_none_is_a_mistake(place: Tokenizing, tmp_path: Path, part: str) -> None:
    outcome = place.run(tmp_path / "out", f"--part={part}")
    assert outcome.returncode == 2
    assert outcome.stderr.startswith(f"trainyard: --part={part}: must be I/N with I from 1 to N")
    assert not (tmp_path / "out").exists()


def test_a_killed_program_is_taken_up_where_it_was(place: Tokenizing, tmp_path: Path) -> None:
    for shard in range(4):
        write_shard(tmp_path / "large" / f"{shard}.json.gz", sentences(4000, 5000 * shard))
    train = f"data.corpora.x.train={tmp_path / 'large'}/*"
    out, whole = tmp_path / "out", tmp_path / "whole"
    program = subprocess.Popen(place.command(out, more=(train,)), cwd=place.root, env=place.environment)
    try:
        while not (finished := {path.stem for path in out.rglob("0*.json")}):
            assert program.poll() is None
            time.sleep(0.001)
    finally:
        program.send_signal(signal.SIGKILL)
        program.wait()
    assert not (out / MANIFEST).exists()
    kept = {name: inode for name, inode in inodes(out).items() if name.split(".")[0] in finished}
    fast = (train, "data.engine=auto", "data.workers=2")
    outcomes = [place.run(directory, "--json", more=fast) for directory in (out, whole)]
    assert [outcome.returncode for outcome in outcomes] == [0, 0]
    tokenized = [json.loads(outcome.stdout)["tokenized"] for outcome in outcomes]
    assert 0 < tokenized[0] <= 4 - len(kept)
    assert tokenized[1] == 4
    assert {name: inodes(out)[name] for name in kept} == kept
    assert files(out) == files(whole)
    assert (out / MANIFEST).read_bytes() == (whole / MANIFEST).read_bytes()


def test_shares_done_at_once_make_what_one_program_makes(
    place: Tokenizing, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    programs = [
        subprocess.Popen(
            place.command(out, f"--part={part}/2"),
            cwd=place.root,
            env=place.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in (1, 2)
    ]
    told = [program.communicate()[0] for program in programs]
    assert [program.returncode for program in programs] == [0, 0]
    assert any(line.endswith("; complete\n") for line in told)
    assert files(out) == files(whole)
    assert (out / MANIFEST).read_bytes() == (whole / MANIFEST).read_bytes()


def test_nothing_is_done_twice(place: Tokenizing, whole: Path) -> None:
    before = inodes(whole)
    outcome = place.run(whole)
    assert outcome.returncode == 0
    assert outcome.stdout.startswith(f"{whole}: 0 shards tokenized in ")
    assert outcome.stdout.endswith(" tokens; complete\n")
    assert len(outcome.stdout.splitlines()) == 1
    assert inodes(whole) == before


def test_one_share_alone_leaves_the_directory_unfinished(place: Tokenizing, tmp_path: Path) -> None:
    outcome = place.run(tmp_path / "out", "--part=3/5")
    assert outcome.returncode == 0
    assert outcome.stdout.endswith("; 10 of 12 shards are still missing\n")
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_verifying_finds_a_flipped_bit_and_tokenizing_again_mends_it(place: Tokenizing, whole: Path) -> None:
    assert place.run(whole, "--verify").stdout == f"{whole}: 24 files are whole\n"
    file = whole / "x" / "00003.tokens"
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    outcome = place.run(whole, "--verify", "--json")
    assert outcome.returncode == 2
    assert json.loads(outcome.stdout)["damaged"] == [str(file)]
    assert outcome.stderr == f"trainyard: {file}: damaged; remove it and tokenize again\n"
    file.unlink()
    assert place.run(whole).returncode == 0
    assert file.read_bytes() == content


def test_a_fault_that_fails_ends_it_with_one_line(place: Tokenizing, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text('{"text": "a"}\n{damaged\n')
    more = (f"data.corpora.x.train={damaged}", "data.faults.document=fail")
    outcome = place.run(tmp_path / "out", more=more)
    assert outcome.returncode == 2
    [line] = outcome.stderr.splitlines()
    assert line.startswith(f"trainyard: data.faults.document=fail: file://{damaged}, document 1: ")


def test_held_out_documents_are_left_out_and_counted(place: Tokenizing, tmp_path: Path) -> None:
    held_out = place.root / "x" / "train.00005.json.gz"
    more = (f"data.corpora.x.validation={held_out}", "data.decontaminate=exact", "data.workers=2")
    outcome = place.run(tmp_path / "out", more=more)
    assert outcome.returncode == 0, outcome.stderr
    assert ", 305 documents dropped; complete\n" in outcome.stdout
    assert (tmp_path / "out" / "x" / "00005.tokens").stat().st_size == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "tmpfs", disk]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("A FULL DISK WAS NOT TESTED: that needs root and the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_one_line_and_what_is_done_stays(
    place: Tokenizing, whole: Path, small_disk: Path
) -> None:
    outcome = place.run(small_disk / "out")
    assert outcome.returncode == 3
    [line] = outcome.stderr.splitlines()
    assert line.startswith("trainyard: ")
    assert "No space left on device; what is done is kept" in line
    done = [path.stem for path in (small_disk / "out").rglob("0*.json")]
    assert 0 < len(done) < SHARDS
    assert all(
        (small_disk / "out" / "x" / f"{stem}.tokens").read_bytes() == files(whole)[f"x/{stem}.tokens"]
        for stem in done
    )
