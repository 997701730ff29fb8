"""Uncompressed text of a shard, a piece at a time, from any place on."""

from __future__ import annotations

from collections.abc import Iterator

import zstandard

from trainer.data.gzips import PIECE_BYTES, READ_BYTES, gunzipped
from trainer.data.index import Index
from trainer.data.patience import Fault
from trainer.data.stores import Reader

ZSTD_READ_BYTES = 1 << 10
"""zstandard has no limit for what it unfolds at a time; this makes it 32 MB."""
LARGEST_ZSTD_WINDOW_BYTES = 1 << 31
"""What `zstd --long=31` needs, with which some public corpora are packed."""
ZSTD_SKIPPABLE = range(0x184D2A50, 0x184D2A60)


def pieces(reader: Reader, suffix: str, offset: int, index: Index | None = None) -> Iterator[bytes]:
    """The text from byte `offset` of it on. Raises Fault, after the last piece that is whole."""
    if suffix.endswith(".gz"):
        begin, found = (index.enter(reader, offset) if index and offset else None) or (0, gunzipped(reader))
        yield from _from(offset - begin, found)
    elif suffix.endswith(".zst"):
        yield from _from(offset - _skip_frames(reader, offset), _unzstandard(reader))
    else:
        if offset and offset > reader.size():
            raise Fault("changed", f"ends {offset - reader.size()} bytes before the place that was left")
        reader.seek(offset)
        yield from iter(lambda: reader.read(PIECE_BYTES), b"")


def _from(offset: int, found: Iterator[bytes]) -> Iterator[bytes]:
    """Pieces without their first `offset` bytes."""
    for piece in found:
        if offset < len(piece):
            yield piece[offset:] if offset else piece
            offset = 0
            break
        offset -= len(piece)
    if offset:
        raise Fault("changed", f"ends {offset} bytes before the place that was left")
    yield from found


def _unzstandard(reader: Reader) -> Iterator[bytes]:
    frame, data = None, b""
    decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_ZSTD_WINDOW_BYTES)
    done: list[bytes] = []
    done_bytes = 0
    fault = None
    while fault is None and (data or (data := reader.read(READ_BYTES))):
        fed, data = data[:ZSTD_READ_BYTES], data[ZSTD_READ_BYTES:]
        frame = frame or decompressor.decompressobj()
        try:
            done.append(frame.decompress(fed))
        except zstandard.ZstdError as error:
            fault = Fault("shard", f"not zstd from here on: {error}")
            break
        done_bytes += len(done[-1])
        if frame.eof:
            data = frame.unused_data + data
            frame = None
        if done_bytes >= PIECE_BYTES:
            yield from _in_pieces(b"".join(done))
            done, done_bytes = [], 0
    yield b"".join(done)
    if frame and fault is None:
        fault = Fault("shard", "the file is cut short")
    if fault:
        raise fault


def _in_pieces(text: bytes) -> Iterator[bytes]:
    """At most PIECE_BYTES at a time, as lines are looked for in a piece at once."""
    for begin in range(0, len(text), PIECE_BYTES):
        yield text[begin : begin + PIECE_BYTES]


def _skip_frames(reader: Reader, offset: int) -> int:
    """Go to the zstd frame that holds byte `offset` of the text; the text before that frame, in bytes.

    Passes over frames by the sizes of their blocks (RFC 8878, 3.1.1), as far as they tell how much they hold.
    """
    ahead = _Ahead(reader)
    skipped = 0
    while skipped < offset:
        begin = ahead.position
        size = _pass_frame(ahead, offset - skipped)
        if size is None:
            reader.seek(begin)
            break
        skipped += size
    else:
        reader.seek(ahead.position)
    return skipped


class _Ahead:
    """Bytes at a place that moves forward, read in large pieces."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._data = b""
        self._start = 0
        self.position = 0

    def peek(self, count: int) -> bytes:
        within = self.position - self._start
        if within + count > len(self._data):
            self._reader.seek(self.position)
            self._start, self._data, within = self.position, self._reader.read(8 * READ_BYTES), 0
        return self._data[within : within + count]


def _pass_frame(ahead: _Ahead, most: int) -> int | None:
    """Move behind a frame; how many bytes it unfolds to, None if more than `most`, not told or not whole."""
    head = ahead.peek(18)  # the longest header
    if len(head) >= 8 and int.from_bytes(head[:4], "little") in ZSTD_SKIPPABLE:
        ahead.position += 8 + int.from_bytes(head[4:8], "little")
        return 0
    try:
        frame = zstandard.get_frame_parameters(head)
        header_bytes = zstandard.frame_header_size(head)
    except zstandard.ZstdError:
        return None
    told = frame.content_size not in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR)
    if not told or frame.content_size > most:
        return None
    ahead.position += header_bytes
    last = False
    while not last:
        block = int.from_bytes(ahead.peek(3), "little")
        last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
        if len(ahead.peek(3)) < 3 or kind == 3:
            return None
        ahead.position += 3 + (1 if kind == 1 else size)
    ahead.position += 4 * frame.has_checksum
    return int(frame.content_size)
