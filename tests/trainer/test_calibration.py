"""Steps on this machine's devices, of as much of the model as they can take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from configs.compose import compose
from configs.schema import ConfigError
from trainer.calibration import CPU_STEP_FLOPS, blocks_that_fit, on_this_machine, shortened

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
SMALL = ("model=llama-20m", "model.hidden=64", "model.heads=2", "model.ffn=160", "model.vocabulary=320")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_strategy_that_is_trained_can_be_timed(tmp_path: Path, strategy: str) -> None:
    config = compose(
        [*SMALL, "model.sequence_length=32", "micro_batch=1", "gpus_per_node=2", f"sharding={strategy}"]
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump()))
    command = [sys.executable, "-P", "-m", "trainer.calibration", str(file)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    answer = json.loads(outcome.stdout)
    assert answer["strategy"] == strategy
    assert answer["workers"] == 2
    assert answer["tokens_per_step"] == 32
    assert answer["step_seconds"] > 0


def test_a_small_model_is_stepped_whole() -> None:
    assert blocks_that_fit(compose([*SMALL, "model.layers=6", "micro_batch=1"])) == 6


@no_gpu
def test_a_model_too_slow_for_processors_is_cut_to_its_first_blocks() -> None:
    config = compose(["model=llama-20m", "model.layers=64", "micro_batch=1"])
    layers = blocks_that_fit(config)
    assert layers < 64
    parameters = 2 * 32000 * 256 + layers * (4 * 256**2 + 3 * 256 * 688)
    tokens = config.model.sequence_length
    assert 6 * parameters * tokens < CPU_STEP_FLOPS or layers == 1


def test_a_block_too_large_for_the_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"micro_batch=4096: a step of 1 of 80 blocks needs"):
        blocks_that_fit(compose(["model=llama-65b", "micro_batch=4096", "global_batch=4096"]))


def test_a_shortened_model_has_the_first_blocks_of_each_kind() -> None:
    assert shortened(compose(["model=gpt2-124m"]), 3).num_hidden_layers == 3


@no_gpu
def test_runs_of_many_nodes_are_measured_on_one() -> None:
    config = on_this_machine(compose([*SMALL, "nodes=4", "gpus_per_node=2", "micro_batch=8"]))
    assert (config.nodes, config.gpus_per_node, config.accumulation) == (1, 2, 1)
