"""Training documents that are also held out, by equality or by a run of words in common, and their count."""

from __future__ import annotations

import hashlib
import re
import sys
import threading
import unicodedata
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Kind = Literal["exact", "ngram"]
Hashes = NDArray[np.uint64]

NGRAM_WORDS = 13
"""As in Brown et al. 2020, appendix C."""
BEGINNING_WORDS = 8
"""Only a document that begins like a held-out one is compared as a whole."""
PIECE_CHARACTERS = 1 << 16
"""A document of many megabytes is hashed in pieces, so that temporary arrays stay small."""
SLOTS_PER_HASH = 16
"""Bits per held-out 13-gram, at least, of the filter that is asked before the sorted hashes."""
HASHES_AT_ONCE = 1 << 20
CODE_POINTS = 1 << 18
"""Beyond these there are no letters and no digits."""

_NOT_WORD = re.compile(r"\W")
_UTF_32 = f"utf-32-{sys.byteorder[0]}e"
_BASE, _STEP, _MIX = 0xD6E8FEB86659FD93, 0xA0761D6478BD642F, np.uint64(0x9E3779B97F4A7C15)
"""Odd numbers with irregular bits."""
_HALF = np.uint64(32)


class HeldOut:
    """Documents that training must not meet, as hashes: 16 bytes a document, 10 to 12 per 13-gram."""

    def __init__(self, beginnings: Hashes, documents: Hashes, ngrams: Hashes | None) -> None:
        """Ascending hashes: of first words, of whole documents, of 13 words in a row (none ignores them)."""
        self._beginnings, self._documents = beginnings.data, documents.data
        self._ngrams = ngrams
        self._filter = None if ngrams is None else _Filter(ngrams)

    @classmethod
    def of(cls, texts: Iterable[str], kind: Kind) -> HeldOut:
        """Hash documents; the texts are not kept, and blank ones do not count."""
        beginnings, documents = array("Q"), array("Q")
        ngrams: list[Hashes] = [np.empty(0, np.uint64)]
        for text in texts:
            if not (folded := _folded(text).strip()):
                continue
            beginnings.append(_beginning_hash(folded))
            documents.append(_document_hash(folded))
            if kind == "ngram":
                ngrams.append(_ngram_hashes(folded))
        return cls(
            _ascending([np.array(beginnings, np.uint64)]),
            _ascending([np.array(documents, np.uint64)]),
            _ascending(ngrams) if kind == "ngram" else None,
        )

    def save(self, directory: Path) -> None:
        """Write the hashes, for processes that need them as well."""
        directory.mkdir(parents=True, exist_ok=True)
        np.save(directory / "beginnings.npy", np.asarray(self._beginnings))
        np.save(directory / "documents.npy", np.asarray(self._documents))
        if self._ngrams is not None:
            np.save(directory / "ngrams.npy", self._ngrams)

    @classmethod
    def open(cls, directory: Path) -> HeldOut:
        """What `save` wrote, mapped into memory, of which processes of a machine share one copy."""
        files = [directory / f"{name}.npy" for name in ("beginnings", "documents", "ngrams")]
        found = [np.load(file, mmap_mode="r") if file.exists() else None for file in files]
        assert found[0] is not None
        assert found[1] is not None
        return cls(found[0], found[1], found[2])

    def reason(self, text: str) -> Kind | None:
        """Why a training document has to go, None if it may stay.

        exact: equal to a held-out document after Unicode NFC, case folding and joining white space.
        ngram: 13 words in a row are also in a held-out document (Brown et al. 2020); words are runs of
        letters, digits and underscores, so punctuation does not matter. Documents of fewer words are only
        compared as a whole. By 64-bit hashes: among 10^9 distinct 13-grams asked against 10^6 held-out
        ones, a wrong hit has a probability of 5 in 10^5.
        """
        folded = _folded(text)
        if _has(self._beginnings, _beginning_hash(folded)) and _has(self._documents, _document_hash(folded)):
            return "exact"
        if self._ngrams is None or self._filter is None:
            return None
        hashes = self._filter.candidates(_ngram_hashes(folded))
        if not len(hashes):
            return None
        places = np.searchsorted(self._ngrams, hashes)
        places[places == len(self._ngrams)] = 0
        return "ngram" if (self._ngrams[places] == hashes).any() else None


class Decontamination:
    """Takes held-out documents out of training text, and counts them. Threads may share one."""

    def __init__(self, held_out: HeldOut) -> None:
        self._held_out = held_out
        self._lock = threading.Lock()
        self._dropped: Counter[tuple[str, Kind]] = Counter()

    def again(self) -> Decontamination:
        """Another one for the same documents, with a count of its own."""
        return Decontamination(self._held_out)

    def kept(self, corpus: str, texts: dict[int, str]) -> dict[int, str]:
        """The documents of a training corpus that are not held out, under their numbers."""
        reasons = {number: self._held_out.reason(text) for number, text in texts.items()}
        found = Counter((corpus, reason) for reason in reasons.values() if reason is not None)
        if not found:
            return texts
        with self._lock:
            self._dropped += found
        return {number: text for number, text in texts.items() if reasons[number] is None}

    def dropped(self) -> dict[str, dict[Kind, int]]:
        """Documents dropped so far, by corpus and reason; a document that is read twice counts twice."""
        with self._lock:
            found = dict(self._dropped)
        corpora = sorted({corpus for corpus, _ in found})
        return {
            corpus: {"exact": found.get((corpus, "exact"), 0), "ngram": found.get((corpus, "ngram"), 0)}
            for corpus in corpora
        }


class _Filter:
    """A bit per slot: hashes whose bit is unset are surely absent (a Bloom filter of one function)."""

    def __init__(self, hashes: Hashes) -> None:
        """hashes: ascending."""
        width = max(3, (len(hashes) * SLOTS_PER_HASH).bit_length())
        self._shift = np.uint64(64 - width)
        self._bits = np.zeros(2**width // 8, np.uint8)
        for first in range(0, len(hashes), HASHES_AT_ONCE):
            places = (hashes[first : first + HASHES_AT_ONCE] >> self._shift).astype(np.intp)
            begin, end = int(places[0]) // 8, int(places[-1]) // 8 + 1
            is_set = np.zeros(8 * (end - begin), bool)
            is_set[places - 8 * begin] = True
            self._bits[begin:end] |= np.packbits(is_set, bitorder="little")

    def candidates(self, hashes: Hashes) -> Hashes:
        """Those that may be present."""
        places = hashes >> self._shift
        bits = self._bits[places >> np.uint64(3)] >> (places & np.uint64(7)).astype(np.uint8)
        found: Hashes = hashes[(bits & 1).astype(bool)]
        return found


def _ascending(parts: list[Hashes]) -> Hashes:
    """Different hashes among all parts, which are given away: they may be most of the memory."""
    joined = np.concatenate(parts)
    parts.clear()
    joined.sort()
    first = np.ones(len(joined), bool)
    np.not_equal(joined[1:], joined[:-1], out=first[1:])
    different: Hashes = joined[first]
    return different


def _folded(text: str) -> str:
    """Unicode's canonical caseless form: NFC again after folding, which may take characters apart."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def _beginning_hash(folded: str) -> int:
    return _text_hash(" ".join(folded.split(maxsplit=BEGINNING_WORDS)[:BEGINNING_WORDS]))


def _document_hash(folded: str) -> int:
    return _text_hash(" ".join(folded.split()))


def _text_hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _has(ascending: memoryview[int], value: int) -> bool:
    place = bisect_left(ascending, value)
    return place < len(ascending) and ascending[place] == value


def _ngram_hashes(folded: str) -> Hashes:
    """A hash of every 13 words in a row, shape [words - 12]; empty if there are fewer words."""
    words = np.concatenate([_word_hashes(piece) for piece in _pieces(folded)])
    if len(words) < NGRAM_WORDS:
        return np.empty(0, np.uint64)
    return _mixed(np.correlate(words, _tables().in_ngram, "valid"))


def _pieces(folded: str) -> Iterator[str]:
    """A text cut between words, or in a word of more than 65,536 characters."""
    begin = 0
    while len(folded) - begin > 2 * PIECE_CHARACTERS:
        cut = _NOT_WORD.search(folded, begin + PIECE_CHARACTERS, begin + 2 * PIECE_CHARACTERS)
        end = cut.start() if cut else begin + 2 * PIECE_CHARACTERS
        yield folded[begin:end]
        begin = end
    yield folded[begin:]


def _word_hashes(piece: str) -> Hashes:
    """A hash of every word: the sum of its characters' numbers times b^0, b^1, ..., modulo 2^64."""
    tables = _tables()
    codes = np.frombuffer(f" {piece}".encode(_UTF_32, errors="surrogatepass"), np.uint32).astype(np.intp)
    numbers = tables.numbers.take(codes, mode="clip")
    inside = numbers != 0
    starts = np.flatnonzero(inside[1:] > inside[:-1]) + 1
    if not len(starts):
        return np.empty(0, np.uint64)
    # A word ends where the next begins: what stands between them counts as 0.
    sums = np.add.reduceat(numbers * tables.powers[: len(numbers)], starts)
    return _mixed(sums * tables.inverse_powers[starts])


def _mixed(sums: Hashes) -> Hashes:
    """Carry the high bits into the low ones and back, so that sums of hashes do not cancel out."""
    sums = (sums ^ (sums >> _HALF)) * _MIX
    return sums ^ (sums >> _HALF)


class _Tables(NamedTuple):
    numbers: Hashes
    r"""By code point: a number for what re's \w matches, 0 for the rest; shape [CODE_POINTS]."""
    powers: Hashes
    """b^i, shape [2 PIECE_CHARACTERS + 1]."""
    inverse_powers: Hashes
    in_ngram: Hashes
    """Factors of the words of a 13-gram."""


@lru_cache(maxsize=1)
def _tables() -> _Tables:
    words = np.fromiter((chr(code).isalnum() or chr(code) == "_" for code in range(CODE_POINTS)), bool)
    numbers = _mixed(np.arange(1, CODE_POINTS + 1, dtype=np.uint64) * np.uint64(_STEP)) | np.uint64(1)
    return _Tables(
        np.where(words, numbers, np.uint64(0)),
        _powers(_BASE, 2 * PIECE_CHARACTERS + 1),
        _powers(pow(_BASE, -1, 2**64), 2 * PIECE_CHARACTERS + 1),
        _powers(_STEP, NGRAM_WORDS),
    )


def _powers(base: int, count: int) -> Hashes:
    """base^0, base^1, ..., modulo 2^64."""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)
