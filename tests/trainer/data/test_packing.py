"""best_fit cuts no document that fits into a row, loses no token and wastes little."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.blocks import Ragged
from trainer.data.packing import PADDING, best_fit


def ragged(lengths: list[int]) -> Ragged:
    """Documents of distinct tokens."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Ragged(np.arange(starts[-1], dtype=np.int32), starts)


def lengths_in(rows: np.ndarray) -> list[list[int]]:
    """Runs of consecutive tokens in each row."""
    found = []
    for row in rows:
        tokens = row[row != PADDING]
        assert (row[len(tokens) :] == PADDING).all()
        runs = np.split(tokens, np.flatnonzero(np.diff(tokens) != 1) + 1)
        found.append([len(run) for run in runs])
    return found


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(2, 17))
def test_every_token_but_a_documents_first_is_a_target_once(lengths: list[int], row_tokens: int) -> None:
    documents = ragged(lengths)
    rows = best_fit(documents, row_tokens)
    targets = [
        int(token)
        for row in rows
        for before, token in pairwise(row)
        if token != PADDING and token == before + 1 and token not in documents.starts
    ]
    expected = set(range(sum(lengths))) - set(documents.starts.tolist())
    assert sorted(targets) == sorted(expected)


@given(st.lists(st.integers(2, 16), min_size=1, max_size=60))
def test_no_document_that_fits_is_cut(lengths: list[int]) -> None:
    rows = best_fit(ragged(lengths), 16)
    starts = set(ragged(lengths).starts.tolist())
    for row in rows:
        tokens = row[row != PADDING].tolist()
        begins = [i for i, token in enumerate(tokens) if i == 0 or token != tokens[i - 1] + 1]
        assert all(tokens[i] in starts for i in begins)


def test_the_fullest_row_that_has_room_is_taken() -> None:
    assert lengths_in(best_fit(ragged([4, 9, 6, 5, 2, 3]), 10)) == [[9], [6, 4], [5, 3, 2]]


def test_a_long_document_is_cut_into_pieces_that_overlap_by_one_token() -> None:
    rows = best_fit(ragged([10]), 5)
    assert rows.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, PADDING, PADDING, PADDING]]


@pytest.mark.parametrize("row_tokens", [513, 2049])
def test_blocks_of_documents_as_the_web_has_them_fill_rows_to_97_percent(row_tokens: int) -> None:
    lengths = np.random.default_rng(0).lognormal(5.9, 1.0, 256).astype(int) + 2  # C4: mean 600, median 360
    rows = best_fit(ragged(lengths.tolist()), row_tokens)
    assert (rows != PADDING).mean() > 0.97
