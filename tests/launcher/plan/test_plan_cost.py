"""What a run costs, and what failures add: hours, dollars, energy, checkpoints, goodput."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as some

from configs.compose import compose
from configs.schema import PlanOptions
from launcher.plan.cost import cost, gpu_hours, usd_per_million_parameters
from launcher.plan.hardware import hardware_named
from launcher.plan.reliability import (
    daly_seconds,
    goodput,
    lost_work_seconds,
    mtbf_of_interruptions,
    mtbf_of_rate,
    reliability,
    young_seconds,
)
from launcher.plan.scaling import training_flops
from launcher.plan.time import days_of_flops, days_of_gpu_hours, days_of_tokens

H100 = hardware_named("H100-80GB")
HOUR, DAY = 3600, 86400
sizes = some.floats(1e6, 1e13)


def test_a_run_is_priced_in_hours_dollars_energy_and_emissions() -> None:
    options = PlanOptions(overhead_power=1.1, kg_co2_per_kwh=0.385)
    hardware = H100.model_copy(update={"watts": 400, "usd_per_hour": 2.0})
    price = cost(HOUR, 1000, hardware, options, checkpoint_bytes=2**30, kept_checkpoints=3)
    assert price.gpu_hours == 1000
    assert price.usd == 2000
    assert price.kwh == pytest.approx(440)
    assert price.kg_co2 == pytest.approx(169.4)
    assert price.checkpoint_storage_gib == 4


def test_llama_65b_took_449_megawatt_hours_and_173_tonnes() -> None:
    """Touvron et al. 2023, table 15: 1 022 362 hours of 400 W with a PUE of 1.1."""
    options = PlanOptions(overhead_power=1.1, kg_co2_per_kwh=0.385)
    hardware = hardware_named("A100-80GB").model_copy(update={"watts": 400})
    price = cost(1_022_362 * HOUR, 1, hardware, options, 0, 1)
    assert price.kwh == pytest.approx(449_000, rel=0.005)
    assert price.kg_co2 == pytest.approx(173_000, rel=0.005)


def test_what_is_unknown_is_none_rather_than_zero() -> None:
    on_cpu = compose(["hardware=cpu"]).hardware
    price = cost(HOUR, 4, on_cpu, PlanOptions(), 0, 1)
    assert (price.gpu_hours, price.usd, price.kwh, price.kg_co2) == (4, None, None, None)
    assert cost(None, 4, H100, PlanOptions(), 2**30, 1).gpu_hours is None


@given(sizes, sizes, some.floats(0.05, 0.9))
def test_cost_grows_with_compute(parameters: float, tokens: float, mfu: float) -> None:
    less, more = training_flops(parameters, tokens), training_flops(parameters, 1.1 * tokens)
    assert gpu_hours(less, 1e15, mfu) < gpu_hours(more, 1e15, mfu)


@given(some.floats(1e18, 1e26), some.integers(1, 20_000), some.floats(0.05, 0.9))
def test_hours_do_not_depend_on_the_number_of_gpus_but_days_do(flops: float, gpus: int, mfu: float) -> None:
    rate = 1e15 * mfu
    days = days_of_flops(flops, gpus, rate)
    assert days * 24 * gpus == pytest.approx(gpu_hours(flops, 1e15, mfu))
    assert days_of_gpu_hours(gpu_hours(flops, 1e15, mfu), gpus) == pytest.approx(days)
    assert days_of_flops(flops, 2 * gpus, rate) == pytest.approx(days / 2)


def test_published_runs_took_as_many_days_as_their_rates_say() -> None:
    assert days_of_tokens(1.4e12, 380 * 2048) == pytest.approx(20.8, abs=0.05)
    recomputed = training_flops(175e9, 300e9) * 4 / 3
    assert days_of_flops(recomputed, 1024, 140e12) == pytest.approx(33.9, abs=0.05)


def test_dollars_per_million_parameters() -> None:
    assert usd_per_million_parameters(2500, 1.3e9) == pytest.approx(1.923, abs=0.001)


def test_more_nodes_fail_more_often() -> None:
    """Kokolis et al. 2024: 16 384 GPUs fail every 1.8 hours; Llama 3 saw 419 interruptions in 54 days."""
    assert mtbf_of_rate(2048, 6.5) / HOUR == pytest.approx(1.80, abs=0.005)
    assert mtbf_of_rate(1, 6.5) == pytest.approx(2048 * mtbf_of_rate(2048, 6.5))
    assert mtbf_of_interruptions(419, 54) / HOUR == pytest.approx(3.09, abs=0.005)


def test_the_interval_between_checkpoints_is_youngs_refined_by_daly() -> None:
    assert young_seconds(60, 11135) == pytest.approx(1155.9, abs=0.1)
    assert daly_seconds(300, 11135) == pytest.approx(2388.6, abs=0.1)
    assert daly_seconds(3600, 1800) == 1800


@given(some.floats(1, 600), some.floats(1e4, 1e7))
def test_dalys_interval_is_youngs_when_failures_are_rare(pause: float, mtbf: float) -> None:
    assert abs(daly_seconds(pause, mtbf) / young_seconds(pause, mtbf) - 1) < 2 * math.sqrt(pause / mtbf)


@given(some.floats(1, 600), some.floats(1e4, 1e7), some.floats(0.3, 3))
def test_no_other_interval_is_much_better_than_dalys(pause: float, mtbf: float, factor: float) -> None:
    def reached(interval: float) -> float:
        return goodput(interval, pause, lost_work_seconds(interval), mtbf)

    best = daly_seconds(pause, mtbf)
    assert reached(best) >= reached(factor * best) - 0.02


def test_a_failure_loses_half_an_interval() -> None:
    assert lost_work_seconds(3 * HOUR) == 1.5 * HOUR


def test_expected_goodput_is_what_a_simulated_run_reaches() -> None:
    """Failures at random, every minute alike; the closed form is the mean to first order."""
    interval, pause, restart, mtbf = 1800.0, 30.0, 600.0, 20_000.0
    clock, wall, productive = random.Random(0), 0.0, 0.0
    while wall < 4000 * mtbf:
        lived = clock.expovariate(1 / mtbf)
        productive += interval * (lived // (interval + pause))
        wall += lived + restart
    expected = goodput(interval, pause, lost_work_seconds(interval) + restart, mtbf)
    assert productive / wall == pytest.approx(expected, abs=0.01)


def test_large_runs_lose_more_to_failures_and_save_more_often() -> None:
    small, large = (reliability(12 * 70e9, nodes, PlanOptions()) for nodes in (8, 512))
    assert large.mtbf_seconds < small.mtbf_seconds
    assert large.expected_goodput < small.expected_goodput < 1
    assert large.interval_seconds < small.interval_seconds


def test_nodes_write_a_checkpoint_together() -> None:
    assert reliability(12 * 405e9, 2048, PlanOptions(storage_gb_s=2.0)).save_seconds == pytest.approx(
        1.19, rel=0.01
    )
    assert reliability(4e9, 1, PlanOptions(storage_gb_s=2.0)).save_seconds == 2.0
