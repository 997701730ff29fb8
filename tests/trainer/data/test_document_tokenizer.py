"""Documents are text: nothing written in them ends them, and nothing of them is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import VOCABULARY, sentences, write_tokenizer
from transformers import AutoTokenizer

from configs.compose import compose
from configs.schema import ConfigError
from trainer.data.tokenizer import DocumentTokenizer, load_tokenizer


def test_a_special_token_spelled_in_a_document_stays_text(tokenizer: DocumentTokenizer) -> None:
    text = "before <|endoftext|> after"
    [tokens] = tokenizer.encode([text])
    assert np.count_nonzero(tokens == tokenizer.end_of_document) == 1
    assert tokenizer.pretrained.decode(tokens[:-1]) == text


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1))
def test_decoding_gives_the_document_back(tokenizer: DocumentTokenizer, text: str) -> None:
    [tokens] = tokenizer.encode([text])
    assert tokens.dtype == np.int32
    assert tokens[-1] == tokenizer.end_of_document
    assert tokenizer.pretrained.decode(tokens[:-1], clean_up_tokenization_spaces=False) == text


def test_an_empty_document_gives_nothing_not_even_an_end(tokenizer: DocumentTokenizer) -> None:
    assert [len(tokens) for tokens in tokenizer.encode(["", "a", ""])] == [0, 2, 0]


def test_long_documents_are_not_cut(tokenizer: DocumentTokenizer) -> None:
    text = " ".join(sentences(2000))
    [tokens] = tokenizer.encode([text])
    assert tokenizer.pretrained.decode(tokens[:-1]) == text


def test_a_stream_gives_what_its_documents_give(tokenizer: DocumentTokenizer) -> None:
    texts = sentences(200)
    streamed = list(tokenizer.encode_stream(iter(texts)))
    assert all(map(np.array_equal, streamed, tokenizer.encode(texts)))
    assert len(streamed) == len(texts)


def test_vocabulary_counts_special_tokens(tokenizer: DocumentTokenizer) -> None:
    assert tokenizer.vocabulary == VOCABULARY


def test_a_tokenizer_without_an_end_of_document_names_the_key(tmp_path: Path) -> None:
    pretrained = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path))
    pretrained.eos_token = None
    with pytest.raises(ConfigError, match=r"model\.tokenizer=x: .*eos_token"):
        DocumentTokenizer(pretrained, "model.tokenizer=x")


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
