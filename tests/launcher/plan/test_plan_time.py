"""Step time is a roofline that published steps agree with, and that says what bounds it."""

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.plan import communication
from launcher.plan.hardware import catalogue, hardware_named
from launcher.plan.published import published
from launcher.plan.recompute import block_forward, recompute_overhead
from launcher.plan.setup import Setup, Strategy
from launcher.plan.shape import Shape, gpt_like
from launcher.plan.time import StepTime, run_time, step_time

FACTS = yaml.safe_load((Path(__file__).parent / "truth.yaml").read_text())
A100, H100, CPU = hardware_named("A100-80GB"), hardware_named("H100-80GB"), hardware_named("cpu")
LLAMA_7B = published("LLaMA-7B").shape()
ON_64 = Setup("fsdp", 64, 8, 4)


def seconds(setup: Setup = ON_64, shape: Shape = LLAMA_7B, hardware: Any = A100) -> float:
    taken = step_time(shape, setup, hardware).step_seconds
    assert taken is not None
    return taken


def parts(step: StepTime) -> dict[str, float]:
    assert step.parts_seconds is not None
    return step.parts_seconds


def foundry() -> list[tuple[StepTime, float]]:
    """Prediction and published seconds of each llm-foundry benchmark."""
    table, found = FACTS["mfu_llm_foundry"], []
    for values in table["rows"]:
        row = dict(zip(table["columns"], values, strict=True))
        sizes = table["shapes"][row["model"]]
        shape = gpt_like(
            layers=sizes["layers"],
            hidden=sizes["hidden"],
            heads=sizes["heads"],
            ffn=sizes["ffn"],
            vocabulary=sizes["vocab"],
            sequence_length=row["seq"],
        )
        setup = Setup(
            "fsdp_grad_op" if row["sharding"] == "SHARD_GRAD_OP" else "fsdp",
            row["gpus"],
            8,
            row["micro_batch"],
            row["grad_accum"],
            checkpointing="full" if row["act_ckpt"] else "none",
            compute="fp8" if "fp8" in row["precision"] else "bf16",
            reduce="bf16" if row["mp_mode"] == "PURE" else "fp32",
        )
        published_seconds = row["global_batch"] * row["seq"] / (row["tok_s_gpu"] * row["gpus"])
        found.append((step_time(shape, setup, hardware_named(row["gpu"])), published_seconds))
    return found


def test_published_steps_of_llm_foundry_are_predicted() -> None:
    errors = [abs((step.step_seconds or 0) / taken - 1) for step, taken in foundry()]
    assert len(errors) == 130
    assert statistics.median(errors) < 0.05
    assert max(errors) < 0.2


def test_the_interval_holds_nineteen_of_twenty_published_steps() -> None:
    held = [
        (step.step_seconds_low or 0) <= taken <= (step.step_seconds_high or 0) for step, taken in foundry()
    ]
    assert sum(held) >= 0.95 * len(held)


@pytest.mark.parametrize(
    "row", [row for row in FACTS["rows"] if row["id"].startswith("torchtitan.")], ids=lambda row: row["id"]
)
def test_published_steps_of_torchtitan_are_predicted(row: dict[str, Any]) -> None:
    given = row["inputs"]
    shape = published(given.get("model", "Llama-3.1-405B")).shape(given["seq"])
    setup = Setup(
        "fsdp",
        given["gpus"],
        8,
        given["local_batch"],
        tensor_parallel=given.get("tp", 1),
        checkpointing={"none": "none", "full": "full"}.get(given["ac"], "selective"),
    )
    step = step_time(shape, setup, H100 if "H100" in row["id"] else A100)
    assert (step.tokens_per_second or 0) / given["gpus"] == pytest.approx(given["tok_s_gpu"], rel=0.15)


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "gpus", "micro_batch", "tflops"),
    [
        (96, 12288, 96, 384, 4, 144),
        (96, 12288, 96, 1536, 1, 44),
        (105, 20480, 128, 640, 4, 138),
        (105, 20480, 128, 2240, 1, 48),
    ],
)
def test_zero3_collapses_where_it_was_seen_to(
    layers: int, hidden: int, heads: int, gpus: int, micro_batch: int, tflops: float
) -> None:
    """Narayanan et al. 2021, table 2: 175B and 530B at a fixed global batch on more and more nodes."""
    shape = gpt_like(layers=layers, hidden=hidden, heads=heads, vocabulary=51200, sequence_length=2048)
    setup = Setup("zero3", gpus, 8, micro_batch, checkpointing="full", reduce="bf16")
    step = step_time(shape, setup, A100)
    assert 312 * (step.hfu or 0) == pytest.approx(tflops, rel=0.35)
    assert step.bound_by == ("network" if micro_batch == 1 else "compute")


@pytest.mark.parametrize(
    ("card", "gpus", "low", "high"),
    [
        ("A100-64GB", 8, 0.95, 1.1),
        ("A100-64GB", 64, 0.95, 1.1),
        ("A100-64GB", 256, 1.3, 2.2),
        ("H100-64GB", 64, 0.95, 1.1),
    ],
)
def test_hybrid_sharding_wins_only_on_many_nodes(card: str, gpus: int, low: float, high: float) -> None:
    """The Modalities benchmarks: 2.7B on nodes of four."""
    shape = gpt_like(layers=32, hidden=2560, heads=32, vocabulary=50304, sequence_length=4096)
    setup, hardware = Setup("fsdp", gpus, 4, 2), hardware_named(card)
    ratio = seconds(setup, shape, hardware) / seconds(replace(setup, strategy="hsdp"), shape, hardware)
    assert low < ratio < high


def test_full_sharding_over_256_gpus_takes_twice_the_time() -> None:
    """Measured: MFU 0.486 hybrid, 0.297 full."""
    shape = gpt_like(layers=32, hidden=2560, heads=32, vocabulary=50304, sequence_length=4096)
    setup, card = Setup("fsdp", 256, 4, 2), hardware_named("A100-64GB")
    ratio = seconds(setup, shape, card) / seconds(replace(setup, strategy="hsdp"), shape, card)
    assert ratio == pytest.approx(0.486 / 0.297, rel=0.25)


def test_the_parts_add_up_to_the_step() -> None:
    step = step_time(LLAMA_7B, ON_64, A100)
    assert sum(parts(step).values()) == pytest.approx(step.step_seconds)
    assert step.tokens_per_second == pytest.approx(64 * 4 * 2048 / seconds())
    assert (step.step_seconds_low or 0) < seconds() < (step.step_seconds_high or 0)
    assert step.mfu == step.hfu
    assert step.bound_by == "compute"


def test_recomputing_counts_in_hfu_and_time_but_not_in_mfu() -> None:
    plain = step_time(LLAMA_7B, ON_64, A100)
    again = step_time(LLAMA_7B, replace(ON_64, checkpointing="full"), A100)
    assert 1.25 < (again.step_seconds or 0) / (plain.step_seconds or 1) < 4 / 3
    assert (again.mfu or 0) < (plain.mfu or 0)
    assert (again.hfu or 0) / (again.mfu or 1) == pytest.approx(4 / 3, rel=0.02)


def test_an_a100_reaches_more_of_its_peak_than_an_h100() -> None:
    on_a100, on_h100 = step_time(LLAMA_7B, ON_64, A100), step_time(LLAMA_7B, ON_64, H100)
    assert 0.55 < (on_a100.mfu or 0) < 0.65
    assert 0.40 < (on_h100.mfu or 0) < 0.50


def test_narrow_models_reach_less_of_the_peak() -> None:
    pythias = [published(f"Pythia-{size}").shape() for size in ("70M", "410M", "1.4B", "6.9B")]
    reached = [step_time(shape, Setup("ddp", 8, 8, 8), A100).mfu or 0 for shape in pythias]
    assert reached == sorted(reached)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp_grad_op", "hsdp"])
def test_more_nodes_never_make_a_step_of_the_same_micro_batch_faster(strategy: Strategy) -> None:
    times = [seconds(replace(ON_64, strategy=strategy, world_size=size)) for size in (16, 64, 256, 1024)]
    assert times == sorted(times)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp_grad_op", "hsdp"])
def test_a_single_gpu_sends_nothing(strategy: Strategy) -> None:
    alone = step_time(LLAMA_7B, Setup(strategy, 1, 1, 1), A100)
    assert alone.communication_seconds == 0


def test_accumulation_spares_ddp_communication_but_not_full_sharding() -> None:
    def sent(strategy: Strategy, accumulation: int) -> float:
        setup = replace(ON_64, strategy=strategy, accumulation=accumulation)
        return step_time(LLAMA_7B, setup, A100).communication_seconds or 0

    assert sent("ddp", 8) == sent("ddp", 1)
    assert sent("fsdp", 8) == pytest.approx(8 * sent("fsdp", 1))


def test_slow_links_bound_a_step_by_the_network() -> None:
    slow = A100.model_copy(update={"inter_node_gb_s": 0.5})
    assert step_time(LLAMA_7B, ON_64, slow).bound_by == "network"


def test_offloading_takes_the_host_link() -> None:
    setup = replace(ON_64, micro_batch=1)
    parted = parts(step_time(LLAMA_7B, replace(setup, offload="all"), A100))
    assert parted["host"] > 0 == parts(step_time(LLAMA_7B, setup, A100))["host"]
    tiny = published("Pythia-70M").shape(64)
    slow = A100.model_copy(update={"host_gb_s": 0.1})
    assert step_time(tiny, Setup("fsdp", 1, 1, 1, offload="all"), slow).bound_by == "host"


def test_a_slow_data_loader_bounds_the_step_and_a_fast_one_hides() -> None:
    assert step_time(LLAMA_7B, ON_64, A100, data_seconds=0.1).step_seconds == seconds()
    starved = step_time(LLAMA_7B, ON_64, A100, data_seconds=100)
    assert starved.step_seconds == pytest.approx(100)
    assert starved.bound_by == "data"


def test_compiled_blocks_move_fewer_bytes() -> None:
    assert seconds(replace(ON_64, compile=True)) < seconds()


def test_frozen_weights_take_less_time_and_no_more_of_the_peak() -> None:
    adapters = step_time(LLAMA_7B, replace(ON_64, lora_rank=16), A100)
    assert 0.65 < (adapters.step_seconds or 0) / seconds() < 0.8
    assert (adapters.mfu or 0) < 0.7


def test_pipelines_idle_while_they_fill() -> None:
    def idle(accumulation: int) -> float:
        setup = replace(ON_64, strategy="ddp", pipeline_parallel=4, accumulation=accumulation)
        return parts(step_time(LLAMA_7B, setup, A100))["compute"] / accumulation

    assert idle(1) == pytest.approx(4 * idle(10_000), rel=0.01)


def test_an_unknown_peak_gives_no_time_rather_than_a_guess() -> None:
    assert step_time(LLAMA_7B, ON_64, hardware_named("V100")) == StepTime()
    assert run_time(StepTime(), 100, 0.9).days is None


def test_cards_that_were_not_fitted_have_a_wider_interval() -> None:
    def width(name: str) -> float:
        step = step_time(LLAMA_7B, ON_64, hardware_named(name))
        return (step.step_seconds_high or 0) / (step.step_seconds or 1) - 1

    assert width("B200") > width("H100") > 0


def test_the_users_efficiency_wins_over_the_fitted_one() -> None:
    fast, slow = (A100.model_copy(update={"efficiency": share}) for share in (0.9, 0.3))
    assert seconds(hardware=fast) < seconds() < seconds(hardware=slow)


def test_on_cpu_the_machine_is_timed_and_shared_among_its_workers() -> None:
    tiny = published("Pythia-70M").shape(128)
    alone = step_time(tiny, Setup("ddp", 1, 1, 1, compute="fp32"), CPU)
    shared = step_time(tiny, Setup("ddp", 4, 4, 1, compute="fp32"), CPU)
    assert alone.mfu is None
    assert alone.tokens_per_second == pytest.approx(shared.tokens_per_second)


def test_a_calibration_wins_and_narrows_the_interval() -> None:
    step = step_time(LLAMA_7B, Setup("ddp", 1, 1, 1), A100, {"flops_per_second": 1e14})
    assert step.calibrated
    assert step.mfu == pytest.approx(1 / 3.12)
    assert (step.step_seconds_high or 0) / (step.step_seconds or 1) < 1.1


def test_a_run_is_longer_than_its_steps() -> None:
    run = run_time(step_time(LLAMA_7B, ON_64, A100), 1000, productive_share=0.9, goodput=0.95)
    assert run.seconds == pytest.approx(1000 * seconds() / 0.9 / 0.95)
    assert run.days == pytest.approx((run.seconds or 0) / 86400)


def test_volumes_are_those_of_the_papers() -> None:
    moved = communication.elements_moved
    assert [moved("ddp"), moved("zero1"), moved("zero2"), moved("zero3"), moved("fsdp_grad_op")] == [
        2,
        2,
        2,
        3,
        2,
    ]
    assert moved("fsdp", accumulation=4) == 12
    assert communication.zero_plus_plus_elements("qwZ", "hpZ", "qgZ") == 0.75
    assert communication.hybrid_cross_host(1.0, 8, 512) == pytest.approx(0.24951, abs=1e-5)


@pytest.mark.parametrize(
    ("recompute", "sequence_parallel", "added"),
    [("selective", False, 0.07), ("full", False, 0.39), ("selective", True, 0.04)],
)
def test_recomputing_a_block_costs_what_was_measured(
    recompute: Any, sequence_parallel: bool, added: float
) -> None:
    """Korthikanti et al. 2022, table 4: a block of 22B, four rows, eight tensor-parallel ranks, 19.6 ms."""
    forward = block_forward(published("Korthikanti-22B").shape(2048), 4, 8, A100)
    predicted = recompute_overhead(forward, 0.0196, recompute, 8, sequence_parallel)
    assert predicted == pytest.approx(added, abs=0.005)


def test_a_search_over_thousands_of_setups_takes_a_moment() -> None:
    setups = [replace(ON_64, world_size=8 * nodes) for nodes in range(1, 1001)]
    start = time.perf_counter()
    for setup in setups:
        step_time(LLAMA_7B, setup, A100)
    assert time.perf_counter() - start < 0.5


def test_every_accelerator_has_a_plausible_pace() -> None:
    for name, hardware in catalogue().items():
        if hardware.peak_tflops.bf16 is not None:
            step = step_time(LLAMA_7B, Setup("fsdp", 8, 8, 4), hardware)
            assert 0.1 < (step.mfu or 0) < 0.7, name
