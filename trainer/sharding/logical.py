"""Logical state: what a strategy holds, in words that no strategy owns.

A run's state is a dict of fully-qualified names (weight/NAME, exp_avg/NAME, exp_avg_sq/NAME) to fp32
tensors. A rank holds some rectangles of each, and torch.distributed.checkpoint reads and writes
rectangles; so whatever wrote a checkpoint, whatever reads it cuts it anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


class Sliceable(Protocol):
    """A whole tensor, in memory or in a file that is read slice by slice."""

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor: ...


@dataclass(frozen=True)
class Piece:
    """A rectangle of a tensor: where it begins, and the live numbers."""

    offsets: tuple[int, ...]
    tensor: Tensor

    @property
    def region(self) -> tuple[slice, ...]:
        """Where it lies in the whole."""
        return tuple(
            slice(begin, begin + size) for begin, size in zip(self.offsets, self.tensor.shape, strict=True)
        )


@dataclass(frozen=True)
class Logical:
    """One tensor of the logical state: its whole shape, and the pieces that this rank holds."""

    shape: torch.Size
    pieces: tuple[Piece, ...]
    replica: int = 0
    """Which of the ranks that hold the same pieces this is."""
    replicas: int = 1
    """How many ranks hold the same pieces."""

    def fill(self, whole: Sliceable) -> None:
        """Take this rank's pieces out of a whole tensor of the same shape; other formats are cast."""
        with torch.no_grad():
            for piece in self.pieces:
                piece.tensor.copy_(whole[piece.region])

    def own(self) -> Logical:
        """The part that this rank saves: of what several ranks hold, each saves its share of the rows."""
        if self.replicas == 1:
            return self
        return Logical(self.shape, tuple(piece for held in self.pieces for piece in self._share(held)))

    def _share(self, piece: Piece) -> Iterator[Piece]:
        if not self.shape:
            if self.replica == 0:
                yield piece
            return
        rows = piece.tensor.shape[0]
        begin, end = (rows * share // self.replicas for share in (self.replica, self.replica + 1))
        if end > begin:
            yield Piece((piece.offsets[0] + begin, *piece.offsets[1:]), piece.tensor[begin:end])


def logical(tensor: Tensor, replica: int = 0, replicas: int = 1) -> Logical:
    """A tensor as it is held: whole on `replicas` ranks of which this is one, or a DTensor's part."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Logical(tensor.shape, (Piece((0,) * tensor.ndim, tensor),), replica, replicas)
    mesh, placements = tensor.device_mesh, tensor.placements
    for number, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            replica = replica * mesh.size(number) + mesh.get_local_rank(number)
            replicas *= mesh.size(number)
    # For an empty part torch says where it would begin, which may be beyond the end.
    local: Any = tensor.to_local()
    parts = [
        Piece(tuple(chunk.offsets), local) for chunk in tensor.__create_chunk_list__() if local.numel() > 0
    ]
    return Logical(tensor.shape, tuple(parts), replica, replicas)


def flat_range(shape: torch.Size, start: int, numbers: Tensor) -> list[Piece]:
    """Rectangles of consecutive numbers of a tensor, which lies row by row in memory.

    numbers: 1-d, the values from the flat index `start` on. The pieces are views of them: the rest of a
    row, whole rows, the beginning of a row, and so on in each dimension.
    """
    if numbers.numel() == 0:
        return []
    if len(shape) <= 1:
        return [Piece((start,) * len(shape), numbers.view(shape if not shape else -1))]
    row = shape[1:].numel()
    end = start + numbers.numel()
    first_whole, last_whole = -(-start // row), end // row
    pieces: list[Piece] = []

    def part_of_row(number: int, begin: int, stop: int) -> None:
        inner = flat_range(shape[1:], begin - number * row, numbers[begin - start : stop - start])
        pieces.extend(Piece((number, *piece.offsets), piece.tensor[None]) for piece in inner)

    if start // row == (end - 1) // row and (end - start) < row:
        part_of_row(start // row, start, end)
        return pieces
    if start < first_whole * row:
        part_of_row(first_whole - 1, start, first_whole * row)
    if first_whole < last_whole:
        whole = numbers[first_whole * row - start : last_whole * row - start]
        pieces.append(Piece((first_whole,) + (0,) * (len(shape) - 1), whole.view(-1, *shape[1:])))
    if last_whole * row < end:
        part_of_row(last_whole, last_whole * row, end)
    return pieces
