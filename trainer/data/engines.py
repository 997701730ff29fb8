"""What turns text into ids: tokenizers, which is the truth, or fastokens, where it gives the same ids."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from trainer.data.blocks import Ragged

Engine = Callable[[Sequence[str]], Ragged]
"""Ids of each text, the end-of-document id last; an empty text is an empty document. Threads may share it."""

COMPARED_DOCUMENTS = 1000
COMPARED_CHARACTERS = 600
"""Of each; so the comparison takes about half a second on two cores."""
CHARACTERS_PER_ENCODE = 1 << 20
"""tokenizers takes some 230 bytes for a token while it encodes, so it gets long documents a few at a time."""
TEXTS_PER_COMPARISON = 64
RUN_CHARACTERS = 4096
"""Length of the adversarial runs; engines merge them by their own rules for long words."""
SHOWN_CHARACTERS = 60


def fastokens_version() -> str | None:
    """Of what is installed, if it is."""
    try:
        return version("fastokens")
    except PackageNotFoundError:
        return None


class NotUsable(Exception):
    """The fast engine cannot load a tokenizer."""


class Truth:
    """tokenizers, which transformers uses itself."""

    def __init__(self, backend: Tokenizer, end_of_document: int) -> None:
        self._backend = backend
        self._end = end_of_document

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (Truth, self._backend.to_str(), self._end)

    def __call__(self, texts: Sequence[str]) -> Ragged:
        found = [array for some in _batches(texts) for array in self._encoded(some)]
        starts = _starts(np.fromiter(map(len, found), np.int64, len(found)))
        ids = np.full(starts[-1], self._end, np.int32)
        for start, array in zip(starts.tolist(), found, strict=False):
            ids[start : start + len(array)] = array
        return Ragged(ids, starts)

    def _encoded(self, texts: list[str]) -> list[NDArray[np.int32]]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.fromiter(encoding.ids, np.int32, len(encoding)) for encoding in encodings]


class Fast:
    """fastokens; texts that it refuses go to the truth. Raises NotUsable for an unsupported tokenizer."""

    def __init__(self, backend: Tokenizer, end_of_document: int) -> None:
        import fastokens

        try:
            self._encode = fastokens.Tokenizer.from_json_str(backend.to_str()).encode_batch_flat
        except Exception as error:
            raise NotUsable(f"{error}"[:200]) from None
        self._end = end_of_document
        self._truth = Truth(backend, end_of_document)

    def __reduce__(self) -> tuple[Any, ...]:
        _, (_, written, end) = self._truth.__reduce__()
        return _made, (Fast, written, end)

    def __call__(self, texts: Sequence[str]) -> Ragged:
        try:
            flat, borders = self._encode(list(texts), split_special_tokens=True)
        except ValueError:
            return self._truth(texts)
        ends = np.frombuffer(borders, "<i8")
        lengths = np.diff(ends)
        tokens = np.frombuffer(flat, "<i4")
        return Ragged(np.insert(tokens, ends[1:][lengths > 0], self._end), _starts(lengths))


def difference(fast: Engine, truth: Engine, texts: Iterable[str]) -> str | None:
    """The first of some texts that two engines encode to different ids, shortened; none if there is none."""
    remaining = iter(texts)
    while some := list(islice(remaining, TEXTS_PER_COMPARISON)):
        ours, expected = fast(some), truth(some)
        if np.array_equal(ours.ids, expected.ids) and np.array_equal(ours.starts, expected.starts):
            continue
        for index, text in enumerate(some):
            if not np.array_equal(_document(ours, index), _document(expected, index)):
                cut = len(text) > SHOWN_CHARACTERS
                return repr(text[:SHOWN_CHARACTERS]) + (f"... ({len(text)} characters)" if cut else "")
    return None


def sample(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of the first documents of a corpus, as many as are compared when a run starts.

    From the beginning of the first, further on in each that follows.
    """
    for number, text in enumerate(islice(texts, COMPARED_DOCUMENTS)):
        begin = number * 97 % max(1, len(text) - COMPARED_CHARACTERS)
        yield text[begin : begin + COMPARED_CHARACTERS]


def adversarial(special: Iterable[str]) -> Iterator[str]:
    """Texts at which tokenizers tend to differ. special: texts of the special tokens."""
    yield from ("", " ", "\0", "a\0b", "\ufeffbyte order mark", "\r\n\r\n \t\r\n", "a\u00a0b\u2003c\u3000d")
    yield from (
        unicodedata.normalize(form, "Ångström ﬁve ｶﾞｷﾞ 한글 ñ q\u0323\u0307 ½ ①")
        for form in ("NFC", "NFD", "NFKC")
    )
    yield from (
        "a" + "\u0301" * 50 + "b",
        "👨\u200d👩\u200d👧\u200d👦🏽\ufe0f🇩🇪",
        "שלום \u202eעולם\u202c، مرحبا ١٢٣",
        "ＡＢＣ１２３ｶﾞ",
    )
    yield from (
        "\ud7ff\ue000\ufffd\ufffe\uffff\U00010000\U0010ffff",
        "日本語のテキスト。中文，没有空格。ภาษาไทย हिन्दी",
        "\x7f\x80\x9f\u200b\u2028\u2029",
    )
    yield from (
        "I'll they'VE don't ’s 'S 'ſ",
        "3.14159 1234567 1_000 x²³ ٣٤",
        "<0x0A><0x41>▁▁ ▁a ##ing Ġthe Ċ",
        "  two   three    four \n five\t\t",
    )
    yield from (character * RUN_CHARACTERS for character in " \n\taA0=é日\u0301👍")
    yield from (pair * (RUN_CHARACTERS // 2) for pair in (" \n", "ab", "a ", "\r\n", "1a", "!?"))
    for token in special:
        yield from (token, f"text{token}text", f" {token} {token}\n", token[:-1], f"{token[:1]} {token[1:]}")
    # All of the scripts and signs of the basic plane's beginning, then some of everything; no surrogates.
    codes = [*range(0x3100), *range(0x3100, sys.maxunicode, 131)]
    characters = [chr(code) for code in codes if not 0xD800 <= code < 0xE000]
    for first in range(0, len(characters), 64):
        some = characters[first : first + 64]
        yield "".join(some)
        yield "".join(f"x{character} 1{character}\n" for character in some)


def _made(engine: Callable[[Tokenizer, int], Engine], written: str, end_of_document: int) -> Engine:
    """An engine that another process has sent."""
    backend = Tokenizer.from_str(written)
    backend.encode_special_tokens = True
    return engine(backend, end_of_document)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Some texts at a time, in order: together no longer than CHARACTERS_PER_ENCODE, or a single one."""
    batch, characters = list[str](), 0
    for text in texts:
        if batch and characters + len(text) > CHARACTERS_PER_ENCODE:
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield batch


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where documents of so many ids begin, each but the empty ones followed by its end."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths + (lengths > 0), out=starts[1:])
    return starts


def _document(documents: Ragged, index: int) -> NDArray[np.integer]:
    return documents.ids[documents.starts[index] : documents.starts[index + 1]]
