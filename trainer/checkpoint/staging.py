"""Copies of live tensors in host memory, from which a checkpoint is written while training goes on."""

from __future__ import annotations

import weakref
from dataclasses import replace

import torch
from torch import Tensor

from trainer.sharding.logical import Logical, Piece


class Staging:
    """Buffers of one checkpoint's pieces, used again for the next one's.

    Where the pieces come from a GPU the buffers are page-locked: the copies then run at the full speed of
    the bus, and behind one another without the host.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def copy(self, tensors: dict[str, Logical]) -> dict[str, Logical]:
        """The same pieces with numbers that stay as they are now, until the next copy."""
        staged = {
            name: replace(
                tensor,
                pieces=tuple(
                    Piece(piece.offsets, self._copy((name, number), piece.tensor))
                    for number, piece in enumerate(tensor.pieces)
                ),
            )
            for name, tensor in tensors.items()
        }
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return staged

    def _copy(self, key: tuple[str, int], live: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != live.shape or buffer.dtype != live.dtype:
            buffer = self._buffers[key] = _host_buffer(live)
        return buffer.copy_(live, non_blocking=True)


def _host_buffer(live: Tensor) -> Tensor:
    """Host memory of a tensor's size, page-locked if the tensor is on a GPU and the system allows it.

    torch's own page-locked memory comes in powers of two; that may be twice as much as is needed.
    """
    buffer = torch.empty(live.shape, dtype=live.dtype)
    if live.is_cuda:
        runtime = torch.cuda.cudart()
        address = buffer.data_ptr()
        if int(runtime.cudaHostRegister(address, buffer.nbytes, 0)) == 0:
            weakref.finalize(buffer, runtime.cudaHostUnregister, address)
    return buffer
