"""What lectures and papers say about memory: bytes per parameter, ZeRO's stages, activations per layer."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.plan.states import (
    FP32_RULE,
    FP32_STATES,
    MIXED,
    Stage,
    largest_model,
    layer_activation_bytes,
    selective_overhead,
    selective_saving,
    slide_rule_bytes,
    training_bytes,
    weight_bytes,
    zero_bytes,
)

GB = 1e9
PARAMETERS = st.floats(1e6, 1e13)
RANKS = st.integers(1, 100_000)


def test_training_in_fp32_takes_24_bytes_per_parameter_by_the_lecture_rule() -> None:
    assert tuple(FP32_RULE) == (4, 4, 8, 8)
    assert training_bytes(GB) == 24 * GB
    assert (training_bytes(GB, bits=16), training_bytes(GB, bits=8)) == (12 * GB, 6 * GB)
    assert weight_bytes(GB) == 4 * GB


def test_states_take_16_bytes_per_parameter_in_fp32_as_in_mixed_precision() -> None:
    assert FP32_STATES.total == MIXED.total == 16
    assert tuple(MIXED)[:3] == (2, 2, 12)


def test_the_slide_rule_takes_bytes_for_a_factor() -> None:
    assert slide_rule_bytes(GB) == 80 * GB
    assert slide_rule_bytes(GB) / training_bytes(GB) == pytest.approx(10 / 3)


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_figure_of_the_zero_paper(stage: Stage, gigabytes: float) -> None:
    assert zero_bytes(7.5e9, ranks=64, stage=stage) / GB == pytest.approx(gigabytes, rel=0.015)


def test_the_largest_model_fills_the_memory() -> None:
    largest = largest_model(32 * GB, ranks=64, stage=2, tensor_parallel=4)
    assert zero_bytes(largest / 4, ranks=64, stage=2) == pytest.approx(32 * GB)


@given(parameters=PARAMETERS, stage=st.sampled_from([1, 2, 3]))
def test_on_one_rank_every_stage_equals_replication(parameters: float, stage: Stage) -> None:
    assert zero_bytes(parameters, 1, stage) == pytest.approx(zero_bytes(parameters, 1, 0))


@given(parameters=PARAMETERS, ranks=RANKS, more=st.integers(1, 1000))
def test_states_do_not_grow_with_ranks_nor_with_the_stage(parameters: float, ranks: int, more: int) -> None:
    few = [zero_bytes(parameters, ranks, stage) for stage in (0, 1, 2, 3)]
    many = [zero_bytes(parameters, ranks + more, stage) for stage in (0, 1, 2, 3)]
    slack = 1 + 1e-12
    assert all(fewer * slack >= stage for fewer, stage in zip(few, many, strict=True))
    assert all(before * slack >= after for before, after in pairwise(few))


GPT3: dict[str, Any] = {"sequence_length": 2048, "hidden": 12288, "heads": 96}


def test_activations_of_a_layer_follow_korthikanti() -> None:
    unit, scores = 2048 * 12288, 5 * 96 * 2048 / 12288
    layer: dict[str, Any] = {"micro_batch": 1, **GPT3}
    assert layer_activation_bytes(**layer) == pytest.approx(unit * (34 + scores))
    assert layer_activation_bytes(**layer, recompute="selective") == pytest.approx(unit * 34)
    assert layer_activation_bytes(**layer, recompute="full") == unit * 2
    split = layer | {"tensor_parallel": 8}
    assert layer_activation_bytes(**split) == pytest.approx(unit * (10 + (24 + scores) / 8))
    assert layer_activation_bytes(**split, sequence_parallel=True) == pytest.approx(unit * (34 + scores) / 8)


def test_selective_recomputation_saves_much_for_few_flops() -> None:
    assert selective_saving(**GPT3) == pytest.approx(0.70, abs=0.005)
    assert selective_overhead(2048, 12288) == pytest.approx(0.027, abs=0.0005)
