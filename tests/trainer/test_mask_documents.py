"""With objective.mask_documents a row of documents is trained on as each of them alone would be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import together
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, MambaConfig, MistralConfig, PreTrainedConfig
from transformers.models.jamba import JambaConfig

from configs.compose import compose
from configs.schema import Config, ConfigError
from trainer import objective
from trainer.distributed import World
from trainer.evaluation import perplexities
from trainer.initial import fill, initial_weights
from trainer.model import build_model, forward
from trainer.rehearsal import check_documents, pass_on_zeros
from trainer.sharding import Progress, Strategy, shard
from trainer.sharding.logical import Logical, logical
from trainer.skeleton import materialise

VOCABULARY, LENGTH, END = 97, 48, 0
LENGTHS = [[5, 20, 1, 1, 14, 30], [49], [48, 9], [1, 47, 3], [11, 7, 2], [30, 18, 1], [60], [2] * 24]
"""Tokens of the documents of each row, ends included; what does not fit is cut, what is left is padding."""
MASKED = [
    "objective.mask_documents=true",
    "precision=fp32",
    "model.tokenizer=unused",
    f"model.sequence_length={LENGTH}",
    "global_batch=8",
    "micro_batch=2",
    "gpus_per_node=2",
]


def config(*overrides: str) -> Config:
    sizes = ["model.layers=3", "model.hidden=32", "model.heads=2", "model.ffn=66"]
    return compose(["model=llama-demo", *sizes, f"model.vocabulary={VOCABULARY}", *MASKED, *overrides])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of so small a model only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    made = torch.full((len(LENGTHS), LENGTH + 1), objective.IGNORED)
    for row, lengths in zip(made, LENGTHS, strict=True):
        tokens = torch.randint(1, VOCABULARY, (sum(lengths),), generator=generator)
        tokens[torch.tensor(lengths).cumsum(0) - 1] = END
        row[: len(tokens)] = tokens[: LENGTH + 1]
    return made


def documents() -> Iterator[Tensor]:
    """Documents and parts of documents in the rows, one by one: [tokens]."""
    for row in rows():
        tokens = row[row != objective.IGNORED]
        ends = (tokens == END).nonzero().flatten() + 1
        yield from (part for part in tokens.tensor_split(ends) if len(part) > 1)


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def one_by_one(module: Any) -> tuple[float, Tensor]:
    """Loss and gradient of a loop over single documents, without positions or masks of ours."""
    total = torch.zeros(())
    for document in documents():
        logits = module(input_ids=document[None, :-1], use_cache=False).logits
        total = total + nn.functional.cross_entropy(logits[0], document[1:], reduction="sum")
    total.backward()
    return total.item(), gradient(module)


def in_rows(module: nn.Module, micro_batch: int) -> tuple[float, Tensor]:
    inputs, targets, positions = objective.causal(rows(), END)
    assert positions is not None
    loss_sum = 0.0
    for start in range(0, len(inputs), micro_batch):
        micro = slice(start, start + micro_batch)
        loss = objective.loss_sum(forward(module, inputs[micro], positions[micro]), targets[micro])
        loss.backward()
        loss_sum += loss.item()
    return loss_sum, gradient(module)


def built(configured: Config, attention: str = "sdpa") -> Any:
    module: Any = build_model(configured, VOCABULARY, END)
    module.set_attn_implementation(attention)
    materialise(module, torch.device("cpu"))
    fill_largely(
        {f"weight/{name}": logical(parameter) for name, parameter in module.named_parameters()},
        module,
        configured,
    )
    return module


def fill_largely(state: dict[str, Logical], module: nn.Module, configured: Config) -> None:
    """Initial weights times four: with small ones attention adds next to nothing to the loss."""
    fill(state, ((name, 4 * whole[:]) for name, whole in initial_weights(module, configured)))


def assert_same(found: tuple[float, Tensor], expected: tuple[float, Tensor]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert (found[1] - expected[1]).norm() <= 1e-5 * expected[1].norm()


@cache
def alone(family: str) -> tuple[float, Tensor]:
    return one_by_one(built(config(f"model.family={family}")))


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_and_gradient_are_those_of_a_loop_over_single_documents(
    family: str, attention: str, micro_batch: int
) -> None:
    assert_same(in_rows(built(config(f"model.family={family}"), attention), micro_batch), alone(family))


@pytest.mark.parametrize("recomputed", ["selective", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputed_activations_see_the_same_documents(family: str, recomputed: str) -> None:
    configured = config(f"model.family={family}", f"activation_checkpointing={recomputed}")
    assert_same(in_rows(built(configured), 2), alone(family))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_masks_they_are_others(family: str) -> None:
    inputs, targets, _ = objective.causal(rows(), END)
    module = built(config(f"model.family={family}"))
    mixed = objective.loss_sum(forward(module, inputs, None), targets)
    mixed.backward()
    assert mixed.item() != pytest.approx(alone(family)[0], rel=1e-2)
    assert (gradient(module) - alone(family)[1]).norm() > 0.1 * alone(family)[1].norm()


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_sliding_window_stays_within_the_document(micro_batch: int) -> None:
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=7))
    expected = one_by_one(module)
    module.zero_grad()
    assert_same(in_rows(module, micro_batch), expected)


def saved(architecture: PreTrainedConfig, directory: Path, *overrides: str) -> Config:
    """The configuration of a run that begins with a checkpoint of this architecture."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(architecture).save_pretrained(directory)
    return compose(["model=hf", f"model.path={directory}", *MASKED, *overrides])


@pytest.fixture
def world() -> Iterator[World]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"), dist.new_group(backend="gloo"))
    dist.destroy_process_group()


def started(configured: Config, world: World) -> Strategy:
    module = build_model(configured, VOCABULARY, END)
    strategy = shard(module, configured, world)
    fill_largely(strategy.state(), module, configured)
    strategy.loaded(Progress())
    pass_on_zeros(strategy, configured, world)
    strategy.discard_gradients()
    return strategy


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_that_mask_documents_pass_the_check(world: World, family: str, precision: str) -> None:
    configured = config(f"model.family={family}", f"precision={precision}")
    check_documents(started(configured, world), configured, world)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_takes_positions_but_does_not_mask_by_them_is_refused(
    world: World, tmp_path: Path, precision: str
) -> None:
    own = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 64}
    scaled = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    configured = saved(GptOssConfig(**SMALL | own | scaled), tmp_path, f"precision={precision}")
    with pytest.raises(
        ConfigError, match=r"^objective\.mask_documents=true: GptOssForCausalLM with .* choose false$"
    ):
        check_documents(started(configured, world), configured, world)
    unmasked = configured.model_copy(update={"objective": config("objective.mask_documents=false").objective})
    check_documents(started(unmasked, world), unmasked, world)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        (MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1), "takes no positions"),
        (JambaConfig(**SMALL, num_experts=2), "has recurrent or convolutional blocks"),
    ],
)
def test_a_model_without_masks_is_refused_before_it_is_sharded(
    tmp_path: Path, architecture: PreTrainedConfig, reason: str
) -> None:
    configured = saved(architecture, tmp_path)
    name = type(architecture).__name__.replace("Config", "ForCausalLM")
    with pytest.raises(
        ConfigError, match=rf"^objective\.mask_documents=true: {name} {reason}, .* choose false$"
    ):
        build_model(configured, VOCABULARY, END)


def test_held_out_documents_are_masked_like_those_of_training(world: World) -> None:
    configured = config()
    strategy = started(configured, world)
    strategy.module.eval()
    held_out = {"x": rows().numpy().astype(np.int32)}
    found = perplexities(strategy.logits, held_out, configured, world, END)
    mean = alone("llama")[0] / sum(len(document) - 1 for document in documents())
    assert found["eval/x/loss"] == pytest.approx(mean, rel=1e-5)
    assert found["eval/x/perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)


STRATEGIES = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
RANKS = 2


def step_in_rows(world: World, report: Path) -> None:
    """One step of every strategy, on two micro batches of two rows."""
    torch.set_num_threads(1)
    found = {}
    inputs, targets, positions = objective.causal(rows()[world.rank :: RANKS], END)
    assert positions is not None
    for name in STRATEGIES:
        for family in ("llama", "gpt2"):
            configured = config(
                f"sharding={name}",
                f"model.family={family}",
                "activation_checkpointing=full",
                "optimizer.clip_norm=1e9",
            )
            strategy = started(configured, world)
            check_documents(strategy, configured, world)
            total = torch.zeros(())
            for micro in (slice(0, 2), slice(2, 4)):
                with strategy.gradients(complete=micro.stop == 4):
                    logits = strategy.logits(inputs[micro], positions[micro])
                    loss = objective.loss_sum(logits, targets[micro])
                    strategy.backward(loss * RANKS)
                total += loss.detach()
            dist.all_reduce(total)
            found[name, family] = (total.item(), strategy.step(0.0).item())
    if world.main:
        torch.save(found, report)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("deepspeed")
    report = tmp_path_factory.mktemp("masked") / "found.pt"
    assert together(RANKS, step_in_rows, report)
    return torch.load(report, weights_only=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_on_single_documents(steps: Any, strategy: str, family: str) -> None:
    loss, expected = alone(family)
    assert steps[strategy, family][0] == pytest.approx(loss, rel=1e-5)
    assert steps[strategy, family][1] == pytest.approx(expected.norm().item(), rel=1e-5)
