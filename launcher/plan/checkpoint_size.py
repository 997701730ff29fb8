"""How large is a checkpoint? Weights alone, as they are shared, or all that training goes on from."""

from __future__ import annotations

from launcher.plan.setup import BYTES, Format


def weights_bytes(parameters: float, weights: Format) -> float:
    """One number per parameter in the given format: 2 N bytes in bf16."""
    return BYTES[weights] * parameters


def training_state_bytes(parameters: float, weights: Format) -> float:
    """Weights and both moments of AdamW: 12 N bytes in fp32.

    Lower formats come with fp32 master weights: 2 N + 4 N + 8 N = 14 N in bf16.
    """
    master = 0 if weights == "fp32" else BYTES["fp32"]
    return weights_bytes(parameters, weights) + (master + 2 * BYTES["fp32"]) * parameters
