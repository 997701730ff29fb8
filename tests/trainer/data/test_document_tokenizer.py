"""Documents are text: nothing written in them ends them, and nothing of them is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import VOCABULARY, sentences, write_tokenizer
from transformers import AutoTokenizer

from configs.compose import compose
from configs.schema import ConfigError
from trainer.data.tokenizer import DocumentTokenizer, load_tokenizer


def encoded(tokenizer: DocumentTokenizer, text: str) -> NDArray[np.int32]:
    ids, starts = tokenizer.encode([text])
    assert ids.dtype == np.int32
    assert starts.tolist() == [0, len(ids)]
    return ids


def test_a_special_token_spelled_in_a_document_stays_text(tokenizer: DocumentTokenizer) -> None:
    text = "before <|endoftext|> after"
    tokens = encoded(tokenizer, text)
    assert np.count_nonzero(tokens == tokenizer.end_of_document) == 1
    assert tokenizer.pretrained.decode(tokens[:-1]) == text


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1))
def test_decoding_gives_the_document_back(tokenizer: DocumentTokenizer, text: str) -> None:
    tokens = encoded(tokenizer, text)
    assert tokens[-1] == tokenizer.end_of_document
    assert tokenizer.pretrained.decode(tokens[:-1], clean_up_tokenization_spaces=False) == text


def test_an_empty_document_gives_nothing_not_even_an_end(tokenizer: DocumentTokenizer) -> None:
    assert tokenizer.encode(["", "a", ""]).starts.tolist() == [0, 0, 2, 2]
    ids, starts = tokenizer.encode([])
    assert (len(ids), starts.tolist()) == (0, [0])


def test_long_documents_are_not_cut(tokenizer: DocumentTokenizer) -> None:
    text = " ".join(sentences(2000))
    tokens = encoded(tokenizer, text)
    assert tokenizer.pretrained.decode(tokens[:-1]) == text


def test_a_stream_gives_what_its_documents_give(tokenizer: DocumentTokenizer) -> None:
    texts = sentences(200)
    streamed = list(tokenizer.encode_stream(iter(texts)))
    ids, starts = tokenizer.encode(texts)
    assert np.array_equal(np.concatenate(streamed), ids)
    assert [len(tokens) for tokens in streamed] == np.diff(starts).tolist()


def test_vocabulary_counts_special_tokens(tokenizer: DocumentTokenizer) -> None:
    assert tokenizer.vocabulary == VOCABULARY


def test_a_tokenizer_without_an_end_of_document_names_the_key(tmp_path: Path) -> None:
    pretrained = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path))
    pretrained.eos_token = None
    with pytest.raises(ConfigError, match=r"model\.tokenizer=x: .*eos_token"):
        DocumentTokenizer(pretrained, "model.tokenizer=x")


def test_a_tokenizer_that_drops_merges_at_random_is_refused(tmp_path: Path) -> None:
    pretrained = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path))
    pretrained.backend_tokenizer.model.dropout = 0.1
    with pytest.raises(ConfigError, match=r"model\.tokenizer=x: .*dropout"):
        DocumentTokenizer(pretrained, "model.tokenizer=x")


def test_the_fingerprint_is_the_same_in_every_process(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    program = (
        "import sys\n"
        "from transformers import AutoTokenizer\n"
        "from trainer.data.tokenizer import DocumentTokenizer\n"
        "print(DocumentTokenizer(AutoTokenizer.from_pretrained(sys.argv[1]), 'x').fingerprint)"
    )
    directory = write_tokenizer(tmp_path)
    outcome = subprocess.run(
        [sys.executable, "-c", program, str(directory)], capture_output=True, text=True, check=True
    )
    assert outcome.stdout.split()[-1] == tokenizer.fingerprint


def test_the_fingerprint_changes_with_what_decides_ids(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    directory = write_tokenizer(tmp_path)
    file = directory / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["merges"].pop()
    file.write_text(json.dumps(values))
    fewer_merges = AutoTokenizer.from_pretrained(directory)
    assert DocumentTokenizer(fewer_merges, "x").fingerprint != tokenizer.fingerprint
    other_end = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "other"), eos_token="!")
    assert DocumentTokenizer(other_end, "x").fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("damage", ["absent", "empty", "damaged"])
def test_a_tokenizer_that_cannot_be_loaded_names_the_key(tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "tokenizer"
    if damage != "absent":
        directory.mkdir()
    if damage == "damaged":
        (write_tokenizer(directory) / "tokenizer.json").write_text("{")
    config = compose(
        [
            "model=llama-demo",
            f"model.tokenizer={directory}",
            f"data.corpora.x.train={tmp_path}",
        ]
    )
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(config.model)
    assert f"model.tokenizer={directory}" in str(caught.value)
    assert "\n" not in str(caught.value)
