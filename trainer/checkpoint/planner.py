"""Tells torch.distributed.checkpoint which rectangles of the logical state a rank writes and reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from trainer.sharding.logical import Logical, Piece


class Saving(DefaultSavePlanner):
    """Every rank writes the pieces it is given; no two ranks are given the same one."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=MetadataIndex(name, torch.Size(piece.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(piece),
                    properties=TensorProperties.create_from_tensor(piece.tensor),
                    size=tensor.shape,
                ),
            )
            for name, tensor in self.state_dict.items()
            for piece in tensor.pieces
        ]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Raises RuntimeError for a piece that two ranks hold: torch would keep one of them in silence."""
        seen: set[MetadataIndex] = set()
        for item in (item for plan in all_plans for item in plan.items):
            if item.index in seen:
                raise RuntimeError(f"{item.index.fqn}: two ranks save the piece at {item.index.offset}")
            seen.add(item.index)
        return super().create_global_plan(all_plans)

    def lookup_object(self, index: MetadataIndex) -> Any:
        return _find(self.state_dict, index)


class Loading(DefaultLoadPlanner):
    """Every rank reads what its pieces need, cut out of whatever pieces were written."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, tensor in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, [_chunk(part) for part in tensor.pieces])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _find(self.state_dict, index)


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.shape)


def _find(state: dict[str, Logical], index: MetadataIndex) -> Tensor:
    """The live numbers of a piece."""
    pieces = state[index.fqn].pieces
    return next(piece.tensor for piece in pieces if torch.Size(piece.offsets) == index.offset)
