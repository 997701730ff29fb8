"""Text to token ids, with special tokens never parsed out of documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from configs.schema import ConfigError, Model

Tokens = NDArray[np.int32]
DOCUMENTS_PER_ENCODE = 16
"""Enough to occupy some cores; every lane holds so many encoded documents ahead."""


class DocumentTokenizer:
    """A Hugging Face fast tokenizer for documents.

    A document that contains the text of a special token, `<|endoftext|>` say, must not end there:
    documents are encoded as text, and the end-of-document id is appended by us.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(f"{key}: a fast tokenizer (tokenizer.json) is needed")
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"{key}: the tokenizer has no eos_token, which ends documents")
        self.pretrained = tokenizer
        self.end_of_document = int(tokenizer.eos_token_id)
        self.vocabulary = max(tokenizer.get_vocab().values()) + 1
        self._backend = tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Ids of each text, the end-of-document id last; an empty text gives an empty array."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [
            np.array([*encoding.ids, self.end_of_document] if encoding.ids else [], dtype=np.int32)
            for encoding in encodings
        ]

    def encode_stream(self, texts: Iterable[str]) -> Iterator[Tokens]:
        """`encode` of any number of texts, a few at a time."""
        remaining = iter(texts)
        while some := list(islice(remaining, DOCUMENTS_PER_ENCODE)):
            yield from self.encode(some)


def load_tokenizer(model: Model) -> DocumentTokenizer:
    """The tokenizer in model.tokenizer, or in model.path. Raises ConfigError naming the key."""
    key = "model.tokenizer" if model.tokenizer else "model.path"
    source = model.tokenizer or model.path
    assert source is not None
    shown = f"{key}={source}"
    if source.startswith(("/", ".")) and not Path(source).is_dir():
        raise ConfigError(f"{shown}: no such directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # tokenizers raises bare Exception for a damaged tokenizer.json
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(f"{shown}: no tokenizer could be loaded: {reason}") from None
    return DocumentTokenizer(tokenizer, shown)
