"""What do a plan's numbers rest on? One sentence each, only as far as it holds for this run."""

from __future__ import annotations

from configs.schema import Config
from launcher.plan.budget import TokenBudget
from launcher.plan.hardware import on_gpu
from launcher.plan.memory import RUNTIME_GIB
from launcher.plan.time import CALIBRATED_ERROR, TYPICAL_ERROR, StepTime


def assumptions(config: Config, budget: TokenBudget, step: StepTime) -> dict[str, str]:
    """Sentences by subject."""
    hardware, compute = config.hardware, config.precision.compute
    said = {
        "flops": "6 N + 12 L H Q T per token, N without looked-up embeddings, causal half not discounted.",
        "memory": "Attention keeps no score matrix; the loss is computed as objective.logits says.",
    }
    if budget.estimate:
        said["tokens"] = f"{budget.estimate}."
    if on_gpu(hardware):
        said["device_memory"] = "Of active bytes, what torch's allocator reserves, and what lies outside it."
        said["hardware"] = hardware.source
    else:
        said["runtime"] = f"Python and torch take {RUNTIME_GIB} GiB of each worker's resident memory."
        if hardware.memory_gib is None:
            said["limit"] = f"This machine's memory, shared by {config.gpus_per_node} worker(s)."
    if step.step_seconds is None:
        said["time"] = (
            f"hardware.peak_tflops.{compute} is unknown for {hardware.name}, so time is not planned."
        )
        return said
    said["run"] = (
        f"{config.plan.productive_share:.0%} of the wall time trains, less what saving and failures take."
    )
    if step.calibrated:
        said["time"] = f"Speed as calibrated on this machine, within {CALIBRATED_ERROR:.0%}."
    elif on_gpu(hardware):
        said["time"] = (
            f"Fitted to llm-foundry's A100 and H100 runs, 19 of 20 within {TYPICAL_ERROR:.0%}; other cards, "
            "networks and trainers differ more."
        )
    else:
        said["time"] = (
            "Speed from a float32 matrix product timed on this machine, in parallel on all its cores, "
            f"shared by {config.gpus_per_node} worker(s); plan --calibrate measures it."
        )
    return said
