"""The plan searches the ways to run a model and advises the best three that fit."""

from __future__ import annotations

from typing import Any

import pytest

from configs.compose import compose
from configs.schema import Config, ConfigError
from launcher.plan.advice import DEEPSPEED, best, choices
from launcher.plan.plan import make_plan, resolve
from launcher.plan.setup import setup_of
from launcher.plan.shape import shape_of

ON_8_H100 = ("hardware=h100-sxm-80gb", "gpus_per_node=8")
SEVEN_B = ("model=llama-7b", *ON_8_H100)


def plan(*overrides: str) -> dict[str, Any]:
    return make_plan(compose(list(overrides)))


def automatic(*overrides: str) -> Config:
    return resolve(compose([*overrides, "sharding=auto"]))


def test_at_most_three_strategies_are_advised_fastest_first_and_all_fit() -> None:
    advice = plan(*SEVEN_B, "sharding=fsdp")["advice"]
    assert 1 <= len(advice) <= 3
    assert len({choice["strategy"] for choice in advice}) == len(advice)
    seconds = [choice["step_seconds"] for choice in advice]
    assert seconds == sorted(seconds)
    assert all(choice["verdict"] == "fits" and choice["reason"] for choice in advice)


def test_what_is_advised_plans_as_advised_when_it_is_typed() -> None:
    for choice in plan(*SEVEN_B, "sharding=fsdp")["advice"]:
        typed = plan(*SEVEN_B, *choice["overrides"])
        assert typed["memory"]["device_gib"] == pytest.approx(choice["device_gib"])
        assert typed["time"]["step_seconds"] == pytest.approx(choice["step_seconds"])


def test_nothing_that_fits_with_room_is_clearly_faster_than_the_first_advice() -> None:
    config = compose([*SEVEN_B, "sharding=fsdp"])
    shape = shape_of(config.model)
    found = choices(shape, setup_of(config), config.global_batch, config.hardware)
    first = best(found)[0]
    safe = [choice.seconds for choice in found if choice.memory.verdict == "fits"]
    assert first.seconds <= 1.02 * min(safe)


def test_a_small_model_is_replicated_and_a_large_one_is_split() -> None:
    assert plan("model=llama-160m", *ON_8_H100)["advice"][0]["strategy"] == "ddp"
    large = automatic("model=llama-2-70b", *ON_8_H100, "nodes=16", "global_batch=1024")
    assert large.sharding.strategy in ("fsdp", "zero3", "hsdp")


def test_a_slow_network_between_many_nodes_asks_for_hybrid_sharding() -> None:
    options = ("model=llama-7b", "hardware=a100-sxm-80gb", "nodes=64", "gpus_per_node=8", "global_batch=2048")
    advised = plan(*options, "micro_batch=4", "sharding=fsdp", "hardware.inter_node_gb_s=3")["advice"]
    assert advised[0]["strategy"] == "hsdp"
    fsdp = [choice for choice in advised if choice["strategy"] == "fsdp"]
    assert not fsdp or fsdp[0]["step_seconds"] > 1.2 * advised[0]["step_seconds"]


def test_automatic_sharding_keeps_the_global_batch_and_sets_the_rest() -> None:
    chosen = automatic(*SEVEN_B, "global_batch=96")
    assert chosen.global_batch == 96
    assert chosen.micro_batch * chosen.accumulation * 8 == 96
    assert make_plan(chosen)["memory"]["verdict"] == "fits"
    assert make_plan(chosen)["prices"]["your_choice"] < 0.1


def test_automatic_sharding_takes_what_torch_alone_can_do() -> None:
    options = ("model=llama-2-70b", *ON_8_H100, "nodes=64", "global_batch=4096")
    assert automatic(*options).sharding.strategy not in DEEPSPEED


def test_automatic_sharding_offloads_only_where_nothing_else_fits() -> None:
    assert automatic("model=llama-7b", *ON_8_H100).sharding.offload == "none"
    assert automatic("model=llama-7b", "hardware=h100-sxm-80gb").sharding.offload == "all"


@pytest.mark.parametrize(
    "yours",
    [
        ["sharding=fsdp_offload"],
        ["sharding=hsdp", "sharding.shard_degree=4"],
        ["sharding=fsdp", "sharding.reshard_after_forward=false"],
    ],
    ids=" ".join,
)
def test_advice_undoes_what_was_typed_before(yours: list[str]) -> None:
    options = (*SEVEN_B, "nodes=2", "micro_batch=1", *yours)
    for choice in plan(*options)["advice"]:
        typed = plan(*options, *choice["overrides"])
        assert typed["memory"]["device_gib"] == pytest.approx(choice["device_gib"])
        assert typed["time"]["step_seconds"] == pytest.approx(choice["step_seconds"])


def test_hybrids_split_over_a_divisor_of_the_ranks() -> None:
    options = ("model=llama-7b", "hardware=a100-sxm-80gb", "nodes=5", "gpus_per_node=8", "global_batch=160")
    planned = plan(*options, "plan.tensor_parallel=2", "sharding=hsdp", "micro_batch=1")
    for choice in planned["advice"]:
        assert choice["shard_degree"] is None or 20 % choice["shard_degree"] == 0


def test_a_chosen_strategy_is_left_alone() -> None:
    config = compose([*SEVEN_B, "sharding=zero2"])
    assert resolve(config) is config


def test_when_nothing_fits_the_line_names_what_comes_closest() -> None:
    with pytest.raises(ConfigError) as caught:
        automatic("model=llama-65b", "hardware=h100-sxm-80gb", "hardware.host_memory_gib=64")
    line = str(caught.value)
    assert line.startswith("sharding=auto: nothing fits; closest is ")
    assert "micro_batch=1" in line
    assert "GiB per rank, there are 79.1; add nodes" in line


def test_a_host_that_is_too_small_is_named_as_the_reason() -> None:
    options = ("model=llama-3.1-405b", *ON_8_H100, "global_batch=64", "hardware.host_memory_gib=2000")
    with pytest.raises(ConfigError, match=r"GiB of host memory per node, there are 2000\.0"):
        automatic(*options)
    unknown = plan("model=llama-7b", "hardware=rtx4090-24gb", "sharding=zero3_offload", "micro_batch=1")
    assert unknown["memory"]["verdict"] == "tight"


def test_a_huge_batch_is_searched_as_fast_as_a_small_one() -> None:
    config = compose(["model=llama-20m", "hardware=h100-sxm-80gb", "sharding=ddp", "global_batch=134217728"])
    found = choices(shape_of(config.model), setup_of(config), config.global_batch, config.hardware)
    assert max(choice.setup.micro_batch for choice in found) == 256


def test_constraints_have_prices() -> None:
    prices = plan(*SEVEN_B, "sharding=fsdp", "micro_batch=1", "activation_checkpointing=full")["prices"]
    assert prices["your_choice"] > 0.1
    assert prices["memory_limit"] >= 0
    roomy = plan(*SEVEN_B, "sharding=fsdp", "hardware.memory_gib=1000")["prices"]
    assert roomy["memory_limit"] == pytest.approx(0, abs=0.03)


def test_without_a_known_speed_advice_goes_by_simplicity() -> None:
    advice = plan("model=llama-160m", "hardware=v100-sxm2-32gb", "precision=bf16")["advice"]
    assert advice[0]["strategy"] == "ddp"
    assert advice[0]["step_seconds"] is None
