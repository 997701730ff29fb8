"""What does the forward pass keep for the backward pass? Bytes of one rank's micro batch.

T tokens of the micro batch, h hidden, a heads of size q, k kv heads, f feed-forward, V vocabulary,
b bytes of the compute format (2 in bf16, 4 in fp32).
"""

from __future__ import annotations

from typing import Literal

from launcher.plan.shape import Shape

Checkpointing = Literal["none", "selective", "full"]


def block_activation_bytes(
    shape: Shape,
    tokens: int,
    compute_bytes: int,
    checkpointing: Checkpointing,
    autocast: bool = False,
) -> int:
    """Bytes that one block keeps.

    none, gated:  T (8h + b (4h + 4aq + 4f) + 4a): RMSNorms in fp32, repeated keys and values, attention
                  without a score matrix but with 4a of log-sum-exp.
    none, GPT-2:  T (b (4h + 4aq + 5f) + 4a): the tanh form of GELU keeps five tensors.
    selective:    T (b (2h + 2aq + kq + f) + 4a): input, attention and every second matrix product
                  (torchtitan's per-op policy).
    full:         T b h: the input.
    Under autocast the residual stream stays fp32 and each product casts its input anew: T 10h more
    in a gated block, T 4h in GPT-2's, T 2h where only the input is kept.
    """
    h, attention, f = shape.hidden, shape.heads * shape.head_dim, shape.ffn
    if checkpointing == "full":
        return tokens * (compute_bytes * h + autocast * 2 * h)
    log_sum_exp = 4 * shape.heads
    if checkpointing == "selective":
        kept = 2 * h + 2 * attention + shape.kv_heads * shape.head_dim + f
        return tokens * (compute_bytes * kept + log_sum_exp + autocast * 2 * h)
    if shape.gated:
        kept = 4 * h + 4 * attention + 4 * f
        return tokens * (8 * h + compute_bytes * kept + log_sum_exp + autocast * 10 * h)
    kept = 4 * h + 4 * attention + 5 * f
    return tokens * (compute_bytes * kept + log_sum_exp + autocast * 4 * h)


def final_norm_bytes(shape: Shape, tokens: int, compute_bytes: int) -> int:
    """T (4 + 2b) h: its fp32 input, and the normalised and scaled values."""
    return tokens * (4 + 2 * compute_bytes) * shape.hidden


def logits_bytes(shape: Shape, tokens: int) -> int:
    """12 TV: logits, fp32 log-softmax and the gradients of both; 2 + 4 + 4 + 2 in bf16, 4 + 4 + 4 in fp32."""
    return 12 * tokens * shape.vocabulary
