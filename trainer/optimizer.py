"""AdamW over a module's parameters: clipping, loss scaling, and its state under their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from configs.schema import Config, Optimizer
from trainer.loss_scale import LossScale, loss_scale_of
from trainer.sharding import Progress


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


def clip_and_step(
    optimizer: torch.optim.AdamW, lr: float, clip_norm: float, loss_scale: LossScale | None = None
) -> Tensor:
    """Clip by the global norm, step, clear gradients. Returns the norm before clipping, 0-d fp32.

    With a loss scale, which gradients are multiples of, a norm that is not finite changes no weight.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    divisor = norm
    if loss_scale is not None:
        norm = norm / loss_scale.scale
        divisor = norm.clamp(min=clip_norm) * loss_scale.scale
        finite = bool(norm.isfinite())
        loss_scale.update(finite)
        if not finite:
            optimizer.zero_grad()
            return norm
    torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, divisor, foreach=True)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


def live_state(
    parameters: Iterable[tuple[str, Tensor]], optimizer: torch.optim.AdamW
) -> Iterator[tuple[str, Tensor]]:
    """Logical state: weight/NAME, exp_avg/NAME, exp_avg_sq/NAME, whole or sharded as the parameter is.

    The tensors are the live ones. Moments that AdamW has not made yet are made here, zero.
    """
    for name, parameter in parameters:
        yield f"weight/{name}", parameter.detach()
        if not parameter.requires_grad:
            continue
        moments = optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments["exp_avg"] = torch.zeros_like(parameter)
            moments["exp_avg_sq"] = torch.zeros_like(parameter)
        yield f"exp_avg/{name}", moments["exp_avg"]
        yield f"exp_avg_sq/{name}", moments["exp_avg_sq"]


def set_updates(optimizer: torch.optim.AdamW, updates: int) -> None:
    """Tell AdamW how many steps it has done, on which its correction of the moments depends."""
    for moments in optimizer.state.values():
        moments["step"].fill_(updates)


class Updater:
    """Turns losses of a module, whole or split into DTensors, into updates of its weights."""

    def __init__(self, module: nn.Module, config: Config) -> None:
        self._module = module
        self.optimizer = build_optimizer(module, config.optimizer)
        self._clip_norm = config.optimizer.clip_norm
        self._loss_scale = loss_scale_of(config.precision)
        self._updates = 0
        self._diverged: Tensor | None = None

    def backward(self, loss: Tensor) -> None:
        (loss if self._loss_scale is None else loss * self._loss_scale.scale).backward()

    def step(self, lr: float) -> Tensor:
        """As `clip_and_step`; without a loss scale, a norm that was not finite once stays infinite."""
        norm = clip_and_step(self.optimizer, lr, self._clip_norm, self._loss_scale)
        if self._loss_scale is not None:
            self._updates += bool(norm.isfinite())
            return norm
        self._updates += 1
        # The weights may be spoilt now, however good later norms look: the run has diverged.
        self._diverged = ~norm.isfinite() if self._diverged is None else self._diverged | ~norm.isfinite()
        return torch.where(self._diverged, torch.inf, norm)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As `live_state`."""
        return live_state(self._module.named_parameters(), self.optimizer)

    def progress(self) -> Progress:
        if self._loss_scale is None:
            return Progress(self._updates)
        return Progress(self._updates, self._loss_scale.scale, self._loss_scale.steps_at_scale)

    def loaded(self, progress: Progress) -> None:
        """Go on from these numbers; the tensors have been written to."""
        self._updates = progress.updates
        set_updates(self.optimizer, progress.updates)
        if self._loss_scale is not None:
            self._loss_scale.loaded(progress)
