"""What do lectures and papers say about memory? Rules by parameter and by layer.

The plan's own numbers come from memory.py; these are the forms that people know, to compare with.
N parameters, d data-parallel ranks; s sequence length, b rows of a micro batch, h hidden, a heads,
t tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Stage = Literal[0, 1, 2, 3]
"""Of ZeRO; 0 is replication."""


class PerParameter(NamedTuple):
    """Bytes per parameter."""

    weights: float
    gradients: float
    optimizer: float
    activations: float = 0

    @property
    def total(self) -> float:
        return sum(self)


FP32_RULE = PerParameter(weights=4, gradients=4, optimizer=8, activations=8)
"""4 weights + 8 two moments + 4 gradients + about 8 activations and temporaries = 24 (lecture notes; the last
is a rule of thumb: activations depend on the batch, not on parameters)."""
FP32_STATES = FP32_RULE._replace(activations=0)
MIXED = PerParameter(weights=2, gradients=2, optimizer=12)
"""Half-precision weights and gradients, and K = 12: fp32 weights and two moments (arXiv:1910.02054)."""


def training_bytes(parameters: float, bits: int = 32) -> float:
    """24N in fp32: weights, optimizer, gradients, activations; in proportion with fewer bits."""
    return FP32_RULE.total * bits / 32 * parameters


def weight_bytes(parameters: float, bits: int = 32) -> float:
    """4N in fp32."""
    return bits / 8 * parameters


def slide_rule_bytes(parameters: float, bits: int = 32) -> float:
    """20 (bits / 8) N, printed as a rule on lecture slides: 80N in fp32, 20N in 8 bit.

    It takes the 20 bytes that training adds to a weight's 4 for a factor. training_bytes is what its own
    table gives; plans print both, and use neither.
    """
    return 20 * bits / 8 * parameters


def zero_bytes(parameters: float, ranks: int, stage: Stage, optimizer: float = 12) -> float:
    """States of one rank in mixed precision by ZeRO stage; 0 is replication (arXiv:1910.02054, figure 1).

    (4 + K) N;  4N + KN/d;  2N + (2 + K) N/d;  (4 + K) N/d. 7.5B parameters on 64 ranks with K = 12: 120,
    31.4, 16.6 and 1.9 GB.
    """
    split_optimizer, split_gradients, split_weights = (ranks if stage >= n else 1 for n in (1, 2, 3))
    return parameters * (
        MIXED.weights / split_weights + MIXED.gradients / split_gradients + optimizer / split_optimizer
    )


def largest_model(memory_bytes: float, ranks: int, stage: Stage, tensor_parallel: int = 1) -> float:
    """Most parameters whose states fit, with nothing else in memory (Rajbhandari et al. 2020, table 2)."""
    return tensor_parallel * memory_bytes / zero_bytes(1, ranks, stage)


def layer_activation_bytes(
    *,
    sequence_length: int,
    micro_batch: int,
    hidden: int,
    heads: int,
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
    recompute: Literal["none", "selective", "full"] = "none",
) -> float:
    """Half-precision activations of one GPT layer with a score matrix (Korthikanti et al. 2022, table 2).

    sbh (10 + 24/t + 5as/ht);  with sequence parallelism sbh/t (34 + 5as/h);  selective recomputation drops
    the 5as/h of attention;  full recomputation keeps the input, 2sbh.
    """
    unit = sequence_length * micro_batch * hidden
    if recompute == "full":
        return 2.0 * unit
    scores = 5 * heads * sequence_length / hidden if recompute == "none" else 0.0
    whole = 10 / tensor_parallel if sequence_parallel else 10
    return unit * (whole + (24 + scores) / tensor_parallel)


def selective_saving(sequence_length: int, hidden: int, heads: int) -> float:
    """(5as/h) / (34 + 5as/h): share of a layer's activations that selective recomputation does not keep."""
    scores = 5 * heads * sequence_length / hidden
    return scores / (34 + scores)


def selective_overhead(sequence_length: int, hidden: int) -> float:
    """(s/6h) / (1 + s/6h): share of extra FLOPs that it costs (Korthikanti et al. 2022, section 5)."""
    attention = sequence_length / (6 * hidden)
    return attention / (1 + attention)
