from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from support import Site, write_tokenizer

from trainer.data.tokenizer import DocumentTokenizer

# The same examples every time, and no stopwatch: a busy machine must not fail a test.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A user's directory with corpora, tokenizer and the overrides of a small run."""
    return Site.create(tmp_path)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> DocumentTokenizer:
    """A small byte-level tokenizer, loaded."""
    from transformers import AutoTokenizer

    directory = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return DocumentTokenizer(AutoTokenizer.from_pretrained(directory), "model.tokenizer")
