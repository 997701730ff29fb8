"""What the plan knows and the trainer does not do yet."""

from __future__ import annotations

from configs.schema import Config
from launcher.plan.advice import TRAINED


def not_trained(config: Config) -> str | None:
    """One line naming the first setting that can be planned but not trained; none when all can."""
    strategies = (*TRAINED, "auto")
    settings = (
        ("sharding.strategy", config.sharding.strategy, strategies),
        ("sharding.offload", config.sharding.offload, ("none",)),
        ("precision.compute", config.precision.compute, ("fp32", "bf16")),
        ("precision.weights", config.precision.weights, ("fp32",)),
        ("optimizer.kind", config.optimizer.kind, ("adamw",)),
        ("objective.logits", config.objective.logits, ("fp32", "bf16")),
        ("model.lora_rank", config.model.lora_rank, (None,)),
        ("model.frozen_blocks", config.model.frozen_blocks, (0,)),
        ("plan.tensor_parallel", config.plan.tensor_parallel, (1,)),
        ("plan.pipeline_parallel", config.plan.pipeline_parallel, (1,)),
        ("plan.context_parallel", config.plan.context_parallel, (1,)),
    )
    for key, value, trained in settings:
        if value not in trained:
            allowed = ", ".join("null" if choice is None else str(choice) for choice in trained)
            return f"{key}={value}: can be planned but not trained yet; trained: {allowed}"
    return None
