"""How many weights are trained when not all are? Low-rank adapters and frozen blocks."""

from __future__ import annotations

from launcher.plan.shape import Shape


def low_rank_parameters(inputs: int, outputs: int, rank: int) -> int:
    """(m + n) r: the pair of matrices that stands for the update of an m x n matrix (Hu et al. 2021)."""
    return (inputs + outputs) * rank


def low_rank_saving(inputs: int, outputs: int, rank: int) -> float:
    """1 - (m + n) r / m n: the share of a matrix's parameters that its low-rank pair saves."""
    return 1 - low_rank_parameters(inputs, outputs, rank) / (inputs * outputs)


def lora_parameters(shape: Shape, rank: int) -> int:
    """Weights of LoRA on the query and value projections of every attention layer.

    4 L h r where heads are not grouped (Hu et al. 2021, table 18). A decoder's attention to its encoder
    is a layer of its own.
    """
    queries = low_rank_parameters(shape.hidden, shape.heads * shape.head_dim, rank)
    values = low_rank_parameters(shape.hidden, shape.kv_heads * shape.head_dim, rank)
    return shape.attentions * (queries + values)


def trained_parameters(shape: Shape, lora_rank: int | None = None, frozen_blocks: int = 0) -> int:
    """Weights that have a gradient and optimizer states: LoRA's alone, else those outside frozen blocks."""
    frozen = min(frozen_blocks, shape.layers)
    if lora_rank is not None:
        return lora_parameters(shape, lora_rank) * (shape.layers - frozen) // shape.layers
    return shape.parameters - frozen * shape.parameters_layer
