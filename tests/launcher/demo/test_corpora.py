"""The demo's corpora: C4-shaped, reproducible, split without leaks; their tokenizer loads in transformers."""

import gzip
import json
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from launcher.demo import corpora

VOCABULARY = 2048
NGRAM_WORDS = 13


def build_in_new_process(root: Path) -> None:
    """Builds where strings hash differently and no tokenizer thread has run."""
    program = (
        f"from pathlib import Path; from launcher.demo import corpora; corpora.build(Path({str(root)!r}))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def rows(root: Path, corpus: str, split: str) -> list[dict[str, str]]:
    shards = sorted((root / "data" / corpus).glob(f"{corpus}-{split}.*.json.gz"))
    lines = [line for shard in shards for line in gzip.decompress(shard.read_bytes()).splitlines()]
    return [json.loads(line) for line in lines]


def ngrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    corpora.build(root)
    return root


@pytest.fixture(scope="module")
def train_texts(root: Path) -> list[str]:
    return [row["text"] for corpus in ("general", "legal") for row in rows(root, corpus, "train")]


def test_shards_are_named_like_c4(root: Path) -> None:
    names = {name for name in files(root / "data") if name.endswith(".gz")}
    assert names == {
        *(f"general/general-train.{shard:05}-of-00004.json.gz" for shard in range(4)),
        *(f"legal/legal-train.{shard:05}-of-00002.json.gz" for shard in range(2)),
        "general/general-validation.00000-of-00001.json.gz",
        "legal/legal-validation.00000-of-00001.json.gz",
    }


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("corpus", ["general", "legal"])
def test_lines_have_the_fields_of_c4(root: Path, corpus: str, split: str) -> None:
    documents = rows(root, corpus, split)
    assert documents
    for row in documents:
        assert set(row) == {"text", "timestamp", "url"}
        assert row["text"].strip()
        assert "://" in row["url"]
        assert row["timestamp"].endswith("Z")
        datetime.fromisoformat(row["timestamp"])
    assert len({row["url"] for row in documents}) == len(documents)


@pytest.mark.parametrize("corpus", ["general", "legal"])
def test_counts_are_those_of_the_files(root: Path, corpus: str) -> None:
    train, validation = ([row["text"] for row in rows(root, corpus, s)] for s in ("train", "validation"))
    shard_bytes = [len(content) for content in files(root / "data" / corpus).values()]
    assert corpora.build(root)[corpus] == {
        "documents": len(train + validation),
        "characters": sum(map(len, train + validation)),
        "compressed_bytes": sum(shard_bytes),
        "shards": len(shard_bytes),
        "validation_documents": len(validation),
        "validation_characters": sum(map(len, validation)),
    }


@pytest.mark.parametrize("corpus", ["general", "legal"])
def test_a_twentieth_or_little_more_is_held_out(root: Path, corpus: str) -> None:
    counts = corpora.build(root)[corpus]
    assert 0.05 < counts["validation_characters"] / counts["characters"] < 0.08


@pytest.mark.parametrize("corpus", ["general", "legal"])
def test_no_validation_text_is_trained_on(root: Path, train_texts: list[str], corpus: str) -> None:
    validation = [row["text"] for row in rows(root, corpus, "validation")]
    everything = "\n\n".join(train_texts)
    assert not [text for text in validation if text in everything]
    trained, held_out = (set().union(*map(ngrams, texts)) for texts in (train_texts, validation))
    assert len(trained & held_out) / len(held_out) < 0.05  # the set phrases of licences remain


def test_another_process_writes_the_same_bytes(root: Path, tmp_path: Path) -> None:
    build_in_new_process(tmp_path)
    assert files(tmp_path) == files(root)


def test_a_finished_build_is_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(corpora, "unseen")
    counts = corpora.build(root)
    assert set(counts) == {"general", "legal"}


def test_a_half_built_one_and_another_vocabulary_are_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"word{i} of the paragraph and that is all to be had with it. " * 9 for i in range(99)]
    named = [(f"test://{i}", text) for i, text in enumerate(texts)]
    monkeypatch.setattr(corpora, "general_texts", lambda: named[::2])
    monkeypatch.setattr(corpora, "legal_texts", lambda: named[1::2])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    corpora.build(whole, vocabulary=300)

    with monkeypatch.context() as interrupted:
        interrupted.delattr(corpora, "write_tokenizer")
        with pytest.raises(NameError):
            corpora.build(broken, vocabulary=300)
    assert not (broken / "data").exists()
    (broken / "tokenizer").mkdir()  # what a kill between the two renames leaves
    corpora.build(broken, vocabulary=300)
    assert files(broken) == files(whole)

    corpora.build(broken, vocabulary=280)
    assert files(broken)["tokenizer/tokenizer.json"] != files(whole)["tokenizer/tokenizer.json"]


def test_transformers_loads_the_tokenizer_and_texts_survive_it(root: Path, train_texts: list[str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer("a<|endoftext|>").input_ids[-1] == tokenizer.eos_token_id == 0
    for text in [*train_texts[:50], "  spaces , \t tabs\r\n\n", "Ünïcödé 漢字 🚂", "a , b . isn 't"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_building_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, launcher.demo.corpora; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
