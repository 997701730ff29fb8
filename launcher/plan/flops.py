"""How much arithmetic is it? Model FLOPs by the conventions that papers quote, and what hardware adds."""

from __future__ import annotations

from typing import NamedTuple

from launcher.plan.scaling import PETAFLOP_S_DAY
from launcher.plan.setup import Checkpointing
from launcher.plan.shape import Shape


def flops_per_token(shape: Shape) -> int:
    """FLOPs of forward and backward for one token: 6 N + 12 L H Q T.

    N counts the active weights that are multiplied: not the looked-up input embeddings, but the head,
    also when it is tied to them. L layers, H heads, Q head size, T sequence length; the causal half of
    attention is not discounted. Chowdhery et al. 2022 (PaLM), appendix B.
    A token of an encoder-decoder meets the encoder, or the decoder and its attention to the encoder: the
    mean of both, rows of T tokens in each.
    """
    attention = attention_flops_per_token(
        layers=shape.attentions,
        width=shape.heads * shape.head_dim,
        sequence_length=shape.sequence_length,
    )
    return 6 * shape.parameters_multiplied + attention // shape.stacks


def attention_flops_per_token(*, layers: int, width: int, sequence_length: int) -> int:
    """12 L H Q T: scores and their sum over values, forward and backward; width is H Q."""
    return 12 * layers * width * sequence_length


def petaflop_s_days(flops: float) -> float:
    """FLOPs / 8.64e19: days of a machine that does 10^15 of them a second."""
    return flops / PETAFLOP_S_DAY


class HoffmannFlops(NamedTuple):
    """Training FLOPs of one row, counted component by component."""

    blocks: float
    """Without embeddings and logits, which is what reproduces the paper's table A4."""
    all: float
    """With both, which is what its text says."""


def hoffmann_flops(shape: Shape) -> HoffmannFlops:
    """Hoffmann et al. 2022, appendix F: three times the forward pass of one row of s tokens.

    Embeddings and logits 2 s V h each; in a block queries, keys and values 2 s h (a + 2 k) q, scores
    2 s^2 a q, softmax 3 s^2 a, their sum over values 2 s^2 a q, output 2 s a q h, feed-forward 2 s h f per
    matrix. Their embedding is a product with one-hot rows, which nobody computes.
    """
    s, h, a, q = shape.sequence_length, shape.hidden, shape.heads, shape.head_dim
    projections = 2 * s * h * q * (2 * a + 2 * shape.kv_heads)
    attention = projections + 4 * s * s * a * q + 3 * s * s * a
    feed_forward = (3 if shape.gated else 2) * 2 * s * h * shape.ffn_active
    blocks = shape.layers * (attention + feed_forward)
    tables = 2 * 2 * s * shape.vocabulary * h
    return HoffmannFlops(3.0 * blocks, 3.0 * (blocks + tables))


def megatron_flops(shape: Shape, rows: int, recompute: str = "none") -> float:
    """FLOPs of a step over `rows` rows of a GPT with a feed-forward layer of 4 h.

    none: 72 B L s h^2 (1 + s/6h + V/12hL), the model's own (Korthikanti et al. 2022, appendix A);
    attention: s/3h instead, when scores and their sum over values are repeated;
    full: 96 B L s h^2 (1 + s/6h + V/16hL), when whole blocks are (Narayanan et al. 2021, section 5.1).
    """
    s, h, layers, vocabulary = shape.sequence_length, shape.hidden, shape.layers, shape.vocabulary
    unit = rows * layers * s * h**2
    match recompute:
        case "none":
            return 72 * unit * (1 + s / (6 * h) + vocabulary / (12 * h * layers))
        case "attention":
            return 72 * unit * (1 + s / (3 * h) + vocabulary / (12 * h * layers))
        case "full":
            return 96 * unit * (1 + s / (6 * h) + vocabulary / (16 * h * layers))
    raise ValueError(f"recompute={recompute}: must be none, attention or full")


def recomputed_flops_per_token(shape: Shape, checkpointing: Checkpointing) -> int:
    """FLOPs that activation checkpointing adds per token; hardware spends them, MFU does not count them.

    full repeats the blocks' forward: a third of their share above. (torch stops before a block's last
    product when nothing after it is needed; conventions do not discount that.)
    selective repeats every second product of a block, as torchtitan's per-op policy does, and no last one:
    keys where they are a product of their own, attention's output, the second matrix into a gated
    feed-forward layer. Experts are no plain products: all of theirs are repeated.
    """
    if checkpointing == "none":
        return 0
    queries = shape.heads * shape.head_dim
    if checkpointing == "full":
        attention = 4 * shape.attentions * queries * shape.sequence_length
        return 2 * shape.parameters_blocks + attention // shape.stacks
    keys = 0 if shape.fused_qkv else shape.kv_heads * shape.head_dim
    if shape.experts:
        feed_forward = (3 if shape.gated else 2) * shape.ffn_active
    else:
        feed_forward = shape.ffn if shape.gated and not shape.fused_gate else 0
    products = shape.attentions * (queries + keys) + shape.layers * feed_forward
    return 2 * shape.hidden * products // shape.stacks


def trained_flops_per_token(shape: Shape, trained_share: float) -> float:
    """FLOPs per token when only a share of the multiplied weights is trained, as with LoRA.

    Of 6 per weight 2 are the weight's own gradient, which a frozen one does not need; the gradient passes
    through it all the same (Hu et al. 2021, section 4.2, measure a quarter less time on GPT-3).
    """
    return flops_per_token(shape) - 2 * (1 - trained_share) * shape.parameters_multiplied


def utilisation(flops: float, seconds: float, accelerators: float, peak_flops_per_second: float) -> float:
    """Share of the peak: MFU of the model's FLOPs, HFU of those with recomputation.

    Chowdhery et al. 2022, section 4.1. FLOPs, and the seconds they took on that many accelerators.
    """
    return flops / (seconds * accelerators * peak_flops_per_second)


def hardware_utilisation(mfu: float, model_flops: float, recomputed_flops: float) -> float:
    """HFU = MFU (model + recomputed) / model; 4/3 MFU when a whole forward pass is repeated."""
    return mfu * (model_flops + recomputed_flops) / model_flops


class ImpliedRate(NamedTuple):
    """What a promised time asks of each accelerator."""

    flops_per_second: float
    possible: bool
    """Whether that is within the peak."""


def implied_rate(flops: float, days: float, accelerators: float, peak_flops_per_second: float) -> ImpliedRate:
    """FLOPs / (days x 86400 x accelerators), beside the peak that none can exceed."""
    rate = flops / (days * 86400 * accelerators)
    return ImpliedRate(rate, rate <= peak_flops_per_second)
