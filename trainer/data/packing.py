"""Documents to rows of a fixed length.

concatenate is Lane's own: documents end to end, cut into rows that overlap by one token. best_fit is here:
rows that cut no document which fits into one.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

from trainer.data.blocks import Ragged, Tokens

PADDING = -100
"""Id of what fills up a row; the loss ignores it as a target."""


def best_fit(documents: Ragged, row_tokens: int) -> Tokens:
    """Rows [rows, row_tokens] of some documents, filled up with PADDING.

    A document longer than a row is cut into pieces that overlap by one token, so that each of its tokens but
    the first is a target once; what is left of it and the shorter documents are placed, longest first, each
    into the fullest row that has room (best-fit decreasing; Ding et al. 2024, "Fewer Truncations Improve
    Language Modeling").
    """
    placed, used = _placed(documents.starts, row_tokens)
    rows = np.full((used, row_tokens), PADDING, dtype=np.int32)
    for row, place, start, length in placed:
        rows[row, place : place + length] = documents.ids[start : start + length]
    return rows


def best_fit_rows(starts: NDArray[np.int64], row_tokens: int) -> int:
    """How many rows best_fit makes of documents that begin at `starts`, the last of which is their end."""
    return _placed(starts, row_tokens)[1]


def _placed(starts: NDArray[np.int64], row_tokens: int) -> tuple[list[tuple[int, int, int, int]], int]:
    """(row, place in the row, first token, tokens) of each piece, and the number of rows."""
    placed: list[tuple[int, int, int, int]] = []
    used: list[int] = []
    open_rows: list[tuple[int, int]] = []  # (tokens of room, row), ascending
    for start, length in sorted(_pieces(starts, row_tokens), key=lambda piece: -piece[1]):
        fitting = bisect_left(open_rows, (length, -1))
        room, row = open_rows.pop(fitting) if fitting < len(open_rows) else (row_tokens, len(used))
        if row == len(used):
            used.append(0)
        placed.append((row, used[row], start, length))
        used[row] += length
        if room > length:
            insort(open_rows, (room - length, row))
    return placed, len(used)


def _pieces(starts: NDArray[np.int64], row_tokens: int) -> list[tuple[int, int]]:
    """(first token, tokens) of pieces no longer than a row, in the order of the documents."""
    pieces: list[tuple[int, int]] = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        while end - start > 1:
            pieces.append((start, min(row_tokens, end - start)))
            start += row_tokens - 1
    return pieces
