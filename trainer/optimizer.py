"""AdamW over named parameters, and its state under their names."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from configs.schema import Optimizer


def build_optimizer(module: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """AdamW in which matrices decay and vectors (norms, biases) do not."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=config.implementation == "fused",
        foreach=config.implementation == "foreach",
    )


def clip_and_step(optimizer: torch.optim.AdamW, lr: float, clip_norm: float) -> Tensor:
    """Clip by the global norm, step, clear gradients. Returns the norm before clipping, 0-d fp32."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm, foreach=True)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


def logical_state(
    parameters: Iterable[tuple[str, Tensor]], optimizer: torch.optim.AdamW, steps_done: int
) -> dict[str, Tensor]:
    """Logical state: weight/NAME, exp_avg/NAME, exp_avg_sq/NAME, whole or sharded as the parameter is.

    The tensors are the live ones: what is loaded into them is what training goes on with. Moments
    that AdamW has not made yet are made here, with `steps_done` as its step count.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in parameters:
        state[f"weight/{name}"] = parameter.detach()
        if not parameter.requires_grad:
            continue
        moments = optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments["exp_avg"] = torch.zeros_like(parameter)
            moments["exp_avg_sq"] = torch.zeros_like(parameter)
        moments["step"].fill_(steps_done)
        state[f"exp_avg/{name}"] = moments["exp_avg"]
        state[f"exp_avg_sq/{name}"] = moments["exp_avg_sq"]
    return state
