"""Held-out documents never appear in training: what counts as the same, and that nothing else goes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import decontaminate
from trainer.data.decontaminate import NGRAM_WORDS, Decontamination, HeldOut

HELD_OUT = "The Court held, in the year 1802, that a statute which the legislature had passed was void."
WORDS = re.findall(r"\w+", HELD_OUT)


@pytest.mark.parametrize(
    "text",
    [
        HELD_OUT,
        HELD_OUT.upper(),
        f"\n\t{HELD_OUT.replace(' ', chr(0xA0) + chr(10))}  ",
    ],
)
def test_case_and_white_space_do_not_hide_a_held_out_document(text: str) -> None:
    assert HeldOut.of([HELD_OUT], "exact").reason(text) == "exact"
    assert HeldOut.of([HELD_OUT], "ngram").reason(text) == "exact"


@pytest.mark.parametrize(
    ("held_out", "text"),
    [
        ("caf\u00e9 cr\u00e8me", "cafe\u0301 cre\u0300me"),
        ("STRASSE", "stra\u00dfe"),
        ("\u03aa\u0301", "\u0390"),  # folding takes the second apart and leaves the first composed
        ("\u212b", "\u00e5"),
    ],
)
def test_spellings_that_unicode_calls_the_same_are_the_same(held_out: str, text: str) -> None:
    assert HeldOut.of([held_out], "exact").reason(text) == "exact"
    assert HeldOut.of([text], "exact").reason(held_out) == "exact"


def test_a_changed_word_or_mark_is_another_document() -> None:
    held_out = HeldOut.of([HELD_OUT], "exact")
    assert held_out.reason(HELD_OUT.replace("void", "valid")) is None
    assert held_out.reason(HELD_OUT.rstrip(".")) is None
    assert held_out.reason(f"{HELD_OUT} {HELD_OUT}") is None


def test_thirteen_words_in_a_row_are_a_match_and_twelve_are_not() -> None:
    held_out = HeldOut.of([HELD_OUT], "ngram")
    for first in range(len(WORDS) - NGRAM_WORDS + 1):
        shared = WORDS[first : first + NGRAM_WORDS]
        assert held_out.reason(f"Before. {' - '.join(shared).upper()}; after.") == "ngram"
        assert held_out.reason(f"Before. {' '.join(shared[1:])}; after.") is None
        assert held_out.reason(f"Before. {' '.join(reversed(shared))}; after.") is None


def test_documents_of_less_than_thirteen_words_are_compared_as_a_whole() -> None:
    held_out = HeldOut.of(["Call me Ishmael."], "ngram")
    assert held_out.reason("call me ISHMAEL.") == "exact"
    assert held_out.reason("Call me Ishmael. Some years ago") is None


def test_blank_documents_match_nothing() -> None:
    for kind in ("exact", "ngram"):
        held_out = HeldOut.of(["", " \n", "..."], kind)
        assert [held_out.reason(text) for text in ("", " ", "some text")] == [None] * 3
        assert HeldOut.of([], kind).reason("some text") is None


words = st.lists(
    st.sampled_from(["a", "A", "b", "\u00e9", "e\u0301", "\u4e2d", "_", "7", "\ud800"]), max_size=40
)
separators = st.sampled_from([" ", "\n", ", ", "\u2014", "\U0001f600", "\U000e0041"])


@given(held_out=words, before=words, shared=st.slices(40), after=words, separator=separators)
def test_matches_are_those_of_the_definition(
    held_out: list[str], before: list[str], shared: slice, after: list[str], separator: str
) -> None:
    def ngrams(text: str) -> set[tuple[str, ...]]:
        found = re.findall(r"\w+", decontaminate._folded(text))
        return {tuple(found[i : i + NGRAM_WORDS]) for i in range(len(found) - NGRAM_WORDS + 1)}

    known = separator.join(held_out)
    asked = separator.join([*before, *held_out[shared], *after, "end"])
    found = HeldOut.of([known], "ngram").reason(asked)
    assert (found == "ngram") == (not ngrams(known).isdisjoint(ngrams(asked)))


def test_long_documents_are_searched_across_the_pieces_they_are_hashed_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = decontaminate._ngram_hashes(" ".join(f"word{i}" for i in range(500)))
    monkeypatch.setattr(decontaminate, "PIECE_CHARACTERS", 100)
    pieces = decontaminate._ngram_hashes(" ".join(f"word{i}" for i in range(500)))
    assert np.array_equal(whole, pieces)
    assert len(list(decontaminate._pieces("x" * 1000))) == 5


def test_different_words_have_different_hashes() -> None:
    words = [f"{a}{b}" for a in range(300) for b in ("", "a", "aa", "ab", "ba", "\u4e2d", "_")]
    assert len(np.unique(decontaminate._word_hashes(" ".join(words)))) == len(words)


def test_every_process_computes_the_same_hashes() -> None:
    program = (
        "from trainer.data import decontaminate as d;"
        f"print(d._ngram_hashes({HELD_OUT!r}).tolist(), d._document_hash({HELD_OUT!r}))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    here = f"{decontaminate._ngram_hashes(HELD_OUT).tolist()} {decontaminate._document_hash(HELD_OUT)}\n"
    assert printed == {here}


def test_dropped_documents_are_counted_by_corpus_and_reason_from_all_threads() -> None:
    decontamination = Decontamination(HeldOut.of([HELD_OUT], "ngram"))
    texts = {0: "kept", 3: HELD_OUT, 4: f"As they say: {HELD_OUT}", 9: "kept as well"}
    kept = []
    threads = [
        threading.Thread(target=lambda corpus=corpus: kept.append(decontamination.kept(corpus, texts)))
        for corpus in ("legal", "general")
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept == [{0: "kept", 9: "kept as well"}] * 16
    assert decontamination.dropped() == {
        "general": {"exact": 8, "ngram": 8},
        "legal": {"exact": 8, "ngram": 8},
    }


def test_nothing_dropped_is_nothing_counted() -> None:
    decontamination = Decontamination(HeldOut.of([HELD_OUT], "exact"))
    assert decontamination.kept("legal", {5: "other text"}) == {5: "other text"}
    assert decontamination.dropped() == {}
