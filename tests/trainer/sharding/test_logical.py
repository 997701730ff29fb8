from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.sharding.logical import Logical, Piece, flat_range, logical

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(torch.Size)


def numbered(shape: torch.Size) -> torch.Tensor:
    """Every number is its flat index."""
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[torch.Size, int, int]:
    """A shape, and the first and last flat index of a part of it, which may be empty."""
    shape = draw(SHAPES)
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@given(ranges())
def test_consecutive_numbers_become_rectangles_that_hold_each_once(part: tuple[torch.Size, int, int]) -> None:
    shape, start, end = part
    whole = numbered(shape)
    pieces = flat_range(shape, start, whole.flatten()[start:end])
    for piece in pieces:
        assert torch.equal(piece.tensor, whole[piece.region])
    held = [number for piece in pieces for number in piece.tensor.flatten().tolist()]
    assert sorted(held) == list(range(start, end))


@given(ranges())
def test_rectangles_of_consecutive_numbers_are_few(part: tuple[torch.Size, int, int]) -> None:
    shape, start, end = part
    pieces = flat_range(shape, start, torch.zeros(end - start))
    assert len(pieces) <= max(1, 2 * len(shape) - 1)


@given(ranges())
def test_what_is_written_into_rectangles_is_in_the_numbers(part: tuple[torch.Size, int, int]) -> None:
    shape, start, end = part
    numbers = torch.full((end - start,), -1.0)
    Logical(shape, tuple(flat_range(shape, start, numbers))).fill(numbered(shape))
    assert numbers.tolist() == list(range(start, end))


@given(SHAPES, st.integers(1, 7))
def test_ranks_that_hold_the_same_save_each_number_once(shape: torch.Size, ranks: int) -> None:
    whole = numbered(shape)
    saved = [
        number
        for rank in range(ranks)
        for piece in logical(whole, rank, ranks).own().pieces
        for number in whole[piece.region].flatten().tolist()
    ]
    assert sorted(saved) == list(range(whole.numel()))


@given(SHAPES)
def test_a_rank_that_holds_a_part_alone_saves_all_of_it(shape: torch.Size) -> None:
    held = logical(numbered(shape))
    assert held.own() is held


def test_shares_of_a_part_stay_where_the_part_lies() -> None:
    whole = numbered(torch.Size((6, 2)))
    held = (Piece((2, 0), whole[2:5]),)
    shares = [Logical(whole.shape, held, rank, 2).own().pieces for rank in range(2)]
    assert [[piece.offsets for piece in pieces] for pieces in shares] == [[(2, 0)], [(3, 0)]]
    assert all(torch.equal(piece.tensor, whole[piece.region]) for pieces in shares for piece in pieces)


def test_filling_casts_to_the_format_that_is_held() -> None:
    held = torch.zeros(2, 2)
    logical(held).fill(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16))
    assert held.tolist() == [[1.0, 2.0], [3.0, 4.0]]
