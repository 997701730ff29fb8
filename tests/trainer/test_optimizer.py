"""AdamW's implementations are one algorithm: they differ in speed and memory only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from configs.compose import compose
from trainer.optimizer import build_optimizer, clip_and_step


def weights_after_steps(implementation: str) -> torch.Tensor:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 4))
    config = compose([f"optimizer.implementation={implementation}"]).optimizer
    optimizer = build_optimizer(module, config)
    for _ in range(5):
        module(torch.randn(8, 16)).square().sum().backward()
        clip_and_step(optimizer, 1e-2, clip_norm=1.0)
    return nn.utils.parameters_to_vector(module.parameters()).detach()


@pytest.mark.parametrize("implementation", ["foreach", "loop"])
def test_an_implementation_reaches_the_weights_of_the_fused_one(implementation: str) -> None:
    torch.testing.assert_close(weights_after_steps(implementation), weights_after_steps("fused"))
