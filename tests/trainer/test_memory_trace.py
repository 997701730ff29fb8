"""The trace takes the trainer's own model and step, so what it finds can be derived by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import LlamaConfig, MixtralConfig

from configs.compose import compose
from configs.schema import Config, ConfigError
from trainer.memory_trace import trace
from trainer.sharding.fsdp import split_dimension

GIB = 2**30
HIDDEN, LAYERS, HEADS, FFN, VOCABULARY, TOKENS = 64, 3, 4, 160, 512, 128
BLOCK = 4 * HIDDEN**2 + 3 * HIDDEN * FFN + 2 * HIDDEN
ROOT = 2 * VOCABULARY * HIDDEN + HIDDEN
PARAMETERS = LAYERS * BLOCK + ROOT
RANKS = 8


def config(*overrides: str) -> Config:
    return compose(
        [
            "model=llama-20m",
            f"model.hidden={HIDDEN}",
            f"model.layers={LAYERS}",
            f"model.heads={HEADS}",
            f"model.ffn={FFN}",
            f"model.vocabulary={VOCABULARY}",
            f"model.sequence_length={TOKENS}",
            f"gpus_per_node={RANKS}",
            "micro_batch=1",
            f"global_batch={RANKS}",
            *overrides,
        ]
    )


def hf(directory: Path) -> list[str]:
    """Overrides of a run that takes its architecture from a directory."""
    return [
        "model=hf",
        f"model.path={directory}",
        f"model.sequence_length={TOKENS}",
        f"gpus_per_node={RANKS}",
        "micro_batch=1",
        f"global_batch={RANKS}",
    ]


def traced_bytes(*overrides: str) -> dict[str, float]:
    answer = trace(config(*overrides))
    found = {name: size * GIB for name, size in answer["by_category_gib"].items()}
    return found | {"peak": answer["peak_gib"] * GIB}


def test_ddp_holds_sixteen_bytes_of_states_per_parameter() -> None:
    found = traced_bytes("sharding=ddp", "precision=fp32")
    assert found["weights"] == pytest.approx(4 * PARAMETERS, rel=1e-3)
    assert found["gradients"] == 4 * PARAMETERS
    assert found["optimizer"] == pytest.approx(8 * PARAMETERS, rel=1e-3)


def test_fsdp_splits_the_states_over_all_ranks() -> None:
    found = traced_bytes("sharding=fsdp")
    assert found["weights"] == pytest.approx(4 * PARAMETERS / RANKS, rel=1e-2)
    assert found["optimizer"] == pytest.approx(8 * PARAMETERS / RANKS, rel=1e-2)


def test_hsdp_splits_them_over_the_ranks_of_a_row() -> None:
    found = traced_bytes("sharding=hsdp", "sharding.shard_degree=2")
    assert found["optimizer"] == pytest.approx(8 * PARAMETERS / 2, rel=1e-2)


def test_gradients_that_ddp_accumulates_lie_beside_its_buckets() -> None:
    once = traced_bytes("sharding=ddp")
    twice = traced_bytes("sharding=ddp", f"global_batch={2 * RANKS}")
    assert twice["gradients"] - once["gradients"] == 4 * PARAMETERS


def test_a_third_micro_batch_takes_no_more_than_a_second() -> None:
    two = traced_bytes("sharding=fsdp", f"global_batch={2 * RANKS}")
    assert traced_bytes("sharding=fsdp", f"global_batch={5 * RANKS}") == two


def test_under_full_checkpointing_a_block_keeps_its_input_only() -> None:
    long = ("sharding=fsdp", "activation_checkpointing=full", "micro_batch=8", f"global_batch={8 * RANKS}")
    more = traced_bytes(*long, f"model.layers={LAYERS + 2}")
    # two blocks' inputs, and their cosines and sines of positions come once
    assert more["activations"] - traced_bytes(*long)["activations"] == 2 * 8 * TOKENS * HIDDEN * 2


def test_attention_keeps_no_matrix_of_scores_or_masks() -> None:
    full = ("sharding=fsdp", "activation_checkpointing=none")
    short = traced_bytes(*full, f"model.sequence_length={8 * TOKENS}")
    long = traced_bytes(*full, f"model.sequence_length={16 * TOKENS}")
    assert long["activations"] == pytest.approx(2 * short["activations"], rel=1e-3)


def test_logits_in_bf16_save_half_of_what_the_loss_keeps() -> None:
    large = ("sharding=fsdp", "model.vocabulary=16384", "activation_checkpointing=full")
    saved = traced_bytes(*large)["peak"] - traced_bytes(*large, "objective.logits=bf16")["peak"]
    assert saved == pytest.approx(6 * TOKENS * 16384, rel=0.1)


def test_a_foreach_optimizer_takes_a_copy_of_its_weights() -> None:
    states = ("sharding=ddp", "precision=fp32", "model.sequence_length=16")
    fused = traced_bytes(*states)
    assert traced_bytes(*states, "optimizer.implementation=foreach")["peak"] >= fused["peak"]
    assert trace(config(*states, "optimizer.implementation=foreach"))["moment"] == "optimizer"


def test_a_config_json_without_weights_is_enough(tmp_path: Path) -> None:
    small = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        architectures=["LlamaForCausalLM"],
    )
    small.save_pretrained(tmp_path)
    assert trace(compose(hf(tmp_path)))["peak_gib"] == pytest.approx(
        trace(config("sharding=ddp"))["peak_gib"]
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sharding=zero3", "sharding.strategy=zero3: cannot be traced, choose ddp, fsdp"),
        ("sharding=fsdp_offload", "sharding.offload=all: cannot be traced, choose none"),
        ("precision.weights=bf16", "precision.weights=bf16: cannot be traced, choose fp32"),
        ("model.lora_rank=8", "model.lora_rank=8: cannot be traced, choose none"),
    ],
)
def test_what_is_only_planned_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trace(config(override))


def test_a_large_model_on_many_ranks_is_traced_without_its_memory(tmp_path: Path) -> None:
    large = compose(
        ["model=llama-7b", "model.layers=4", "sharding=fsdp", "nodes=8", "gpus_per_node=8", "micro_batch=1"]
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(large.model_dump()))
    command = [sys.executable, "-P", "-m", "trainer.memory_trace", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        answer: dict[str, Any] = json.loads(process.stdout.read())
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
    assert answer["world_size"] == 64
    assert answer["by_category_gib"]["weights"] == pytest.approx(4 * 1.0717e9 / 64 / GIB, rel=0.01)
    assert usage.ru_maxrss / 2**20 < 3.5  # the weights alone would be 4; a child begins with pytest's


def test_experts_fewer_than_ranks_are_split_within(tmp_path: Path) -> None:
    small = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_local_experts=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        architectures=["MixtralForCausalLM"],
    )
    small.save_pretrained(tmp_path)
    experts = 2 * 3 * HIDDEN * FFN
    parameters = PARAMETERS + LAYERS * (experts - 3 * HIDDEN * FFN + 2 * HIDDEN)
    found = trace(compose([*hf(tmp_path), "sharding=fsdp"]))["by_category_gib"]
    assert found["weights"] * GIB == pytest.approx(4 * parameters / RANKS, rel=1e-2)


@pytest.mark.parametrize(
    ("shape", "dimension"),
    [
        ((512, 64), None),
        ((3, 64), None),
        ((16, 64, 32), None),
        ((2, 64, 32), 1),
        ((2, 60, 32), 2),
        ((2, 3, 5), None),
    ],
)
def test_only_weights_of_experts_are_split_along_another_dimension(
    shape: tuple[int, ...], dimension: int | None
) -> None:
    split = split_dimension(nn.Parameter(torch.empty(shape)), RANKS)
    assert (split and split.dim) == dimension
