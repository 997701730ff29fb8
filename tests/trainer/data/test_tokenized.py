"""Tokens that were written ahead give the rows that the text itself gives, or are refused by name."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import sentences
from transformers import AutoTokenizer

from configs.schema import ConfigError, Data
from trainer.data import tokenized_writer
from trainer.data.blocks import Corpus, Place, Tokens
from trainer.data.damage import DamagedShard, Unavailable
from trainer.data.decontaminate import Decontamination, HeldOut
from trainer.data.lanes import Cursor, Lane
from trainer.data.listing import Shard, list_shards
from trainer.data.shards import Reading
from trainer.data.sources import MOST_DAMAGED, Shards, first_texts, list_corpora
from trainer.data.texts import TextCorpus
from trainer.data.tokenized import MANIFEST, Entry, TokenizedCorpus, base_of, id_type
from trainer.data.tokenized_writer import UNFINISHED, Writer
from trainer.data.tokenizer import DocumentTokenizer
from trainer.data.workers import Workers

LENGTH = 16
EPOCH_AND_MORE = 600


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of several formats, with damaged, empty and held-out documents at the ends and in between."""
    directory = tmp_path_factory.mktemp("text")
    texts = sentences(190)
    lines = [json.dumps({"text": one}) for one in texts[:120]]
    lines[0:0] = ["{damaged"]
    lines[30:30] = [json.dumps({"text": ""}), "{damaged", json.dumps({"other": 1})]
    lines += [json.dumps({"text": ""}), "{damaged", "{damaged"]
    (directory / "a.jsonl").write_text("\n".join(lines))
    with gzip.open(directory / "b.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": one}) + "\n" for one in texts[120:])
    (directory / "c.jsonl").write_text("{damaged\n" * 3)
    return directory


def data_of(text: Path, tokenized: Path, **keys: object) -> Data:
    corpora = {"x": {"train": [f"{text}/*.jsonl", f"{text}/*.gz"], "validation": f"{text}/b.json.gz"}}
    return Data.model_validate({"corpora": corpora, "tokenized": str(tokenized), "shuffle_window": 8} | keys)


def shards_of(data: Data) -> list[Shard]:
    return list_shards("data.corpora.x.train", data.corpora["x"].train or [])


def held_out_of(data: Data) -> Shards:
    return {
        name: list_shards(f"data.corpora.{name}.validation", corpus.validation)
        for name, corpus in data.corpora.items()
        if corpus.validation
    }


def writer_of(
    data: Data,
    tokenizer: DocumentTokenizer,
    decontamination: Decontamination | None = None,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Writer:
    directory = Path(data.tokenized or "")
    return Writer(directory, data, held_out_of(data), tokenizer.encoder, decontamination, on_tokens)


def tokenize(
    data: Data, tokenizer: DocumentTokenizer, decontamination: Decontamination | None = None
) -> list[Entry]:
    Path(data.tokenized or "").mkdir(exist_ok=True)
    writer = writer_of(data, tokenizer, decontamination)
    entries = [writer.write("x", number, shard) for number, shard in enumerate(shards_of(data))]
    writer.finish({"x": entries})
    return entries


@pytest.fixture(scope="module")
def written(text: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: DocumentTokenizer) -> Data:
    data = data_of(text, tmp_path_factory.mktemp("tokenized") / "out")
    tokenize(data, tokenizer)
    return data


def tokenized(data: Data, tokenizer: DocumentTokenizer) -> TokenizedCorpus:
    return TokenizedCorpus.open(data, "x", shards_of(data), held_out_of(data), tokenizer)


def as_text(
    data: Data, tokenizer: DocumentTokenizer, kept: Callable[[dict[int, str]], dict[int, str]] | None = None
) -> TextCorpus:
    reading = Reading.of(data, Path(os.devnull))
    return TextCorpus(shards_of(data), "text", data.shuffle_window, tokenizer, [].append, reading, kept)


def open_lane(corpus: Corpus, data: Data, lane: int = 0, cursor: Cursor | None = None) -> Lane:
    workers = Workers(0)
    return Lane(
        "x", lane, corpus, data, sequence_length=LENGTH, seed=1, cursor=cursor or Cursor(), workers=workers
    )


def rows(lane: Lane, count: int) -> Tokens:
    return np.concatenate([lane.take(1)[0].astype(np.int32) for _ in range(count)])


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize(("lanes", "window"), [(1, 8), (2, 1), (4, 64), (7, 1000)])
def test_rows_are_those_of_the_text(
    written: Data, tokenizer: DocumentTokenizer, packing: str, lanes: int, window: int
) -> None:
    data = written.model_copy(update={"lanes": lanes, "shuffle_window": window, "packing": packing})
    for lane in range(lanes):
        ours = open_lane(tokenized(data, tokenizer), data, lane)
        theirs = open_lane(as_text(data, tokenizer), data, lane)
        assert np.array_equal(rows(ours, EPOCH_AND_MORE // lanes), rows(theirs, EPOCH_AND_MORE // lanes))
        assert ours.mark.epoch > 0


@pytest.mark.parametrize("read", [0, 1, 7, 40, 150, 333])
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_run_goes_on_with_tokens_where_it_left_the_text_and_back(
    written: Data, tokenizer: DocumentTokenizer, packing: str, read: int
) -> None:
    data = written.model_copy(update={"packing": packing, "lanes": 1})
    corpora = [as_text(data, tokenizer), tokenized(data, tokenizer)]
    whole = rows(open_lane(corpora[0], data), read + 80)
    for first, then in (corpora, corpora[::-1]):
        lane = open_lane(first, data)
        if read:
            rows(lane, read)
        after = rows(open_lane(then, data, cursor=lane.mark.cursor()), 80)
        assert np.array_equal(after, whole[read:])


@pytest.mark.parametrize("parts", [1, 3])
def test_blocks_hold_the_documents_that_the_text_has(
    written: Data, tokenizer: DocumentTokenizer, parts: int
) -> None:
    for shard in range(3):
        for part in range(parts):
            ours, theirs = (
                {
                    (block.place.block, number): block.encode([number]).ids.tolist()
                    for block in corpus.blocks(shard, part, parts, Place())
                    for number in block.documents
                }
                for corpus in (tokenized(written, tokenizer), as_text(written, tokenizer))
            )
            assert ours == {place: ids for place, ids in theirs.items() if ids}


def test_documents_come_in_the_order_asked_for(written: Data, tokenizer: DocumentTokenizer) -> None:
    block = next(tokenized(written, tokenizer).blocks(1, 0, 1, Place(2)))
    assert block.place == Place(2)
    one_by_one = [block.encode([number]).ids for number in (5, 0, 3)]
    ids, starts = block.encode([5, 0, 3])
    assert np.array_equal(ids, np.concatenate(one_by_one))
    assert np.diff(starts).tolist() == [len(one) for one in one_by_one]


def test_a_large_vocabulary_takes_four_bytes_an_id(
    text: Path, tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    assert (id_type(65_536), id_type(65_537)) == (np.dtype("<u2"), np.dtype("<u4"))
    large = DocumentTokenizer(tokenizer.pretrained, "x")
    large.vocabulary = 70_000
    data = data_of(text, tmp_path / "out")
    [entry, *_] = tokenize(data, large)
    assert base_of(tmp_path / "out", "x", 0).with_suffix(".tokens").stat().st_size == 4 * entry.tokens
    ours, theirs = (open_lane(corpus(data, large), data) for corpus in (tokenized, as_text))
    assert np.array_equal(rows(ours, 50), rows(theirs, 50))


def test_faults_are_counted_and_told(text: Path, tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    data = data_of(text, tmp_path / "out")
    entries = tokenize(data, tokenizer)
    assert [entry.faults for entry in entries] == [{"document": 5}, {}, {"document": 3}]
    assert [entry.documents for entry in entries] == [125, 70, 0]  # the last two of a.jsonl are damaged
    events = (tmp_path / "out" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in events] == ["data_damage"] * 8


def test_a_fault_that_fails_leaves_no_file(text: Path, tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    data = data_of(text, tmp_path / "out", faults={"document": "fail"})
    with pytest.raises(DamagedShard, match=r"^data\.faults\.document=fail: .*a\.jsonl, document 0: "):
        tokenize(data, tokenizer)
    assert not list((tmp_path / "out" / "x").iterdir())


def test_a_store_that_fails_never_makes_a_shorter_shard(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    data = data_of(tmp_path, tmp_path / "out", faults={"store": "skip"})
    data.corpora["x"].validation = None
    writer = writer_of(data, tokenizer)
    gone = Shard(f"file://{tmp_path}/gone.jsonl", 14)
    with pytest.raises(Unavailable, match=r"gone\.jsonl, document 0: "):
        writer.write("x", 0, gone)
    assert writer.finished("x", 0, gone) is None


def test_held_out_documents_are_dropped_and_counted(
    text: Path, tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    data = data_of(text, tmp_path / "out", decontaminate="exact")
    cleaned = Decontamination(HeldOut.of(sentences(190)[100:130], "exact"))
    entries = tokenize(data, tokenizer, cleaned)
    assert [entry.dropped for entry in entries] == [20, 10, 0]
    ours = open_lane(tokenized(data, tokenizer), data)
    theirs = open_lane(as_text(data, tokenizer, lambda texts: cleaned.kept("x", texts)), data)
    assert np.array_equal(rows(ours, EPOCH_AND_MORE), rows(theirs, EPOCH_AND_MORE))


def cut_short(directory: Path) -> None:
    file = base_of(directory, "x", 1).with_suffix(".tokens")
    file.write_bytes(file.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (shutil.rmtree, "no such directory"),
        (lambda out: (out / MANIFEST).unlink(), "not finished, run `trainyard tokenize` again"),
        (lambda out: (out / MANIFEST).write_text("{"), "manifest.json is damaged; run "),
        (lambda out: (out / MANIFEST).write_text("[]"), "manifest.json is damaged; run "),
        (lambda out: (out / MANIFEST).write_text('{"corpora": []}'), "manifest.json is damaged; run "),
        (lambda out: (out / MANIFEST).write_text('{"corpora": {"x": {}}}'), "manifest.json is damaged; run "),
        (
            lambda out: (out / MANIFEST).write_text('{"corpora": {"x": {"terms": null, "shards": [{}]}}}'),
            "manifest.json is damaged; run ",
        ),
        (lambda out: (out / MANIFEST).write_text('{"corpora": {}}'), "corpus x is not in it; run "),
        (cut_short, "00001.tokens has "),
        (lambda out: base_of(out, "x", 0).with_suffix(".offsets").unlink(), "00000.offsets is missing; run "),
    ],
)
def test_an_unfinished_or_damaged_directory_is_refused(
    written: Data, tmp_path: Path, tokenizer: DocumentTokenizer, change: Callable[[Path], None], line: str
) -> None:
    out = shutil.copytree(written.tokenized or "", tmp_path / "out")
    data = written.model_copy(update={"tokenized": str(out)})
    tokenized(data, tokenizer)
    change(out)
    with pytest.raises(ConfigError) as caught:
        tokenized(data, tokenizer)
    assert str(caught.value).startswith(f"data.tokenized={out}: ")
    assert line in str(caught.value)


def test_other_text_and_other_settings_are_refused_by_name(
    text: Path, written: Data, tokenizer: DocumentTokenizer
) -> None:
    def refused(data: Data, shards: list[Shard], by: DocumentTokenizer = tokenizer) -> str:
        with pytest.raises(ConfigError) as caught:
            TokenizedCorpus.open(data, "x", shards, held_out_of(data), by)
        return str(caught.value).removeprefix(f"data.tokenized={written.tokenized}: ")

    shards = shards_of(written)
    grown = shards[1]._replace(size_bytes=1)
    other = DocumentTokenizer(
        AutoTokenizer.from_pretrained(tokenizer.pretrained.name_or_path, eos_token="!"), "x"
    )
    fields = written.model_copy(deep=True)
    fields.corpora["x"].text_field = "body"
    cleaned = written.model_copy(update={"decontaminate": "exact"})
    again = "; run `trainyard tokenize` again"
    others = "data.corpora.x.train has other shards than were tokenized: "
    assert refused(written, [shards[0], grown, shards[2]]) == f"{others}{grown.address}{again}"
    assert refused(written, shards[:2]) == f"{others}{shards[2].address}{again}"
    assert refused(written, shards[::-1]) == f"{others}their order{again}"
    made = "corpus x was tokenized with another "
    assert refused(written, shards, other) == f"{made}model.tokenizer"
    assert refused(fields, shards) == f"{made}data.corpora.x.text_field"
    assert refused(cleaned, shards) == f"{made}data.decontaminate"


def test_other_held_out_text_is_refused_where_it_decided(
    text: Path, tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    data = data_of(text, tmp_path / "out", decontaminate="exact")
    tokenize(data, tokenizer, Decontamination(HeldOut.of([], "exact")))
    data.corpora["x"].validation = [f"{text}/a.jsonl"]
    with pytest.raises(ConfigError, match=r"another data\.corpora\.x\.validation"):
        tokenized(data, tokenizer)


def test_held_out_text_that_grew_is_refused_where_it_decided(
    tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    held_out = tmp_path / "held-out.json"
    held_out.write_text('{"text": "two"}\n')
    corpora = {"x": {"train": f"{tmp_path}/a.jsonl", "validation": f"{tmp_path}/held*"}}
    data = data_of(tmp_path, tmp_path / "out", corpora=corpora, decontaminate="exact")
    tokenize(data, tokenizer, Decontamination(HeldOut.of(["two"], "exact")))
    tokenized(data, tokenizer)
    held_out.write_text('{"text": "two"}\n{"text": "one"}\n')
    with pytest.raises(ConfigError, match=r"another data\.corpora\.x\.validation"):
        tokenized(data, tokenizer)
    with pytest.raises(ConfigError, match=r"another data\.corpora\.x\.validation"):
        writer_of(data, tokenizer).finished("x", 0, shards_of(data)[0])


def test_the_record_of_a_shard_does_not_outlive_its_tokens(
    tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, word in (("a", "aaa"), ("b", "bbb")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{word}"}}\n')
    corpora = {"x": {"train": f"{tmp_path}/*.jsonl"}}
    data = data_of(tmp_path, tmp_path / "out", corpora=corpora)
    first, second = shards_of(data)
    writer = writer_of(data, tokenizer)
    writer.write("x", 0, second)

    def killed(path: Path, values: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenized_writer, "_write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.write("x", 0, first)
    assert writer.finished("x", 0, second) is None


def test_tokens_written_anew_under_a_reader_are_not_read(
    text: Path, tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    data = data_of(text, tmp_path / "out")
    tokenize(data, tokenizer)
    corpus = tokenized(data, tokenizer)
    tokenize(data, tokenizer)
    with pytest.raises(DamagedShard, match=r"00000\.tokens: changed since "):
        next(corpus.blocks(0, 0, 1, Place()))


def test_first_texts_are_not_looked_for_in_all_of_a_damaged_corpus(tmp_path: Path) -> None:
    damaged = '{"body": "x"}\n' * (MOST_DAMAGED + 1)
    (tmp_path / "a.jsonl").write_text(damaged + '{"text": "beyond"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "of another corpus"}\n')
    corpora = {name: {"train": f"{tmp_path}/{name}.jsonl"} for name in "ab"}
    data = data_of(tmp_path, tmp_path / "out", corpora=corpora)
    train, _ = list_corpora(data, [].append)
    assert list(first_texts(data, train, Reading.of(data, tmp_path))) == ["of another corpus"]


def test_a_finished_shard_is_known_and_an_altered_one_is_not(
    text: Path, tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    data = data_of(text, tmp_path / "out")
    entries = tokenize(data, tokenizer)
    writer = writer_of(data, tokenizer)
    shards = shards_of(data)
    assert [writer.finished("x", number, shard) for number, shard in enumerate(shards)] == entries
    assert writer.finished("x", 0, shards[0]._replace(size_bytes=1)) is None
    assert writer.finished("x", 0, shards[1]) is None
    cut_short(tmp_path / "out")
    assert writer.finished("x", 1, shards[1]) is None
    other = data.model_copy(deep=True)
    other.corpora["x"].text_field = "body"
    with pytest.raises(ConfigError, match=r"another data\.corpora\.x\.text_field; give another directory"):
        writer_of(other, tokenizer).finished("x", 0, shards[0])


def test_two_processes_do_not_write_one_shard(
    text: Path, tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    data = data_of(text, tmp_path / "out")
    [shard, *_] = shards_of(data)
    refusals = []

    def meanwhile(tokens: int) -> None:
        with pytest.raises(ConfigError, match=r"another process is writing .*00000\.tokens$") as caught:
            writer_of(data, tokenizer).write("x", 0, shard)
        refusals.append(caught)

    first = writer_of(data, tokenizer, on_tokens=meanwhile)
    entry = first.write("x", 0, shard)
    assert refusals
    assert first.finished("x", 0, shard) == entry
    assert not list((tmp_path / "out").rglob(f"*{UNFINISHED}"))
