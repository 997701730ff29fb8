"""What does recomputation cost in time? One block of a tensor-parallel GPT without fused attention.

s rows' length, b rows, h hidden, a heads, t tensor-parallel ranks, 16-bit formats. Recomputing all of
attention's scores is cheap in FLOPs but not in memory traffic, which is what decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from configs.schema import Hardware
from launcher.plan.communication import network_of
from launcher.plan.flops import attention_flops_per_token
from launcher.plan.shape import Shape
from launcher.plan.time import attention_share, memory_bytes_s, peak_flops_per_second, products_share

SCORE_BYTES = 13
"""Per score and forward pass: written, softmax reads and writes, dropout reads and writes with a mask of
one byte, the product with the values reads."""
REPLICATED_BYTES = 22
"""Per hidden number and forward pass: two norms read and write, two residual dropouts read two, write one
and a mask. Every tensor-parallel rank does them for all tokens unless the sequence is split."""
GELU_BYTES = 16
"""Per hidden number of a forward pass: four times as many are read and written."""

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class BlockForward:
    """Seconds of a forward pass through one block on one rank."""

    products: float
    attention_core: float
    """Scores, softmax, dropout and their product with the values: what selective recomputation repeats."""
    elementwise_split: float
    elementwise_replicated: float
    network: float

    @property
    def total(self) -> float:
        parts = (self.products, self.attention_core, self.elementwise_split, self.network)
        return sum(parts) + self.elementwise_replicated


def block_forward(shape: Shape, rows: int, tensor_parallel: int, hardware: Hardware) -> BlockForward:
    """A forward pass: 2 n b s / t FLOPs in products and 4 b s^2 h / t in attention, and memory traffic.

    Raises ValueError for hardware without a published 16-bit peak.
    """
    peak = peak_flops_per_second(hardware, "fp16")
    if peak is None:
        raise ValueError(f"{hardware.name} has no published fp16 peak")
    bandwidth = memory_bytes_s(hardware)
    tokens = rows * shape.sequence_length
    hidden_numbers = tokens * shape.hidden
    scores = tokens * shape.sequence_length * shape.heads / tensor_parallel
    core_flops = tokens * attention_flops_per_token(
        layers=1, width=shape.heads * shape.head_dim, sequence_length=shape.sequence_length
    )
    core = core_flops / 3 / tensor_parallel / (peak * attention_share(peak))
    products = 2 * shape.parameters_layer * tokens / tensor_parallel
    return BlockForward(
        products=products / (peak * products_share(peak)),
        attention_core=core + SCORE_BYTES * scores / bandwidth,
        elementwise_split=GELU_BYTES * hidden_numbers / tensor_parallel / bandwidth,
        elementwise_replicated=REPLICATED_BYTES * hidden_numbers / bandwidth,
        network=network_of(hardware).all_reduce_seconds(
            2 * 2 * hidden_numbers, 2, tensor_parallel, tensor_parallel
        ),
    )


def recompute_overhead(
    forward: BlockForward,
    baseline_seconds: float,
    recompute: Recompute,
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
) -> float:
    """Added time over a block's forward and backward without recomputation or sequence parallelism.

    full repeats forward; selective repeats the attention core. Sequence parallelism splits the replicated
    elementwise work of forward; in backward it gains nothing, since inputs are gathered again.
    Korthikanti et al. 2022 (arXiv:2205.05198), section 6.1.
    """
    again = {"none": 0.0, "selective": forward.attention_core, "full": forward.total}[recompute]
    saved = (1 - 1 / tensor_parallel) * forward.elementwise_replicated if sequence_parallel else 0.0
    return (again - saved) / baseline_seconds


def step_ratio(slow_seconds: float, fast_seconds: float) -> float:
    """How many times as long one measured step takes as another."""
    return slow_seconds / fast_seconds
