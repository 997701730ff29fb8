"""Peak memory of a rank: the closed forms, how the setup moves them, and when a run fits."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Hardware
from launcher.plan.activations import block_activation_bytes
from launcher.plan.hardware import hardware_named
from launcher.plan.memory import GIB, Memory, memory, memory_by_strategy
from launcher.plan.part import parts_of
from launcher.plan.published import published
from launcher.plan.setup import STRATEGIES, Setup, Strategy
from launcher.plan.shape import Shape, llama_like

LLAMA_7B = published("Llama-2-7B").shape(2048)
LLAMA_3_8B = published("Llama-3-8B").shape(8192)
N, TABLE, TOKENS = LLAMA_7B.parameters, 32000 * 4096, 2048
BLOCK = (N - 2 * TABLE) // 32
A_NONE = 2 * TOKENS * (8 * 4096 + 4 * 4096 + 4 * 11008) + 4 * TOKENS * 32
H100 = hardware_named("H100-80GB")
CPU = Hardware(name="cpu")
ON_8 = Setup(strategy="fsdp", world_size=8, gpus_per_node=8, micro_batch=1)
ON_64 = replace(ON_8, world_size=64)
DDP = replace(ON_8, strategy="ddp")


def peak(setup: Setup, shape: Shape = LLAMA_7B, hardware: Hardware = H100, **changes: Any) -> Memory:
    return memory(shape, replace(setup, **changes), hardware)


def total_bytes(planned: Memory) -> float:
    return planned.active_gib * GIB


@pytest.mark.parametrize("hardware", [H100, CPU], ids=["gpu", "cpu"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_components_add_up_to_the_active_peak(strategy: Strategy, hardware: Hardware) -> None:
    planned = peak(ON_8, hardware=hardware, strategy=strategy)
    assert sum(planned.components_gib.values()) == pytest.approx(planned.active_gib)


def test_a_small_micro_batch_peaks_in_the_first_backward() -> None:
    """12N/d of states, two gathered blocks with one's gradients, and the gathered embeddings and head."""
    planned = peak(ON_64)
    assert planned.regime == "first backward"
    assert total_bytes(planned) == pytest.approx(12 * N / 64 + 32 * A_NONE + 10 * BLOCK + 4 * TABLE, rel=1e-4)


def test_a_large_vocabulary_moves_the_peak_to_the_loss() -> None:
    planned = peak(ON_64, LLAMA_3_8B, checkpointing="full")
    assert planned.regime == "loss"
    assert planned.components_gib["logits"] * GIB == 12 * 8192 * 128256
    assert planned.components_gib["working"] * GIB == 4 * 128256 * 4096
    assert planned.components_gib["gradients"] == 0


def test_few_tokens_of_a_large_vocabulary_peak_at_the_root() -> None:
    planned = peak(ON_64, published("Llama-3-8B").shape(128), checkpointing="full")
    assert planned.regime == "root"
    assert planned.components_gib["communication"] * GIB == 6 * 2 * 128256 * 4096


def test_temporary_copies_move_the_peak_to_the_optimizer() -> None:
    planned = peak(ON_8, checkpointing="full", foreach=True)
    assert planned.regime == "optimizer"
    assert total_bytes(planned) == pytest.approx(20 * N / 8, rel=1e-6)


def test_ddp_takes_sixteen_bytes_per_parameter_and_two_of_casts_at_the_end_of_forward() -> None:
    planned = peak(DDP)
    states = sum(planned.components_gib[name] for name in ("weights", "gradients", "optimizer"))
    assert states * GIB == pytest.approx(16 * N)
    assert planned.components_gib["working"] * GIB == pytest.approx(2 * N)


def test_checkpointed_blocks_let_go_of_their_casts_after_forward() -> None:
    assert peak(DDP, checkpointing="full").regime == "forward"
    loss = peak(DDP, LLAMA_3_8B, checkpointing="full", micro_batch=4)
    assert loss.regime == "loss"
    assert loss.components_gib["working"] < 0.2 * 2 * LLAMA_3_8B.parameters / GIB


def test_accumulated_gradients_lie_beside_the_buckets_of_ddp() -> None:
    added = total_bytes(peak(DDP, accumulation=2)) - total_bytes(peak(DDP))
    assert added == pytest.approx(4 * N)


def test_accumulation_keeps_sharded_gradients_over_the_whole_step() -> None:
    added = total_bytes(peak(ON_64, accumulation=2)) - total_bytes(peak(ON_64))
    assert added == pytest.approx(4 * N / 64)


def test_deepspeed_keeps_model_and_gradients_in_half_precision_and_a_flat_fp32_partition() -> None:
    def states(strategy: Strategy) -> dict[str, float]:
        parts = peak(ON_8, strategy=strategy, foreach=True, checkpointing="full").components_gib
        return {name: parts[name] * GIB / N for name in ("weights", "gradients", "optimizer")}

    assert states("zero1") == pytest.approx({"weights": 2, "gradients": 2 + 4, "optimizer": 12 / 8})
    assert states("zero2") == pytest.approx({"weights": 2, "gradients": 2 / 8, "optimizer": 12 / 8})
    assert states("zero3") == pytest.approx({"weights": 2 / 8, "gradients": 2 / 8, "optimizer": 12 / 8})


def test_zero3_gathers_what_it_may_keep_alive_and_what_it_prefetches() -> None:
    few = peak(ON_8, strategy="zero3", live_parameters=2e8, prefetch_parameters=1e8)
    many = peak(ON_8, strategy="zero3", live_parameters=2e9, prefetch_parameters=5e8)
    assert total_bytes(many) - total_bytes(few) == pytest.approx(2 * 2.2e9)


def test_keeping_gathered_weights_after_forward_costs_memory_and_is_what_grad_op_does() -> None:
    kept = peak(ON_64, reshard_after_forward=False)
    assert total_bytes(kept) > total_bytes(peak(ON_64)) + 1.8 * N
    assert peak(ON_64, strategy="fsdp_grad_op") == kept


def test_hybrid_sharding_splits_states_within_its_group_only() -> None:
    assert peak(ON_64, strategy="hsdp").active_gib == peak(ON_8).active_gib
    assert peak(ON_64, strategy="hsdp", shard_degree=64).active_gib == peak(ON_64).active_gib


def test_experts_are_split_as_evenly_as_other_weights() -> None:
    mixtral = published("Mixtral-8x7B").shape(2048)
    for ranks in (8, 16, 64):
        weights_gib = peak(replace(ON_8, world_size=ranks), mixtral).components_gib["weights"]
        assert weights_gib == pytest.approx(4 * mixtral.parameters / ranks / GIB)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpointing_more_keeps_less(strategy: Strategy) -> None:
    none, selective, full = (
        peak(ON_8, strategy=strategy, micro_batch=8, checkpointing=kind).active_gib
        for kind in ("none", "selective", "full")
    )
    assert none > selective > full


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fp32_activations_are_larger(strategy: Strategy) -> None:
    bf16, fp32 = (
        peak(ON_8, strategy=strategy, micro_batch=8, compute=kind).components_gib for kind in ("bf16", "fp32")
    )
    assert fp32["activations"] > 1.3 * bf16["activations"]


def test_half_precision_is_half_precision_whether_bf16_fp16_or_fp8() -> None:
    assert peak(ON_8, compute="fp16") == peak(ON_8, compute="fp8") == peak(ON_8)


def test_one_byte_moments_and_bf16_weights_shrink_the_states() -> None:
    for setup, bytes_each in (
        (DDP, 16),
        (replace(DDP, optimizer="adamw_8bit"), 10),
        (replace(DDP, weights="bf16"), 8),
    ):
        parts = peak(setup, checkpointing="full").components_gib
        states = sum(parts[name] for name in ("weights", "gradients", "optimizer"))
        assert states * GIB == pytest.approx(bytes_each * N)


def test_chunked_logits_nearly_vanish() -> None:
    fp32, bf16, chunked = (
        peak(ON_64, LLAMA_3_8B, logits=kind, checkpointing="full").active_gib
        for kind in ("fp32", "bf16", "chunked")
    )
    assert fp32 > bf16 > chunked


def test_adapters_need_states_for_themselves_only() -> None:
    parts = peak(DDP, lora_rank=16).components_gib
    adapters = 4 * 32 * 4096 * 16
    assert parts["weights"] * GIB == pytest.approx(4 * (N + adapters))
    assert parts["gradients"] * GIB == pytest.approx(4 * adapters)
    assert parts["optimizer"] * GIB == pytest.approx(8 * adapters)


def test_frozen_blocks_have_no_gradients_and_keep_less() -> None:
    frozen, trained = peak(DDP, frozen_blocks=16).components_gib, peak(DDP).components_gib
    assert frozen["optimizer"] * GIB == pytest.approx(8 * (N - 16 * BLOCK), rel=1e-4)
    assert frozen["activations"] < trained["activations"]


def test_a_pipeline_keeps_a_micro_batch_for_every_stage_on_its_first_and_the_loss_on_its_last() -> None:
    first, last = parts_of(LLAMA_7B, replace(ON_64, pipeline_parallel=8, accumulation=16))
    assert first.kept == pytest.approx(8 * last.kept)
    assert (first.logits, last.logits) == (0, 12 * TOKENS * 32000)
    assert first.parameters == pytest.approx((N - 2 * TABLE) / 8 + TABLE)


def test_an_encoder_decoder_keeps_both_stacks_and_the_attention_between_them() -> None:
    both = published("T5-Large").shape(512)
    encoder, decoder = (block_activation_bytes(both, ON_8, decoder=kind) for kind in (False, True))
    assert decoder - encoder == 512 * (2 * (1024 + 4 * 1024) + 8 * 1024)
    assert parts_of(both, ON_8)[0].kept == 24 * (encoder + decoder)


def test_offloaded_optimizer_states_leave_the_device_for_the_host() -> None:
    on_device, offloaded = peak(ON_8, strategy="zero1"), peak(ON_8, strategy="zero1", offload="optimizer")
    assert on_device.components_gib["optimizer"] == pytest.approx(12 * N / 8 / GIB)
    assert offloaded.components_gib["optimizer"] == 0
    assert offloaded.host_gib - on_device.host_gib == pytest.approx(12 * N / GIB)


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_offloading_all_leaves_no_states_on_the_device(strategy: Strategy) -> None:
    planned = peak(ON_8, strategy=strategy, offload="all")
    assert not any(planned.components_gib[name] for name in ("weights", "gradients", "optimizer"))
    assert planned.host_gib > 16 * N / GIB


def test_offloading_more_than_the_host_has_does_not_fit() -> None:
    small_host = H100.model_copy(update={"host_memory_gib": 60.0})
    assert peak(ON_8, hardware=small_host).verdict == "fits"
    assert peak(ON_8, hardware=small_host, offload="all").verdict == "does not fit"


def test_a_save_in_the_background_takes_a_copy_of_what_a_rank_saves_in_host_memory() -> None:
    more = peak(ON_64, asynchronous=True).host_gib - peak(ON_64).host_gib
    assert more == pytest.approx(8 * 12 * N / 64 / GIB)


def test_a_gpu_needs_more_than_its_active_bytes() -> None:
    planned = peak(ON_64)
    assert planned.reserved_gib == pytest.approx(1.2 * planned.active_gib)
    assert planned.device_gib == pytest.approx(planned.reserved_gib + 2)
    assert planned.limit_gib == 79.1


def test_compiled_blocks_fragment_less_and_a_single_gpu_needs_no_network() -> None:
    compiled, alone = peak(ON_64, compile=True), peak(ON_64, world_size=1)
    assert compiled.reserved_gib == pytest.approx(1.12 * compiled.active_gib)
    assert alone.device_gib == pytest.approx(alone.reserved_gib + 0.7)


def test_a_measured_ratio_replaces_the_published_one_and_narrows_the_interval() -> None:
    assumed = peak(ON_64)
    measured = memory(LLAMA_7B, ON_64, H100, reserved_over_active=1.1)
    assert measured.reserved_gib == pytest.approx(1.1 * measured.active_gib)
    assert measured.device_interval_gib[1] < assumed.device_interval_gib[1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_number_lies_in_its_interval(strategy: Strategy) -> None:
    planned = peak(ON_8, strategy=strategy)
    for middle, (low, high) in (
        (planned.active_gib, planned.active_interval_gib),
        (planned.reserved_gib, planned.reserved_interval_gib),
        (planned.device_gib, planned.device_interval_gib),
    ):
        assert low < middle < high


def test_the_verdict_is_certain_outside_the_interval_and_tight_within() -> None:
    low, high = peak(ON_64).device_interval_gib
    cases = (
        (high * 1.01, "fits"),
        (high * 0.99, "tight"),
        (low * 1.01, "tight"),
        (low * 0.99, "does not fit"),
    )
    for limit, verdict in cases:
        assert peak(ON_64, hardware=H100.model_copy(update={"memory_gib": limit})).verdict == verdict


def test_a_7b_model_does_not_fit_replicated_on_80_gb_and_fits_sharded_over_64() -> None:
    assert peak(DDP).verdict == "does not fit"
    assert peak(ON_64).verdict == "fits"


def test_a_worker_on_cpu_has_its_share_of_this_machine_and_carries_the_runtime() -> None:
    alone = peak(ON_8, hardware=CPU, gpus_per_node=1)
    shared = peak(ON_8, hardware=CPU, gpus_per_node=4)
    assert alone.limit_gib == pytest.approx(4 * shared.limit_gib)
    assert alone.components_gib["runtime"] == 0.42
    assert alone.device_gib == alone.reserved_gib == pytest.approx(1.15 * alone.active_gib)


def test_all_strategies_are_compared_on_the_same_setup() -> None:
    compared = memory_by_strategy(LLAMA_7B, ON_8, H100)
    assert tuple(compared) == STRATEGIES
    assert compared["zero2"] == peak(ON_8, strategy="zero2")


SHAPES = st.builds(
    lambda layers, heads, ffn, vocabulary: llama_like(
        layers=layers, hidden=64 * heads, heads=heads, ffn=ffn, vocabulary=vocabulary, sequence_length=512
    ),
    st.integers(2, 40),
    st.integers(1, 64),
    st.integers(64, 20_000),
    st.integers(1000, 200_000),
)
SETUPS = st.builds(
    Setup,
    strategy=st.sampled_from(STRATEGIES),
    world_size=st.sampled_from([8, 16, 64]),
    gpus_per_node=st.just(8),
    micro_batch=st.integers(1, 8),
    accumulation=st.integers(1, 4),
    checkpointing=st.sampled_from(["none", "selective", "full"]),
    compute=st.sampled_from(["fp32", "bf16"]),
    foreach=st.booleans(),
)


@given(shape=SHAPES, setup=SETUPS)
@settings(max_examples=60)
def test_memory_does_not_grow_with_ranks_but_does_with_the_micro_batch(shape: Shape, setup: Setup) -> None:
    planned = peak(setup, shape)
    assert peak(setup, shape, world_size=2 * setup.world_size).active_gib <= planned.active_gib * (1 + 1e-12)
    assert peak(setup, shape, micro_batch=setup.micro_batch + 1).active_gib >= planned.active_gib


@given(shape=SHAPES, setup=SETUPS)
@settings(max_examples=60)
def test_states_do_not_grow_with_the_stage(shape: Shape, setup: Setup) -> None:
    def states(strategy: Strategy) -> float:
        mixed = replace(setup, strategy=strategy, compute="bf16", accumulation=2)
        parts = peak(mixed, shape).components_gib
        return sum(parts[name] for name in ("weights", "gradients", "optimizer"))

    stages = [states(strategy) for strategy in ("ddp", "zero1", "zero2", "zero3")]
    assert all(before >= after for before, after in pairwise(stages))


@given(shape=SHAPES, stage=st.sampled_from(["zero2", "zero3"]))
@settings(max_examples=30)
def test_on_one_rank_higher_stages_have_the_states_of_ddp(shape: Shape, stage: Strategy) -> None:
    def states(strategy: Strategy) -> float:
        alone = peak(ON_8, shape, strategy=strategy, world_size=1, accumulation=2).components_gib
        return sum(alone[name] for name in ("weights", "gradients", "optimizer"))

    assert states(stage) == pytest.approx(states("ddp"))
