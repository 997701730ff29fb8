"""Text to token ids, with special tokens never parsed out of documents."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from configs.schema import ConfigError, Model
from trainer.data.blocks import Ragged, Tokens
from trainer.data.engines import Engine, Fast, NotUsable, Truth, adversarial, difference, sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_ENCODE = 16
"""Of a stream; enough to occupy some cores."""
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
"""By this name a model finds what stands for a byte."""


class Encoder(NamedTuple):
    """What another process needs to tokenize, without transformers and so without torch."""

    encode: Engine
    vocabulary: int
    fingerprint: str


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
        if getattr(tokenizer.backend_tokenizer.model, "dropout", None):
            raise ConfigError(f"{key}: the tokenizer drops merges at random (dropout), so its ids change")
        self.pretrained = tokenizer
        self.end_of_document = int(tokenizer.eos_token_id)
        self.vocabulary = max(tokenizer.get_vocab().values()) + 1
        self.engine: Literal["transformers", "fastokens"] = "transformers"
        self._backend = _for_text(tokenizer.backend_tokenizer)
        self._truth = Truth(self._backend, self.end_of_document)
        self._encode: Engine = self._truth

    @property
    def encoder(self) -> Encoder:
        return Encoder(self._encode, self.vocabulary, self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all that decides ids."""
        written = f"{self._backend.to_str()}\0{self.end_of_document}"
        return hashlib.blake2b(written.encode(), digest_size=16).hexdigest()

    def use_fastokens(self, texts: Iterable[str]) -> str | None:
        """Encode with fastokens from now on, or the reason why not. Raises ImportError without it.

        texts: documents of the corpus, of which the first are compared.
        """
        try:
            fast = Fast(self._backend, self.end_of_document)
        except NotUsable as error:
            return f"it cannot load this tokenizer: {error}"
        special = [str(token) for token in self.pretrained.all_special_tokens]
        differs = difference(fast, self._truth, chain(adversarial(special), sample(texts)))
        if differs is not None:
            return f"other ids than transformers for {differs}"
        self.engine, self._encode = "fastokens", fast
        return None

    def encode(self, texts: Sequence[str]) -> Ragged:
        """Ids of each text, int32, the end-of-document id last; an empty text gives an empty document."""
        return self._encode(texts)

    def encode_stream(self, texts: Iterable[str]) -> Iterator[Tokens]:
        """`encode` of any number of texts, a few at a time; one array for each."""
        remaining = iter(texts)
        while some := list(islice(remaining, DOCUMENTS_PER_ENCODE)):
            documents = self.encode(some)
            ids, bounds = np.asarray(documents.ids, np.int32), documents.starts.tolist()
            yield from (ids[start:end] for start, end in pairwise(bounds))


def load_tokenizer(model: Model) -> DocumentTokenizer:
    """The tokenizer in model.tokenizer, or in model.path. Raises ConfigError naming the key."""
    key = "model.tokenizer" if model.tokenizer else "model.path"
    source = model.tokenizer or model.path
    assert source is not None
    shown = f"{key}={source}"
    if source.startswith(("/", ".")) and not Path(source).is_dir():
        raise ConfigError(f"{shown}: no such directory")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # tokenizers raises bare Exception for a damaged tokenizer.json
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(f"{shown}: no tokenizer could be loaded: {reason}") from None
    return DocumentTokenizer(tokenizer, shown)


def choose_engine(
    tokenizer: DocumentTokenizer,
    setting: Literal["auto", "transformers", "fastokens"],
    texts: Iterable[str],
) -> tuple[DocumentTokenizer, str | None]:
    """The tokenizer with the engine that data.engine asks for, and why it is not the fast one after all.

    fastokens is taken only if it gives the ids of transformers for about a thousand documents of the corpus,
    `texts`, and for texts made to tell tokenizers apart. auto without fastokens installed needs no reason.
    Raises ConfigError where data.engine=fastokens cannot be had.
    """
    if setting == "transformers":
        return tokenizer, None
    try:
        reason = tokenizer.use_fastokens(texts)
    except ImportError:
        if setting == "auto":
            return tokenizer, None
        reason = "it is not installed; allowed: auto, transformers"
    if reason is not None and setting == "fastokens":
        raise ConfigError(f"data.engine=fastokens: {reason}")
    return tokenizer, reason


def _for_text(backend: Tokenizer) -> Tokenizer:
    """A tokenizer that finds no special token in a text.

    Spelled special tokens are not looked for, but some models have them among their pieces: Unigram,
    WordPiece and WordLevel, and BPE where it takes whole words from the vocabulary. There they get names
    that no text has.
    """
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    whole_words = getattr(backend.model, "ignore_merges", True)
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    if not whole_words or not any(backend.model.token_to_id(name) is not None for name in special):
        return backend
    values = json.loads(backend.to_str())
    model = values["model"]
    merged = {"".join(merge) for merge in model.get("merges", ())}
    renamed = {
        name: f"\0{name}\0{hashlib.blake2b(name.encode()).hexdigest()}"
        for name in special
        if len(name) > 1 and name not in merged and not BYTE_PIECE.fullmatch(name)
    }
    if isinstance(model["vocab"], list):
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {renamed.get(piece, piece): number for piece, number in model["vocab"].items()}
    if model.get("unk_token"):
        model["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
    for token in values["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    values["post_processor"] = None
    hidden: Tokenizer = Tokenizer.from_str(json.dumps(values))
    hidden.encode_special_tokens = True
    return hidden
