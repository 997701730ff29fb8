"""How many weights does an architecture have? Closed forms that equal the transformers modules."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The feed-forward layers of a mixture of experts (Shazeer et al. 2017), in `blocks` of the blocks."""

    number: int
    per_token: int
    """Experts that a token is routed to; the shared part is on top."""
    ffn: int
    """Width of one expert."""
    blocks: int
    shared_ffn: int = 0
    """Width of the part that every token passes through."""
    other: int = 0
    """Weights of the router, and of a gate on the shared part, in one block."""
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes and switches that decide how many weights a transformer has."""

    layers: int
    """Blocks; with encoder_layers those of encoder and decoder together."""
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    gated: bool
    """Whether the feed-forward layer has two matrices in and one out, like SwiGLU."""
    tied: bool
    norm: int
    """Weights per channel of a norm: RMSNorm 1, LayerNorm 2, without weights 0."""
    norms: int = 2
    """Norms of a block, besides those of queries and keys."""
    outer_norms: int = 1
    """Norms outside the blocks."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Of the attention's output projection."""
    up_bias: bool = False
    """Of the feed-forward layer's matrices in."""
    down_bias: bool = False
    head_bias: bool = False
    fused_qkv: bool = False
    """Whether one product makes queries, keys and values."""
    fused_gate: bool = False
    """Whether one product makes both inputs of a gated feed-forward layer."""
    query_key_norm: int = 0
    """Weights of a block's norms of queries and keys."""
    attention: int | None = None
    """Weights of a block's attention where it is not four projections."""
    positions: int = 0
    """Rows of learned positions."""
    token_types: int = 0
    embedding_width: int | None = None
    """Width of token embeddings and head where it is not hidden."""
    encoder_layers: int = 0
    """Blocks of the encoder of an encoder-decoder; its other blocks attend to the encoder too."""
    outer: int = 0
    """Weights outside the blocks that nothing above describes."""
    experts: Experts | None = None


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights."""

    total: int
    active: int
    """Those that one token passes through: its experts, and encoder or decoder (half, on average)."""
    embedding: int
    """Rows that are looked up: tokens, learned positions, token types."""
    head: int
    """The product that makes logits, tied or not."""


def count(architecture: Architecture) -> Parameters:
    """Weights of every block, norm, table and head, biases included.

    A Llama block has h (2 a q + 2 k q) + 3 h f + 2 h: h hidden, a heads and k key-value heads of size q,
    f feed-forward (Touvron et al. 2023, section 2.2); a GPT-2 block 4 h^2 + 2 h f + 9 h + f with biases
    (Radford et al. 2019). Raised to architectures by the switches above.
    """
    a = architecture
    attention = a.attention if a.attention is not None else attention_weights(a)
    norms = a.norms * a.norm * a.hidden + a.query_key_norm
    block = attention + norms + feed_forward_weights(a, a.ffn)
    inside = a.layers * block
    if a.encoder_layers:
        inside += (a.layers - a.encoder_layers) * (attention + a.norm * a.hidden)
    idle = 0
    if mixture := a.experts:
        expert = feed_forward_weights(a, mixture.ffn, bias=mixture.bias)
        shared = feed_forward_weights(a, mixture.shared_ffn) if mixture.shared_ffn else 0
        mixed = mixture.number * expert + shared + mixture.other
        inside += mixture.blocks * (mixed - feed_forward_weights(a, a.ffn))
        idle = mixture.blocks * (mixture.number - mixture.per_token) * expert
    width = a.embedding_width or a.hidden
    head = a.vocabulary * width
    embedding = head + (a.positions + a.token_types) * a.hidden
    outside = a.outer_norms * a.norm * a.hidden + a.head_bias * a.vocabulary + a.outer
    if width != a.hidden:
        outside += 2 * width * a.hidden
    total = embedding + (0 if a.tied else head) + inside + outside
    active = total // 2 if a.encoder_layers else total - idle
    return Parameters(total, active, embedding, head)


def attention_weights(architecture: Architecture) -> int:
    """Query, key, value and output projections of one block."""
    a = architecture
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    qkv = queries + 2 * keys
    return a.hidden * (qkv + queries) + a.qkv_bias * qkv + a.output_bias * a.hidden


def feed_forward_weights(architecture: Architecture, ffn: int, bias: bool | None = None) -> int:
    """Matrices in and out of one feed-forward layer of width ffn; bias overrides the blocks' switches."""
    a = architecture
    matrices_in = 2 if a.gated else 1
    up_bias, down_bias = (a.up_bias, a.down_bias) if bias is None else (bias, bias)
    weights = (matrices_in + 1) * a.hidden * ffn
    return weights + up_bias * matrices_in * ffn + down_bias * a.hidden
