"""The plan of a run: one JSON-able answer from model size to days."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

from configs.schema import Config
from launcher.plan.budget import TokenBudget, token_budget
from launcher.plan.flops import flops_per_token, recomputed_flops_per_token
from launcher.plan.memory import (
    ALLOCATOR_FACTOR,
    GIB,
    OUTSIDE_ALLOCATOR_GIB,
    RUNTIME_GIB,
    Strategy,
    memory,
    on_gpu,
)
from launcher.plan.shape import Shape, shape_of
from launcher.plan.time import Time, planned_time

PETAFLOP_S_DAY = 1e15 * 86400
CHECKPOINT_BYTES_PER_PARAMETER = 12
"""fp32 weight and two moments."""


def make_plan(config: Config) -> dict[str, Any]:
    """What a run will take, as plain JSON values; nothing is started or downloaded but a config.json.

    Raises ConfigError when a checkpoint or the corpus that the plan depends on cannot be read.
    """
    shape = shape_of(config.model)
    budget = token_budget(shape, config)
    time = planned_time(shape, config, budget)
    flops = flops_per_token(shape) * budget.tokens
    return {
        "model": _model(shape),
        "budget": {
            "kind": config.budget.kind,
            "tokens": budget.tokens,
            "tokens_per_parameter": budget.tokens_per_parameter,
            "steps": budget.steps,
            "global_batch_tokens": budget.global_batch_tokens,
            "epochs": config.budget.epochs,
            "verdict": budget.verdict,
        },
        "compute": {
            "flops": flops,
            "flops_per_token": flops_per_token(shape),
            "recomputed_flops_per_token": recomputed_flops_per_token(shape, config.activation_checkpointing),
            "petaflop_s_days": flops / PETAFLOP_S_DAY,
        },
        "memory": _memory(shape, config),
        "time": asdict(time),
        "checkpoint": {"size_gib": CHECKPOINT_BYTES_PER_PARAMETER * shape.parameters / GIB},
        "world": {
            "nodes": config.nodes,
            "gpus_per_node": config.gpus_per_node,
            "world_size": config.world_size,
            "global_batch": config.global_batch,
            "micro_batch": config.micro_batch,
            "accumulation": config.accumulation,
            "hardware": config.hardware.name,
            "precision": config.precision.compute,
            "sharding": config.sharding.strategy,
        },
        "assumptions": _assumptions(config, budget, time),
    }


def refusal(plan: dict[str, Any], config: Config) -> str | None:
    """One line why the run may not start, and what to change; none when it may."""
    peak = plan["memory"]
    if peak["verdict"] != "does not fit" or config.plan.force:
        return None
    changes = [
        "lower micro_batch" if config.micro_batch > 1 else "take a smaller model",
        "set activation_checkpointing=full" if config.activation_checkpointing != "full" else "",
        "use sharding=fsdp" if config.sharding.strategy != "fsdp" else "add nodes",
    ]
    needed, limit = peak["device_gib"], peak["limit_gib"]
    rank = "GPU" if on_gpu(config.hardware) else "worker"
    return (
        f"micro_batch={config.micro_batch}: needs {needed:.1f} GiB per {rank}, "
        f"{config.hardware.name} has {limit:.1f}; {', '.join(filter(None, changes))}, or plan.force=true"
    )


def _model(shape: Shape) -> dict[str, Any]:
    keys = ("name", "parameters", "parameters_active", "parameters_embedding", "layers", "hidden", "heads")
    return {key: getattr(shape, key) for key in (*keys, "kv_heads", "ffn", "vocabulary", "sequence_length")}


def _memory(shape: Shape, config: Config) -> dict[str, Any]:
    by_strategy = {name: memory(shape, config, name) for name in get_args(Strategy)}
    chosen = by_strategy[config.sharding.strategy]
    return {
        "strategy": config.sharding.strategy,
        **asdict(chosen),
        "verdict": chosen.verdict,
        "by_strategy": {
            name: {
                "active_gib": peak.active_gib,
                "reserved_gib": peak.reserved_gib,
                "device_gib": peak.device_gib,
                "verdict": peak.verdict,
            }
            for name, peak in by_strategy.items()
        },
    }


def _assumptions(config: Config, budget: TokenBudget, time: Time) -> dict[str, str]:
    """What the numbers rest on, one sentence each, only as far as it holds for this run."""
    hardware, compute = config.hardware, config.precision.compute
    said = {
        "flops": "6 N + 12 L H Q T per token, N without looked-up embeddings, causal half not discounted.",
        "memory": "AdamW is fused, attention keeps no score matrix, the loss sees all logits at once.",
    }
    if budget.estimate:
        said["tokens"] = f"{budget.estimate}."
    if on_gpu(hardware):
        said["device_memory"] = (
            f"The allocator reserves {ALLOCATOR_FACTOR} x the active bytes; "
            f"{OUTSIDE_ALLOCATOR_GIB:g} GiB lie outside it."
        )
    else:
        said["runtime"] = f"Python and torch take {RUNTIME_GIB} GiB of each worker's resident memory."
        if hardware.memory_gib is None:
            said["limit"] = f"This machine's memory, shared by {config.gpus_per_node} worker(s)."
    if time.step_seconds is None:
        said["time"] = (
            f"hardware.peak_tflops.{compute} is unknown for {hardware.name}, so time is not planned."
        )
        return said
    said["efficiency"] = f"A step reaches {hardware.efficiency:.0%} of the peak; communication is hidden."
    if not on_gpu(hardware):
        said["time"] = (
            "The peak is a float32 matrix product timed on this machine, in parallel on all its cores, "
            f"shared by {config.gpus_per_node} worker(s)."
        )
    return said
