"""How large is a checkpoint? Weights alone, as they are shared, or all that training goes on from."""

from __future__ import annotations

from launcher.plan.adapters import lora_parameters, trained_parameters
from launcher.plan.regimes import moment_bytes
from launcher.plan.setup import BYTES, Format, Setup
from launcher.plan.shape import Shape


def weights_bytes(parameters: float, weights: Format) -> float:
    """One number per parameter in the given format: 2 N bytes in bf16."""
    return BYTES[weights] * parameters


def checkpoint_bytes(shape: Shape, setup: Setup) -> float:
    """What the trainer saves: all weights as they are stored, and the moments of those that are trained."""
    adapters = lora_parameters(shape, setup.lora_rank) if setup.lora_rank is not None else 0
    trained = trained_parameters(shape, setup.lora_rank, setup.frozen_blocks)
    return weights_bytes(shape.parameters + adapters, setup.weights) + moment_bytes(setup) * trained


def training_state_bytes(parameters: float, weights: Format) -> float:
    """Weights and both moments of AdamW as papers count them: 12 N bytes in fp32.

    Lower formats come with fp32 master weights: 2 N + 4 N + 8 N = 14 N in bf16.
    """
    master = 0 if weights == "fp32" else BYTES["fp32"]
    return weights_bytes(parameters, weights) + (master + 2 * BYTES["fp32"]) * parameters
