"""The plan of a run: one JSON-able answer from model size to dollars."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any, Literal

from configs.schema import Config, ConfigError
from launcher.plan.advice import Choice, advise, best, choices, overrides, prices
from launcher.plan.assumptions import assumptions
from launcher.plan.budget import token_budget
from launcher.plan.calibration import calibrated
from launcher.plan.checkpoint_size import checkpoint_bytes
from launcher.plan.communication import trained_share
from launcher.plan.cost import cost
from launcher.plan.flops import (
    hoffmann_flops,
    implied_rate,
    petaflop_s_days,
    recomputed_flops_per_token,
    trained_flops_per_token,
)
from launcher.plan.memory import GIB, Memory, memory, memory_by_strategy
from launcher.plan.reliability import Reliability, reliability
from launcher.plan.setup import Setup, setup_of
from launcher.plan.shape import Shape, shape_of
from launcher.plan.states import slide_rule_bytes, training_bytes, zero_bytes
from launcher.plan.time import Calibration, StepTime, peak_flops_per_second, run_time, step_time

SECONDS_PER_HOUR = 3600


def resolve(config: Config) -> Config:
    """The configuration with sharding=auto replaced by the best that fits; others come back as they are.

    Of what torch alone can do, so that a run does not depend on DeepSpeed without a word.
    Raises ConfigError when nothing fits.
    """
    if config.sharding.strategy != "auto":
        return config
    shape, calibration = shape_of(config.model), _calibration(config)
    base = setup_of(config, "ddp")
    found = [
        choice
        for choice in choices(shape, base, config.global_batch, config.hardware, calibration)
        if choice.native
    ]
    ranked = best(found)
    if not ranked:
        closest = min(found, key=lambda choice: choice.memory.fullness)
        raise ConfigError(
            f"sharding=auto: nothing fits; closest is {_words(closest.setup)}, which needs "
            f"{closest.memory.shortage}; add nodes, or take a smaller model or shorter rows"
        )
    return _with_setup(config, ranked[0].setup)


def make_plan(config: Config) -> dict[str, Any]:
    """What a run will take, as plain JSON values; nothing is started or downloaded but a config.json.

    sharding=auto must be resolved before. Raises ConfigError when a checkpoint or the corpus that the plan
    depends on cannot be read, or a budget needs a speed or a price that is unknown.
    """
    shape, setup, calibration = shape_of(config.model), setup_of(config), _calibration(config)
    _check_parallel(shape, setup)
    measured = calibration.get("reserved_over_active") if calibration else None
    peak = memory(shape, setup, config.hardware, measured)
    step = step_time(shape, setup, config.hardware, calibration)
    size_bytes = checkpoint_bytes(shape, setup)
    failures = reliability(size_bytes, config.nodes, config.plan)
    budget = token_budget(shape, config, _tokens_per_gpu_hour(step, setup, config, failures))
    time = run_time(step, budget.steps, config.plan.productive_share, failures.expected_goodput)
    found = choices(shape, setup, config.global_batch, config.hardware, calibration)
    yours = Choice(setup, peak, step)
    per_token = trained_flops_per_token(shape, trained_share(shape, setup))
    flops = per_token * budget.tokens
    answer = {
        "model": _model(shape),
        "budget": {"kind": config.budget.kind, **asdict(budget)},
        "compute": _compute(shape, setup, per_token, flops),
        "memory": {
            "strategy": setup.strategy,
            **_peak(peak),
            "by_strategy": {
                name: _peak(other)
                for name, other in memory_by_strategy(shape, setup, config.hardware, measured).items()
            },
            "rules_gb": _rules(shape.parameters, setup.state_ranks),
        },
        "time": asdict(time) | {"parts_seconds": step.parts_seconds},
        "cost": asdict(
            cost(
                time.seconds,
                config.world_size,
                config.hardware,
                config.plan,
                size_bytes,
                config.checkpoint.keep_last,
            )
        ),
        "checkpoint": {
            "size_gib": size_bytes / GIB,
            "save_seconds": failures.save_seconds,
            "interval_minutes": failures.interval_seconds / 60,
            "hours_between_failures": failures.mtbf_seconds / SECONDS_PER_HOUR,
            "expected_goodput": failures.expected_goodput,
        },
        "advice": advise(found, yours),
        "prices": prices(found, yours),
        "world": _world(config),
        "assumptions": assumptions(config, budget, step),
    }
    plain: dict[str, Any] = _plain(answer)
    return plain


def _check_parallel(shape: Shape, setup: Setup) -> None:
    for key, ranks, name, size in (
        ("tensor_parallel", setup.tensor_parallel, "attention heads", shape.heads),
        ("pipeline_parallel", setup.pipeline_parallel, "blocks", shape.layers),
        ("context_parallel", setup.context_parallel, "tokens of a row", shape.sequence_length),
    ):
        if ranks > size:
            raise ConfigError(f"plan.{key}={ranks}: must be at most the model's {size} {name}")


def refusal(plan: dict[str, Any], config: Config) -> str | None:
    """One line why the run may not start, and what to change; none when it may."""
    if config.plan.force:
        return None
    return _too_large(plan, config) or too_fast(plan, config)


def too_fast(plan: dict[str, Any], config: Config) -> str | None:
    """One line when plan.deadline_days asks for more than the machines' peak; none otherwise."""
    days, peak = config.plan.deadline_days, peak_flops_per_second(config.hardware, config.precision.compute)
    if days is None or peak is None:
        return None
    flops = plan["compute"]["flops"]
    rate = implied_rate(flops, days, config.world_size, peak)
    if rate.possible:
        return None
    least = flops / peak / 86400
    return (
        f"plan.deadline_days={days:g}: implies {rate.flops_per_second / 1e12:,.4g} TFLOP/s per GPU, above "
        f"the peak of {peak / 1e12:,.0f}; at least {least / config.world_size:,.3g} days on these, or "
        f"{least / days:,.0f} GPUs at their peak"
    )


def _too_large(plan: dict[str, Any], config: Config) -> str | None:
    peak = plan["memory"]
    if peak["verdict"] != "does not fit":
        return None
    advised = [choice for choice in plan["advice"] if choice["native"]]
    change = f"fits: {' '.join(advised[0]['overrides'])}" if advised else _larger_world(config)
    return f"micro_batch={config.micro_batch}: needs {peak['shortage']}; {change}; or plan.force=true"


def _larger_world(config: Config) -> str:
    """On how many times the ranks the most frugal way without offload would fit."""
    shape, base = shape_of(config.model), setup_of(config)
    least = replace(setup_of(config, "fsdp"), micro_batch=1, checkpointing="full", offload="none")
    for power in range(1, 11):
        setup = replace(least, world_size=2**power * config.world_size)
        if memory(shape, setup, config.hardware).verdict == "does not fit":
            continue
        words = overrides(setup, base)
        if config.global_batch % setup.data_parallel:
            words.append(
                f"global_batch={math.ceil(config.global_batch / setup.data_parallel) * setup.data_parallel}"
            )
        return f"fits on {setup.world_size} with {' '.join(words)}"
    return "more machines do not help, take a smaller model or shorter rows"


def _calibration(config: Config) -> Calibration | None:
    return calibrated(config.hardware.name, config.precision.compute, config.gpus_per_node)


def _tokens_per_gpu_hour(step: StepTime, setup: Setup, config: Config, failures: Reliability) -> float | None:
    """Of wall time: what start-up, evaluation, saving and failures take is taken off."""
    if step.tokens_per_second is None:
        return None
    share = config.plan.productive_share * failures.expected_goodput
    return step.tokens_per_second * SECONDS_PER_HOUR * share / setup.world_size


def _model(shape: Shape) -> dict[str, Any]:
    sizes = asdict(shape)
    unsaid = ("parameters_head", "ffn_active", "fused_qkv", "fused_gate")
    return {key: value for key, value in sizes.items() if key not in unsaid}


def _compute(shape: Shape, setup: Setup, per_token: float, flops: float) -> dict[str, Any]:
    """FLOPs by the convention that MFU is quoted in, and by the others that papers use."""
    per_row = hoffmann_flops(shape)
    return {
        "flops": flops,
        "flops_per_token": per_token,
        "recomputed_flops_per_token": recomputed_flops_per_token(shape, setup.checkpointing),
        "flops_per_token_6n": 6 * shape.parameters_active,
        "flops_per_token_hoffmann": per_row.blocks / shape.sequence_length,
        "flops_per_token_hoffmann_with_tables": per_row.all / shape.sequence_length,
        "petaflop_s_days": petaflop_s_days(flops),
    }


def _peak(peak: Memory) -> dict[str, Any]:
    return asdict(peak) | {"verdict": peak.verdict, "shortage": peak.shortage}


def _rules(parameters: int, ranks: int) -> dict[str, float]:
    """States by the rules of lectures, GB (10^9 bytes): what people expect to see, not what is planned."""
    stages: dict[str, Literal[0, 1, 2, 3]] = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}
    split = {name: zero_bytes(parameters, ranks, stage) / 1e9 for name, stage in stages.items()}
    fp32 = {"fp32_24_bytes": training_bytes(parameters) / 1e9}
    return fp32 | {"slide_rule_80_bytes": slide_rule_bytes(parameters) / 1e9} | split


def _world(config: Config) -> dict[str, Any]:
    return {
        "nodes": config.nodes,
        "gpus_per_node": config.gpus_per_node,
        "world_size": config.world_size,
        "data_parallel": config.data_parallel,
        "global_batch": config.global_batch,
        "micro_batch": config.micro_batch,
        "accumulation": config.accumulation,
        "activation_checkpointing": config.activation_checkpointing,
        "hardware": config.hardware.name,
        "precision": config.precision.compute,
        "sharding": config.sharding.strategy,
    }


def _with_setup(config: Config, setup: Setup) -> Config:
    sharding = config.sharding.model_copy(
        update={
            "strategy": setup.strategy,
            "offload": setup.offload,
            "shard_degree": setup.shards if setup.strategy == "hsdp" else None,
            "reshard_after_forward": setup.reshard_after_forward,
        }
    )
    return config.model_copy(
        update={
            "sharding": sharding,
            "micro_batch": setup.micro_batch,
            "activation_checkpointing": setup.checkpointing,
        }
    )


def _words(setup: Setup) -> str:
    return f"{setup.strategy}, micro_batch={setup.micro_batch}, {setup.checkpointing} checkpointing"


def _plain(value: Any) -> Any:
    """The same with lists for tuples, as JSON would give it back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
