"""The loss scale of fp16: what changes it, and that steps with it are steps without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from configs.compose import compose
from configs.schema import Config
from trainer.loss_scale import LossScale
from trainer.optimizer import Updater
from trainer.sharding import Progress


def test_an_overflow_halves_the_scale_and_enough_good_steps_double_it() -> None:
    scale = LossScale(1024.0, steps=3)
    seen = []
    for finite in (True, True, False, True, True, True, True, False, False):
        scale.update(finite)
        seen.append((scale.scale, scale.steps_at_scale))
    good = [(512.0, 1), (512.0, 2), (1024.0, 0), (1024.0, 1)]
    assert seen == [(1024.0, 1), (1024.0, 2), (512.0, 0), *good, (512.0, 0), (256.0, 0)]


def config(*overrides: str) -> Config:
    return compose(["precision.compute=fp16", *overrides])


def weights_after(configured: Config, factors: list[float]) -> tuple[torch.Tensor, list[float], Updater]:
    """Weights and norms after a step for each factor of the loss."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    updater = Updater(module, configured)
    norms = []
    for factor in factors:
        updater.backward(factor * module(torch.randn(3, 8)).square().sum())
        norms.append(updater.step(1e-2).item())
    return nn.utils.parameters_to_vector(module.parameters()).detach(), norms, updater


@pytest.mark.parametrize("clip_norm", [1e-3, 1e3])
def test_steps_with_a_scale_are_steps_without_one(clip_norm: float) -> None:
    factors = [1.0, 0.1, 10.0]
    scaled, norms, updater = weights_after(config(f"optimizer.clip_norm={clip_norm}"), factors)
    plain = config("precision.compute=fp32", f"optimizer.clip_norm={clip_norm}")
    expected, expected_norms, _ = weights_after(plain, factors)
    torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=1e-6)
    assert norms == pytest.approx(expected_norms, rel=1e-6)
    assert updater.progress() == Progress(updates=3, loss_scale=65536.0, steps_at_scale=3)


def test_a_gradient_that_overflows_changes_nothing_but_the_scale() -> None:
    before, _, _ = weights_after(config(), [1.0])
    after, norms, updater = weights_after(config(), [1.0, float("inf")])
    assert torch.equal(after, before)
    assert norms[1] == float("inf") or norms[1] != norms[1]
    assert updater.progress() == Progress(updates=1, loss_scale=32768.0, steps_at_scale=0)


def test_a_checkpoints_scale_is_gone_on_with() -> None:
    _, _, updater = weights_after(config("precision.loss_scale_steps=10"), [1.0])
    updater.loaded(Progress(updates=40, loss_scale=8.0, steps_at_scale=9))
    assert updater.progress() == Progress(updates=40, loss_scale=8.0, steps_at_scale=9)


def test_a_checkpoint_of_another_format_leaves_the_configured_scale() -> None:
    _, _, updater = weights_after(config("precision.loss_scale=256"), [])
    updater.loaded(Progress(updates=40))
    assert updater.progress() == Progress(updates=40, loss_scale=256.0, steps_at_scale=0)
