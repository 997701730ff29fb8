"""Does the closed form of memory hold for this model? It is compared with a trace of the real module."""

from __future__ import annotations

from typing import Any

from configs.schema import Config, Hardware
from launcher.plan.ask import ask
from launcher.plan.memory import memory
from launcher.plan.setup import setup_of
from launcher.plan.shape import shape_of


def verify(config: Config) -> dict[str, Any]:
    """Planned and traced peak of a rank's tensors in one step, GiB, and their ratio.

    Both are those of an accelerator, whatever the hardware: a trace has no Python runtime in it, and no
    whole model before it is split. Raises ConfigError, one line, when the configuration cannot be traced.
    """
    config = config.model_copy(update={"compile": False})  # compiled code hides its tensors from a trace
    planned = memory(shape_of(config.model), setup_of(config), Hardware(device_name="traced"))
    traced = ask("trainer.memory_trace", config)
    return {
        "strategy": config.sharding.strategy,
        "closed_form_gib": planned.active_gib,
        "traced_gib": traced["peak_gib"],
        "ratio": planned.active_gib / traced["peak_gib"],
        "closed_form_by_component_gib": planned.components_gib,
        "traced_by_category_gib": traced["by_category_gib"],
        "closed_form_regime": planned.regime,
        "traced_moment": traced["moment"],
        "seconds": traced["seconds"],
    }
