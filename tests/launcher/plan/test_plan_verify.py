"""plan --verify: the closed form of memory against a trace of the real module."""

from __future__ import annotations

import pytest

from configs.compose import compose
from configs.schema import ConfigError
from launcher.plan.verify import verify

SMALL = ("model=llama-60m", "model.layers=4", "gpus_per_node=8", "micro_batch=2", "global_batch=16")


@pytest.mark.parametrize(
    "setup",
    [
        ("sharding=ddp", "precision=fp32"),
        ("sharding=fsdp", "activation_checkpointing=full"),
        ("sharding=fsdp_grad_op", "activation_checkpointing=selective"),
    ],
    ids=" ".join,
)
def test_closed_form_and_trace_agree_within_three_percent(setup: tuple[str, ...]) -> None:
    answer = verify(compose([*SMALL, *setup]))
    assert answer["ratio"] == pytest.approx(1, abs=0.03)
    assert answer["ratio"] == answer["closed_form_gib"] / answer["traced_gib"]


def test_parts_add_up_to_the_peaks() -> None:
    answer = verify(compose([*SMALL, "sharding=fsdp"]))
    assert sum(answer["closed_form_by_component_gib"].values()) == pytest.approx(answer["closed_form_gib"])
    assert sum(answer["traced_by_category_gib"].values()) == pytest.approx(answer["traced_gib"])


def test_the_hardware_of_the_plan_does_not_change_the_comparison() -> None:
    on_cpu = verify(compose([*SMALL, "sharding=fsdp", "hardware=cpu"]))
    on_gpu = verify(compose([*SMALL, "sharding=fsdp", "hardware=h100-sxm-80gb"]))
    assert on_cpu["closed_form_gib"] == on_gpu["closed_form_gib"]
    assert on_cpu["traced_gib"] == on_gpu["traced_gib"]


def test_what_cannot_be_traced_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError) as refused:
        verify(compose([*SMALL, "sharding=zero3"]))
    assert str(refused.value).startswith("sharding.strategy=zero3: cannot be traced, choose ddp")
