"""How many weights does an architecture have? Closed forms that equal the transformers modules."""

from __future__ import annotations


def llama_parameters(
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffn: int,
    vocabulary: int,
    tied: bool,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
) -> int:
    """Llama, Mistral, Qwen2: RMSNorm, SwiGLU, rotary positions (Touvron et al. 2023, section 2.2).

    qkv_bias: of the query, key and value projections; output_bias: of the attention's output.
    """
    queries, qkv = heads * head_dim, (heads + 2 * kv_heads) * head_dim
    attention = hidden * (qkv + queries) + qkv_bias * qkv + output_bias * hidden
    feed_forward = 3 * hidden * ffn + mlp_bias * (2 * ffn + hidden)
    block = attention + feed_forward + 2 * hidden
    return (1 if tied else 2) * vocabulary * hidden + layers * block + hidden


def gpt2_parameters(
    *, layers: int, hidden: int, ffn: int, vocabulary: int, positions: int, tied: bool
) -> int:
    """GPT-2: LayerNorm, learned positions, biases everywhere but in the head (Radford et al. 2019)."""
    attention = 4 * hidden * hidden + 4 * hidden
    feed_forward = 2 * hidden * ffn + ffn + hidden
    block = attention + feed_forward + 4 * hidden
    tables = ((1 if tied else 2) * vocabulary + positions) * hidden
    return tables + layers * block + 2 * hidden
