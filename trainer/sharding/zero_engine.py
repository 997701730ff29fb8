"""DeepSpeed's engine: its settings from ours, and a model brought to the device as it wants it."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import redirect_stdout
from functools import cache
from importlib.util import find_spec
from io import StringIO
from typing import Any

import torch
from torch import nn
from torch.utils import swap_tensors

from configs.schema import Config, ConfigError
from trainer.distributed import World

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@cache
def _deepspeed() -> Any:
    """The optional package, kept quiet."""
    # Without a GPU it would look for other accelerators' drivers.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    # A kernel for inference on CPUs, which would be compiled at the first start, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls torch's functions by their older names.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def refuse(config: Config, world: World) -> None:
    """Raise ConfigError for what DeepSpeed cannot do with this run, or here."""
    sharding = config.sharding
    if find_spec("deepspeed") is None:
        instead = "fsdp" if sharding.strategy == "zero3" else "fsdp_grad_op"
        raise ConfigError(
            f"sharding.strategy={sharding.strategy}: needs DeepSpeed, pip install --no-build-isolation "
            f"'trainyard[deepspeed]'; or choose {instead}"
        )
    if sharding.strategy == "zero3":
        # Its hooks fetch weights inside of blocks, in another order in the backward pass.
        if config.activation_checkpointing == "selective":
            raise ConfigError(
                "activation_checkpointing=selective: not with sharding=zero3, choose full, or sharding=fsdp"
            )
        if config.compile:
            raise ConfigError("compile=true: not with sharding=zero3, choose sharding=fsdp")
    for key in ("quantized_weights", "quantized_gradients"):
        if getattr(sharding, key) and world.device.type != "cuda":
            raise ConfigError(f"sharding.{key}=true: needs GPUs")
    if config.precision.compute == "fp16" and not _deepspeed().get_accelerator().is_fp16_supported():
        raise ConfigError(
            f"precision.compute=fp16: not supported by DeepSpeed on this {world.device.type}, "
            "choose precision=bf16 or sharding=fsdp"
        )


def settings_of(config: Config, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration. parameters: those of the model, which bound the size of buffers."""
    sharding = config.sharding
    # DeepSpeed allocates whole buckets and aligns them to two numbers.
    bucket = min(int(sharding.bucket_parameters), parameters) // 2 * 2 + 2
    zero: dict[str, Any] = {
        "stage": int(sharding.strategy.removeprefix("zero")),
        "contiguous_gradients": True,
        "overlap_comm": sharding.overlap,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": int(sharding.prefetch_parameters),
        "stage3_max_live_parameters": int(sharding.live_parameters),
        "stage3_max_reuse_distance": int(sharding.live_parameters),
        "stage3_param_persistence_threshold": int(sharding.whole_parameters),
        "zero_hpz_partition_size": sharding.secondary_degree or 1,
        "zero_quantized_weights": sharding.quantized_weights,
        "zero_quantized_gradients": sharding.quantized_gradients,
    }
    host = {"device": "cpu", "pin_memory": sharding.pin_memory and torch.cuda.is_available()}
    if sharding.offload != "none":
        zero["offload_optimizer"] = host
    if sharding.offload == "all":
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        # The loop counts micro batches and says which one completes a step.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision.compute == "bf16"},
        # A constant scale: ours is set before every pass.
        "fp16": {"enabled": config.precision.compute == "fp16", "loss_scale": 1.0},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": sharding.reduce_dtype,
    }


def materialize(module: nn.Module, config: Config, device: torch.device, settings: dict[str, Any]) -> None:
    """Give parameters memory on the device, without values; zero3 splits them module by module.

    A parameter stays the same object, so that tied ones stay tied and an optimizer keeps its groups.
    """
    deepspeed = _deepspeed()
    deepspeed.init_distributed(dist_init_required=False)
    dtype = FORMATS[config.precision.compute]
    split: Any = None
    # Children come before their parents, with which they would be split otherwise.
    for part in reversed(list(module.modules())):
        own = list(part.parameters(recurse=False))
        for parameter in own:
            if not hasattr(parameter, "ds_id"):
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                swap_tensors(parameter, nn.Parameter(empty, parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))
        if config.sharding.strategy != "zero3" or not own:
            continue
        if split is None:
            deepspeed.zero.Init(module=part, config_dict_or_path=settings)
            split = own[0]
        split.convert_to_zero_parameters(own)


def start(module: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """The engine around a materialized module. It replaces what the optimizer's groups hold."""
    with redirect_stdout(StringIO()):  # an account of memory, line after line
        engine, *_ = _deepspeed().initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )
    return engine
