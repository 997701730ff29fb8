"""How much arithmetic is it? Model FLOPs by the convention that MFU is quoted in."""

from __future__ import annotations

from launcher.plan.activations import Checkpointing
from launcher.plan.shape import Shape


def flops_per_token(shape: Shape) -> int:
    """FLOPs of forward and backward for one token: 6 N + 12 L H Q T.

    N counts the active weights that are multiplied: not the looked-up input embeddings, but the head,
    also when it is tied to them. L layers, H heads, Q head size, T sequence length; the causal half of
    attention is not discounted. Chowdhery et al. 2022 (PaLM), appendix B.
    """
    attention = 12 * shape.layers * shape.heads * shape.head_dim * shape.sequence_length
    return 6 * shape.parameters_multiplied + attention


def recomputed_flops_per_token(shape: Shape, checkpointing: Checkpointing) -> int:
    """FLOPs that activation checkpointing adds per token; hardware spends them, MFU does not count them.

    full repeats the blocks' forward: a third of their share above. selective repeats every second
    matrix product of a block (k, o and up projections in Llama), as torchtitan's per-op policy does.
    """
    if checkpointing == "none":
        return 0
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if checkpointing == "full":
        blocks = shape.parameters_active - shape.parameters_root
        return 2 * blocks + 4 * shape.layers * queries * shape.sequence_length
    products = queries + shape.ffn + (keys if shape.gated else 0)
    return 2 * shape.layers * shape.hidden * products
