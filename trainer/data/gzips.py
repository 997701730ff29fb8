"""Text of gzip files, from the beginning or from a point in their middle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from isal import igzip_lib

from trainer.data.patience import Fault
from trainer.data.stores import Reader

READ_BYTES = 1 << 17
"""So much is given to a decompressor at a time, whatever the store: what is rescued of a damaged file depends
on it, and all readers must rescue the same."""
PIECE_BYTES = 1 << 18
"""About the most that a piece holds, of a file that unfolds without limit as well."""
TRAILER_BYTES = 8
NOT_GZIP: type[Exception] = igzip_lib.IsalError  # type: ignore[assignment]  # the stub calls it a value


class Point(NamedTuple):
    """A place where a block of a deflate stream begins."""

    compressed: int
    """The first whole byte of the block."""
    text: int
    """Bytes of text before it."""
    bits: int
    """How many of the highest bits of the byte before `compressed` belong to the block as well."""


def gunzipped(reader: Reader) -> Iterator[bytes]:
    """Pieces from the reader's position on, where a member begins; Fault after the last whole piece."""
    member, data = None, b""  # gzip calls its parts members, of which a file may have any number
    while data or (data := reader.read(READ_BYTES)):
        if member is None:
            data = data.lstrip(b"\0")  # with which files may be padded
            if not data:
                continue
            member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        yield from _unfolded(member, data)
        data = member.unused_data
        if member.eof:
            member = None
    if member:
        raise Fault("shard", "the file is cut short")


def gunzipped_from(reader: Reader, point: Point, window: bytes) -> Iterator[bytes]:
    """Pieces from a point on, given the 32 KiB of text before it."""
    member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_DEFLATE, zdict=window)
    reader.seek(point.compressed - (1 if point.bits else 0))
    data = _aligned(8 - point.bits, reader.read(1)[0]) if point.bits else b""
    while not member.eof:
        more = reader.read(READ_BYTES)
        if not more:
            raise Fault("shard", "the file is cut short")
        yield from _unfolded(member, data + more)
        data = b""
    reader.seek(reader.tell() - len(member.unused_data) + TRAILER_BYTES)
    yield from gunzipped(reader)


def _unfolded(member: Any, data: bytes) -> Iterator[bytes]:
    try:
        piece = member.decompress(data, PIECE_BYTES)
        while piece:
            yield piece
            piece = b"" if member.eof or member.needs_input else member.decompress(b"", PIECE_BYTES)
    except NOT_GZIP as error:
        raise Fault("shard", f"not gzip from here on: {error}") from error


def _aligned(unused: int, byte: int) -> bytes:
    """What leads a decompressor, which begins at whole bytes, past the lowest `unused` bits of `byte`.

    Empty blocks (RFC 1951) fill these bits: with fixed codes they have 10, and one with codes of its own has
    91, which any number of bits modulo 8 can be made of.
    """
    bits = _OWN_CODES if unused % 2 else []
    while len(bits) % 8 != unused:
        bits = bits + _FIXED_CODES
    value = sum(bit << place for place, bit in enumerate(bits))
    filled = value | (byte >> unused << len(bits))
    return filled.to_bytes(len(bits) // 8 + 1, "little")


def _low_first(*numbers: tuple[int, int]) -> list[int]:
    """Bits of (number, how many bits), lowest first."""
    return [number >> bit & 1 for number, count in numbers for bit in range(count)]


_FIXED_CODES = _low_first((0, 1), (1, 2), (0, 7))
_OWN_CODES = _low_first(
    *(
        (0, 1),
        (2, 2),
        (0, 5),
        (0, 5),
        (14, 4),
    ),  # 257 literals, 1 distance, 18 lengths of codes
    # Lengths 1 and 18 have codes of one bit, in the order 16 17 18 0 8 7 9 6 10 5 11 4 12 3 13 2 14 1.
    *[(1 if length in (2, 17) else 0, 3) for length in range(18)],
    # Literal 0 has a code of one bit, then 138 and 117 have none, then the end has one, and the distance.
    *((0, 1), (1, 1), (127, 7), (1, 1), (106, 7), (0, 1), (0, 1)),
    (1, 1),  # the end
)
