"""Strategies of torch's own on four ranks, against a plain loop in this process.

The ranks are started once and train every case; the tests look at what they found.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from configs.compose import compose
from configs.schema import Config
from trainer import objective
from trainer.distributed import World
from trainer.initial import fill, initial_weights
from trainer.model import build_model
from trainer.rehearsal import pass_on_zeros
from trainer.sharding import Progress, Strategy, shard
from trainer.sharding.logical import logical
from trainer.skeleton import materialise

RANKS, VOCABULARY, TOKENS, ROWS, STEPS, LR = 4, 321, 16, 8, 4, 1e-2
UNTIED, LORA, FROZEN = "model.tied_embeddings=false", "model.lora_rank=4", "model.frozen_blocks=1"
GPT2, FULL, DEGREE = "model.family=gpt2", "activation_checkpointing=full", "sharding.shard_degree=2"
CASES: list[tuple[str, ...]] = [
    ("ddp",),
    ("ddp", UNTIED, "activation_checkpointing=selective", "sharding.bucket_mib=0.01"),
    ("ddp", FROZEN),
    ("ddp", LORA, FULL),
    ("fsdp",),
    ("fsdp", UNTIED, FULL),
    ("fsdp", GPT2),
    ("fsdp", FROZEN),
    ("fsdp", LORA, FULL),
    ("fsdp", "sharding.prefetch_blocks=2"),
    ("fsdp", "sharding.reshard_after_forward=false"),
    ("fsdp_grad_op",),
    ("fsdp_offload",),
    ("hsdp", DEGREE),
    ("hsdp", DEGREE, GPT2, LORA, FROZEN),
]
ROUNDED: list[tuple[str, ...]] = [
    ("ddp", "precision=bf16"),
    ("fsdp", "precision=bf16"),
    ("ddp", "sharding.reduce_dtype=bf16"),
    ("fsdp", "sharding.reduce_dtype=bf16"),
    ("ddp", "precision.compute=fp16"),
    ("hsdp", DEGREE, "precision.compute=fp16"),
]
TOLERANCE, ROUNDED_TOLERANCE = 1e-5, 2e-3


def config(strategy: str, *overrides: str) -> Config:
    sizes = ["model.layers=3", "model.hidden=32", "model.heads=2", "model.ffn=66"]
    own = [f"model.vocabulary={VOCABULARY}", f"model.sequence_length={TOKENS}", "model.tokenizer=unused"]
    batch = [f"global_batch={ROWS}", "micro_batch=1", f"gpus_per_node={RANKS}"]
    start = ["model=llama-demo", "precision=fp32", "seed=3", f"sharding={strategy}"]
    return compose([*start, *sizes, *own, *batch, *overrides])


def model_of(case: tuple[str, ...]) -> tuple[str, ...]:
    """The overrides that are not about how the model is trained."""
    return tuple(text for text in case if text.startswith("model."))


def rows(step: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(step))


def plain_loop(configured: Config) -> dict[str, Any]:
    """Losses, norms, first and last weights of a loop without any strategy."""
    module: Any = build_model(configured, VOCABULARY, 0)
    materialise(module, torch.device("cpu"))
    state = {f"weight/{name}": logical(parameter) for name, parameter in module.named_parameters()}
    fill(state, initial_weights(module, configured))
    first = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=LR, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for step in range(STEPS):
        inputs, targets, _ = objective.causal(rows(step))
        logits = module(input_ids=inputs).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(trained, 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    last = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return {"losses": losses, "norms": norms, "first": first, "last": last}


def furthest(strategy: Strategy, whole: dict[str, Tensor]) -> float:
    """Largest difference between this rank's weights and what they should be."""
    found = {name: held for name, held in strategy.state().items() if name.startswith("weight/")}
    assert {name.removeprefix("weight/") for name in found} == whole.keys()
    return max(
        (piece.tensor - whole[name.removeprefix("weight/")][piece.region]).abs().max().item()
        for name, held in found.items()
        for piece in held.pieces
    )


def copied(strategy: Strategy) -> dict[tuple[str, tuple[int, ...]], Tensor]:
    """Name, place and numbers of every piece of this rank's state as it is now."""
    return {
        (name, piece.offsets): piece.tensor.clone()
        for name, held in strategy.state().items()
        for piece in held.pieces
    }


def train(configured: Config, world: World, expected: dict[str, Any]) -> dict[str, Any]:
    module = build_model(configured, VOCABULARY, 0)
    strategy = shard(module, configured, world)
    fill(strategy.state(), initial_weights(module, configured))
    strategy.loaded(Progress())
    from_first = furthest(strategy, expected["first"])
    pass_on_zeros(strategy, configured, world)
    strategy.discard_gradients()
    losses, norms = [], []
    for step in range(STEPS):
        inputs, targets, _ = objective.causal(rows(step)[world.rank :: world.size])
        loss_sum = torch.zeros(())
        for row in range(len(inputs)):
            with strategy.gradients(complete=row == len(inputs) - 1):
                loss = objective.loss_sum(strategy.logits(inputs[row : row + 1]), targets[row : row + 1])
                strategy.backward(loss * (world.size / (ROWS * TOKENS)))
            loss_sum += loss.detach()
        norms.append(strategy.step(LR).item())
        dist.all_reduce(loss_sum)
        losses.append(loss_sum.item() / (ROWS * TOKENS))
    before = copied(strategy)
    strategy.module.eval()
    with torch.no_grad():
        strategy.logits(rows(0)[:1, :-1])
    strategy.module.train()
    untouched = copied(strategy)
    own = sum(piece.tensor.numel() for held in strategy.state().values() for piece in held.own().pieces)
    return {
        "evaluation_leaves_no_trace": all(
            world.gather(
                before.keys() == untouched.keys() and all(before[key].equal(untouched[key]) for key in before)
            )
        ),
        "moments": max(world.gather(max(t.abs().max().item() for (n, _), t in before.items() if "exp" in n))),
        "losses": losses,
        "norms": norms,
        "from_first": max(world.gather(from_first)),
        "from_last": max(world.gather(furthest(strategy, expected["last"]))),
        "updates": strategy.progress().updates,
        "saved": sum(world.gather(own)),
        "numbers": sum(held.shape.numel() for held in strategy.state().values()),
    }


def rank_of(rank: int, port: int, directory: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)  # threads of so small a model only wait for one another
    world = World.join()
    expected = torch.load(directory / "expected.pt", weights_only=True)
    found = {case: train(config(*case), world, expected[model_of(case)]) for case in [*CASES, *ROUNDED]}
    if world.main:
        torch.save(found, directory / "found.pt")
    world.leave()


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, ...], Any]:
    """What a plain loop finds for each model."""
    models = {model_of(case) for case in [*CASES, *ROUNDED]}
    return {model: plain_loop(config("ddp", *model)) for model in models}


@pytest.fixture(scope="module")
def found(expected: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("ranks")
    torch.save(expected, directory / "expected.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(rank_of, args=(port, directory), nprocs=RANKS)
    return torch.load(directory / "found.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_losses_norms_and_weights_are_those_of_a_plain_loop(
    found: dict[Any, Any], expected: dict[Any, Any], case: tuple[str, ...]
) -> None:
    plain, ours = expected[model_of(case)], found[case]
    assert ours["losses"] == pytest.approx(plain["losses"], rel=TOLERANCE)
    assert ours["norms"] == pytest.approx(plain["norms"], rel=TOLERANCE)
    assert ours["from_last"] < 1e-4
    assert ours["updates"] == STEPS


@pytest.mark.parametrize("case", ROUNDED, ids=" ".join)
def test_rounded_formats_follow_within_a_fifth_of_a_percent(
    found: dict[Any, Any], expected: dict[Any, Any], case: tuple[str, ...]
) -> None:
    assert found[case]["losses"] == pytest.approx(expected[model_of(case)]["losses"], rel=ROUNDED_TOLERANCE)
    assert found[case]["losses"] != expected[model_of(case)]["losses"]


@pytest.mark.parametrize("case", [*CASES, *ROUNDED], ids=" ".join)
def test_the_same_seed_gives_the_same_bits_whatever_the_strategy(
    found: dict[Any, Any], case: tuple[str, ...]
) -> None:
    assert found[case]["from_first"] == 0.0


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_ranks_save_every_number_once(found: dict[Any, Any], case: tuple[str, ...]) -> None:
    assert found[case]["saved"] == found[case]["numbers"]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_an_evaluation_before_a_save_leaves_weights_and_moments_as_they_are(
    found: dict[Any, Any], case: tuple[str, ...]
) -> None:
    assert found[case]["evaluation_leaves_no_trace"]
    assert found[case]["moments"] > 0
