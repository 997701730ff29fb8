"""Can the trainer do it, on these machines? What cannot run is refused before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain

from configs.schema import Config
from launcher.plan.advice import DEEPSPEED


def why_not(config: Config) -> str | None:
    """One line naming the first setting that cannot run, why, and what can; none when all can."""
    return next(chain(_not_trained_yet(config), _not_on_such_hardware(config), _not_installed(config)), None)


def _not_trained_yet(config: Config) -> Iterator[str]:
    """What the plan knows and the trainer does not do."""
    settings = (
        ("precision.compute", config.precision.compute, ("fp32", "bf16", "fp16")),
        ("precision.weights", config.precision.weights, ("fp32",)),
        ("optimizer.kind", config.optimizer.kind, ("adamw",)),
        ("objective.logits", config.objective.logits, ("fp32", "bf16")),
        ("plan.tensor_parallel", config.plan.tensor_parallel, (1,)),
        ("plan.pipeline_parallel", config.plan.pipeline_parallel, (1,)),
        ("plan.context_parallel", config.plan.context_parallel, (1,)),
    )
    for key, value, trained in settings:
        if value not in trained:
            allowed = ", ".join(map(str, trained))
            yield f"{key}={value}: can be planned but not trained yet; trained: {allowed}"
    if config.sharding.strategy == "zero3" and config.compile:
        yield "compile=true: not with sharding=zero3, whose hooks are compiled anew each time; use fsdp"
    if config.sharding.strategy == "zero3" and config.activation_checkpointing == "selective":
        yield (
            "activation_checkpointing=selective: not with sharding=zero3, which recomputes in another order; "
            "choose full, or sharding=fsdp"
        )


def _not_on_such_hardware(config: Config) -> Iterator[str]:
    compute, peaks = config.precision.compute, config.hardware.peak_tflops.model_dump()
    known = [name for name, peak in peaks.items() if peak is not None and name != "fp8"]
    if known and compute not in known:
        device = config.hardware.device_name or config.hardware.name
        yield f"precision.compute={compute}: {device} has no units for it, choose {' or '.join(known)}"
    if config.hardware.name != "cpu":
        return
    for key in ("quantized_weights", "quantized_gradients"):
        if getattr(config.sharding, key):
            yield f"sharding.{key}=true: needs GPUs, choose false"


def _not_installed(config: Config) -> Iterator[str]:
    """Packages that the run needs, asked for where it will run: on this machine."""
    strategy = config.sharding.strategy
    if strategy in DEEPSPEED and not find_spec("deepspeed"):
        instead = "fsdp" if strategy == "zero3" else "fsdp_grad_op"
        yield (
            f"sharding.strategy={strategy}: needs DeepSpeed, pip install --no-build-isolation "
            f"'trainyard[deepspeed]'; or choose {instead}"
        )
    if config.model.lora_rank is not None and not find_spec("peft"):
        yield f"model.lora_rank={config.model.lora_rank}: needs PEFT, pip install 'trainyard[lora]'"
