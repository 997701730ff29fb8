"""DeepSpeed's engine behind the protocol, on two ranks that try everything once and report.

Starting ranks takes longer than training a tiny model, so one pair of processes makes all findings.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from configs.compose import compose
from configs.schema import Config, ConfigError
from trainer import objective
from trainer.distributed import World
from trainer.initial import fill, initial_weights
from trainer.model import build_model
from trainer.rehearsal import pass_on_zeros
from trainer.sharding import Progress, Strategy, shard

pytest.importorskip("deepspeed")

STAGES = ("zero1", "zero2", "zero3")
RANKS, STEPS, MICRO_BATCHES, ROWS, LENGTH = 2, 5, 2, 2, 16
# Neither rows of the vocabulary nor most matrices split evenly.
VOCABULARY = 321
UNEVEN_PARTS = (
    "sharding.bucket_parameters=2000",
    "sharding.whole_parameters=100",
    "sharding.live_parameters=5000",
)

State = dict[str, Tensor]


@cache
def configured(strategy: str, *overrides: str) -> Config:
    """A Llama of two blocks, the first of which is frozen; gradients are clipped in every step."""
    return compose(
        [
            "model=llama-demo",
            "model.tokenizer=none",
            "model.layers=2",
            "model.hidden=32",
            "model.heads=2",
            "model.ffn=56",
            f"model.vocabulary={VOCABULARY}",
            f"model.sequence_length={LENGTH}",
            "model.tied_embeddings=false",
            "model.frozen_blocks=1",
            "budget=tokens",
            "budget.tokens=1000",
            "data=local",
            "data.corpora.general.train=none",
            "precision=fp32",
            "optimizer.lr=1e-2",
            "optimizer.clip_norm=0.5",
            f"global_batch={RANKS * MICRO_BATCHES * ROWS}",
            f"micro_batch={ROWS}",
            f"gpus_per_node={RANKS}",
            f"sharding={strategy}",
            *overrides,
        ]
    )


def started(config: Config, world: World, saved: tuple[State, Progress] | None = None) -> Strategy:
    """As a session starts: initial weights or saved state, then a rehearsal."""
    module = build_model(config, VOCABULARY, 0)
    strategy = shard(module, config, world)
    if saved is None:
        fill(strategy.state(), initial_weights(module, config))
        strategy.loaded(Progress())
    else:
        for name, tensor in strategy.state().items():
            tensor.fill(saved[0][name])
        strategy.loaded(saved[1])
    rehearse(strategy, config, world)
    return strategy


def rehearse(strategy: Strategy, config: Config, world: World) -> None:
    pass_on_zeros(strategy, config, world)
    strategy.discard_gradients()


def trained(strategy: Strategy, world: World, steps: range, blow_up: float = 1.0) -> list[list[float]]:
    """Loss and gradient norm of each step, on rows that are a function of the step."""
    results = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(VOCABULARY, (RANKS, MICRO_BATCHES, ROWS, LENGTH + 1), generator=generator)
        total = torch.zeros(())
        for number, micro in enumerate(rows[world.rank]):
            inputs, targets, _ = objective.causal(micro)
            with strategy.gradients(complete=number == MICRO_BATCHES - 1):
                loss = objective.loss_sum(strategy.logits(inputs), targets, upcast=True)
                strategy.backward(loss * (blow_up * RANKS / rows[..., 1:].numel()))
            total += loss.detach()
        norm = strategy.step(1e-2)
        dist.all_reduce(total)
        results.append([total.item() / rows[..., 1:].numel(), norm.item()])
    return results


def whole(strategy: Strategy) -> State:
    """The logical state, put together from what each rank would save."""
    state = {}
    for name, tensor in strategy.state().items():
        state[name] = torch.zeros(tensor.shape)
        for piece in tensor.own().pieces:
            state[name][piece.region] += piece.tensor
        dist.all_reduce(state[name])
    return state


def same_bits(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def far_apart(first: State, second: State) -> float:
    """The largest difference of two numbers in the same place."""
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def refusal(config: Config, world: World) -> str:
    try:
        shard(build_model(config, VOCABULARY, 0), config, world)
    except ConfigError as error:
        return str(error)
    return "accepted"


def follow_ddp(world: World, found: dict[str, Any]) -> None:
    for tied in ("true", "false"):
        keys = (f"model.tied_embeddings={tied}", *UNEVEN_PARTS)
        ddp = started(configured("ddp", *keys), world)
        before = trained(ddp, world, range(2))
        saved = (whole(ddp), ddp.progress())
        after = trained(ddp, world, range(2, STEPS))
        found[f"ddp {tied}"] = before + after
        for stage in STAGES:
            zero = started(configured(stage, *keys), world)
            losses = trained(zero, world, range(STEPS))
            found[f"{stage} {tied}"] = losses
            found[f"{stage} {tied} apart"] = far_apart(whole(zero), whole(ddp))
            if tied == "true":
                continue
            of_ddp = started(configured(stage, *keys), world, saved)
            found[f"{stage} from ddp"] = same_bits(whole(of_ddp), saved[0])
            found[f"{stage} after ddp"] = trained(of_ddp, world, range(2, STEPS))
            of_zero = started(configured("ddp", *keys), world, (whole(zero), zero.progress()))
            found[f"ddp from {stage}"] = same_bits(whole(of_zero), whole(zero))


def go_on(world: World, found: dict[str, Any]) -> None:
    for stage in STAGES:
        for compute in ("fp32", "bf16"):
            config = configured(stage, f"precision={compute}", *UNEVEN_PARTS)
            throughout = started(config, world)
            trained(throughout, world, range(2))
            saved = (whole(throughout), throughout.progress())
            resumed = started(config, world, saved)
            found[f"{stage} {compute} loaded"] = same_bits(whole(resumed), saved[0])
            losses = trained(resumed, world, range(2, STEPS))
            # This one is rehearsed and evaluated in between.
            uninterrupted = []
            for step in range(2, STEPS):
                rehearse(throughout, config, world)
                throughout.module.eval()
                with torch.no_grad():
                    throughout.logits(torch.zeros((1, LENGTH), dtype=torch.int64))
                throughout.module.train()
                uninterrupted += trained(throughout, world, range(step, step + 1))
            found[f"{stage} {compute} losses"] = losses == uninterrupted
            found[f"{stage} {compute} bits"] = same_bits(whole(resumed), whole(throughout))
            found[f"{stage} {compute} buffers"] = sorted(
                {str(buffer.dtype) for buffer in throughout.module.buffers()}
            )


def overflow(world: World, found: dict[str, Any]) -> None:
    for stage in STAGES:
        strategy = started(configured(stage, "precision=fp16", "precision.loss_scale=1024"), world)
        before = whole(strategy)
        ((_, norm),) = trained(strategy, world, range(1), blow_up=1e6)
        found[f"{stage} overflow"] = [
            same_bits(whole(strategy), before),
            norm,
            strategy.progress().updates,
            strategy.progress().loss_scale,
        ]
        found[f"{stage} after overflow"] = trained(strategy, world, range(2))
        found[f"{stage} progress"] = [strategy.progress().updates, strategy.progress().steps_at_scale]


def offload(world: World, found: dict[str, Any]) -> None:
    for stage, what in (
        ("zero2", "optimizer"),
        ("zero3", "optimizer"),
        ("zero3", "all"),
    ):
        strategy = started(configured(stage, f"sharding.offload={what}", *UNEVEN_PARTS), world)
        found[f"{stage} {what}"] = trained(strategy, world, range(STEPS))


def refuse(world: World, found: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deepspeed", None)
        found["missing"] = refusal(configured("zero1"), world)
    found["refusals"] = [
        refusal(configured("zero3", *keys.split()), world)
        for keys in (
            "compile=true",
            "activation_checkpointing=selective",
            "sharding.quantized_weights=true",
        )
    ]


def _rank(rank: int, port: int, report: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    world = World.join()
    found: dict[str, Any] = {}
    said = report.with_name(f"said-{rank}.txt")
    with said.open("w") as file:
        sys.stdout = file
        for experiment in (refuse, follow_ddp, go_on, offload):
            experiment(world, found)
        if torch.ops.mkldnn._is_mkldnn_fp16_supported():
            overflow(world, found)
        sys.stdout = sys.__stdout__
    if world.main:
        report.write_text(json.dumps(found))
    world.leave()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zero") / "report.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_rank, args=(port, path), nprocs=RANKS)
    return path


@pytest.fixture(scope="module")
def found(report: Path) -> dict[str, Any]:
    findings: dict[str, Any] = json.loads(report.read_text())
    return findings


def assert_same_course(steps: list[list[float]], expected: list[list[float]]) -> None:
    assert len(steps) == len(expected)
    for step, other in zip(steps, expected, strict=True):
        assert step == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_norms_follow_ddp(found: dict[str, Any], stage: str, tied: str) -> None:
    assert all(norm > 0.5 for _, norm in found[f"ddp {tied}"])
    assert_same_course(found[f"{stage} {tied}"], found[f"ddp {tied}"])
    assert found[f"{stage} {tied} apart"] < 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_state_of_ddp_is_taken_up_and_given_back_bit_for_bit(found: dict[str, Any], stage: str) -> None:
    assert found[f"{stage} from ddp"]
    assert_same_course(found[f"{stage} after ddp"], found["ddp false"][2:])
    assert found[f"ddp from {stage}"]


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_goes_on_bit_for_bit_as_if_never_stopped(
    found: dict[str, Any], stage: str, compute: str
) -> None:
    assert found[f"{stage} {compute} loaded"]
    assert found[f"{stage} {compute} losses"]
    assert found[f"{stage} {compute} bits"]


@pytest.mark.parametrize("stage", STAGES)
def test_rotary_frequencies_stay_in_fp32(found: dict[str, Any], stage: str) -> None:
    assert found[f"{stage} bf16 buffers"] == ["torch.float32"]


@pytest.mark.parametrize("states", ["zero2 optimizer", "zero3 optimizer", "zero3 all"])
def test_states_in_host_memory_change_nothing(found: dict[str, Any], states: str) -> None:
    assert_same_course(found[states], found["ddp false"])


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="DeepSpeed needs fp16 products in hardware"
)
@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_halves_the_loss_scale_and_changes_nothing_else(
    found: dict[str, Any], stage: str
) -> None:
    assert found[f"{stage} overflow"] == [True, float("inf"), 0, 512.0]
    assert found[f"{stage} progress"] == [2, 2]
    for step, other in zip(found[f"{stage} after overflow"], found["ddp false"], strict=False):
        assert step == pytest.approx(other, rel=1e-2)


def test_without_deepspeed_the_way_to_it_and_one_without_are_named(found: dict[str, Any]) -> None:
    assert found["missing"].startswith("sharding.strategy=zero1: needs DeepSpeed, pip install")
    assert "fsdp_grad_op" in found["missing"]


def test_what_deepspeed_cannot_do_is_refused_in_one_line(found: dict[str, Any]) -> None:
    compiled, selective, quantized = found["refusals"]
    assert compiled.startswith("compile=true:")
    assert "sharding=fsdp" in compiled
    assert selective.startswith("activation_checkpointing=selective:")
    assert "full" in selective
    assert quantized == "sharding.quantized_weights=true: needs GPUs"
    assert not any("\n" in line for line in found["refusals"])


def test_deepspeed_says_nothing(report: Path) -> None:
    assert [report.with_name(f"said-{rank}.txt").read_text() for rank in range(RANKS)] == ["", ""]
