"""How much text there is: counted exactly, or estimated with an error that holds."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from support import sentences, write_shard

from configs.schema import ConfigError, Data
from trainer.data import census
from trainer.data.blocks import Place
from trainer.data.census import Counted, Estimate
from trainer.data.damage import Damage
from trainer.data.listing import Shard, list_shards
from trainer.data.order import Order
from trainer.data.shards import Reading, spans
from trainer.data.tokenizer import DocumentTokenizer

TWO = {"a": {"train": ["a"], "weight": 0.7}, "b": {"train": ["b"], "weight": 0.3}}


def no_damage(damage: Damage) -> None:
    raise AssertionError(damage)


@pytest.fixture
def reading(tmp_path: Path) -> Reading:
    return Reading.of(Data.model_validate({"corpora": TWO}), tmp_path)


def counted(shard: Shard, tokenizer: DocumentTokenizer, reading: Reading, most: float) -> Counted:
    return census.count(
        shard, "text", tokenizer, reading, on_damage=no_damage, kept=None, most_text_bytes=most
    )


def write(path: Path, texts: list[str]) -> Shard:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        lines = texts if ".txt" in path.name else [json.dumps({"text": text}) for text in texts]
        pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
        path.write_bytes(pack("".join(f"{line}\n" for line in lines).encode()))
    return list_shards("key", [str(path)])[0]


def test_a_shard_read_to_its_end_is_counted_exactly(
    tmp_path: Path, tokenizer: DocumentTokenizer, reading: Reading
) -> None:
    texts = [*sentences(300), "", "caf\u00e9"]
    shard = write(tmp_path / "a.jsonl", texts)
    ids = [ids for ids in tokenizer.encode_stream(texts) if len(ids)]
    assert counted(shard, tokenizer, reading, float("inf")) == Counted(
        share=1.0,
        documents=301,
        text_bytes=sum(len(text.encode()) for text in texts),
        tokens=sum(map(len, ids)),
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.jsonl.zst", "a.txt", "a.txt.gz", "a.parquet"])
def test_the_share_of_a_shard_that_was_read_is_known_in_every_format(
    tmp_path: Path,
    tokenizer: DocumentTokenizer,
    reading: Reading,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setattr(census, "RATIO_TEXT_BYTES", 4 << 20)
    words = random.Random(0)
    texts = [" ".join(f"{words.getrandbits(40):x}" for _ in range(100)) for _ in range(6000)]
    shard = write(tmp_path / name, texts)
    places = spans(
        shard, "text", part=0, parts=1, window=500, start=Place(), on_damage=no_damage, reading=reading
    )
    for place, _ in places:
        assert census.text_share(shard, place.offset, reading) == pytest.approx(place.block / 12, rel=0.06)
    part = counted(shard, tokenizer, reading, 100_000)
    assert part.share == pytest.approx(part.documents / 6000, rel=0.06)


def test_a_damaged_file_counts_as_what_can_be_read_of_it(tmp_path: Path, reading: Reading) -> None:
    write_shard(tmp_path / "a.json.gz", sentences(4000))
    whole = (tmp_path / "a.json.gz").read_bytes()
    (tmp_path / "a.json.gz").write_bytes(whole[: len(whole) // 2])
    shard = list_shards("key", [str(tmp_path / "a.json.gz")])[0]
    readable = zlib.decompressobj(31).decompress(whole[: len(whole) // 2])
    assert census.text_share(shard, 1000, reading) == pytest.approx(1000 / len(readable), rel=0.01)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_a_shard_that_goes_away_counts_as_what_was_read_of_it(
    tmp_path: Path, tokenizer: DocumentTokenizer, reading: Reading, name: str
) -> None:
    shard = write(tmp_path / name, sentences(2000))
    damages: list[Damage] = []

    def kept(texts: dict[int, str]) -> dict[int, str]:
        (tmp_path / name).unlink(missing_ok=True)
        return texts

    found = census.count(
        shard, "text", tokenizer, reading, on_damage=damages.append, kept=kept, most_text_bytes=1
    )
    assert (found.share, found.documents) == (1.0, census.DOCUMENTS_PER_COUNT)
    assert [(damage.kind, damage.document) for damage in damages] == [("store", census.DOCUMENTS_PER_COUNT)]


def test_sampled_shards_are_spread_over_the_listing() -> None:
    shards = [Shard(f"{number:04d}.jsonl", 1) for number in range(1000)]
    chosen = [int(shard.address[:4]) for shard in census.sampled(shards)]
    assert len(chosen) == census.SAMPLED_SHARDS
    assert set(np.diff(chosen)) <= {62, 63}
    assert census.sampled(shards[:5]) == shards[:5]


def skewed(generator: random.Random, count: int) -> list[tuple[Shard, Counted]]:
    """Shards of different sizes and languages, all of them counted to the end."""
    found = []
    for number in range(count):
        size = generator.randint(10**6, 10**8)
        tokens = round(size * generator.choice([0.5, 0.7, 1.1]))
        found.append((Shard(f"{number}.json.gz", size), Counted(1.0, tokens // 500, 4 * tokens, tokens)))
    return found


def test_the_stated_interval_holds_on_skewed_shards_19_times_of_20() -> None:
    generator = random.Random(7)
    held, errors = 0, []
    for _ in range(400):
        shards = skewed(generator, 60)
        truth = sum(part.tokens for _, part in shards)
        chosen = generator.sample(shards, census.SAMPLED_SHARDS)
        found = census.estimate(chosen, [shard for shard, _ in shards], lambda part: part.tokens)
        assert found.error is not None
        held += abs(found.value - truth) <= found.error * found.value
        errors.append(found.error)
    assert held / 400 >= 0.9
    assert np.median(errors) < 0.2


def test_what_was_counted_in_full_has_no_error() -> None:
    shards = skewed(random.Random(1), 5)
    found = census.estimate(shards, [shard for shard, _ in shards], lambda part: part.tokens)
    assert found == Estimate(sum(part.tokens for _, part in shards), 0.0)


def test_of_a_part_of_a_single_shard_no_error_can_be_told() -> None:
    shard = Shard("a.json.gz", 1000)
    found = census.estimate([(shard, Counted(0.25, 1, 1, 100))], [shard], lambda part: part.tokens)
    assert found == Estimate(400, None)


def test_shards_without_a_known_size_count_alike() -> None:
    shards = [Shard(f"http://x/{number}.jsonl", None) for number in range(4)]
    counts = [(shards[0], Counted(tokens=90)), (shards[2], Counted(tokens=110))]
    assert census.estimate(counts, shards, lambda part: part.tokens).value == 400


def test_text_that_holds_nothing_is_estimated_as_nothing() -> None:
    shard = Shard("a.jsonl", 0)
    assert census.estimate([(shard, Counted())], [shard], lambda part: part.tokens) == Estimate(0, 0.0)


@pytest.mark.parametrize("wanted", [1, 2, 699, 700, 701])
def test_rows_for_a_corpus_are_the_fewest_that_have_as_many_of_it(wanted: int) -> None:
    data = {
        "corpora": TWO,
        "stages": [{"until_tokens": 160, "weights": {"b": 1}}, {"weights": {"a": 1, "b": 3}}],
    }
    for values in ({"corpora": TWO}, {"corpora": TWO, "temperature": 3.0}, data):
        order = Order(Data.model_validate(values), 16, 0)
        rows = census.rows_for(order, "a", wanted)
        assert order.rows_of(rows)["a"] == wanted
        assert order.rows_of(rows - 1)["a"] == wanted - 1


def test_a_corpus_that_rests_for_good_never_comes_to_its_rows() -> None:
    data = Data.model_validate({"corpora": TWO, "stages": [{"weights": {"b": 1}}]})
    with pytest.raises(ConfigError, match=r"data\.stages: corpus a never comes to 5 rows"):
        census.rows_for(Order(data, 16, 0), "a", 5)
