"""Initial weights come one at a time, and are those of a model that is built or loaded in one piece."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import VOCABULARY, Site
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
)

from configs.compose import compose
from configs.schema import ConfigError
from trainer.initial import fill, random_weights
from trainer.model import build_model
from trainer.pretrained import load_buffers, pretrained_weights
from trainer.sharding.logical import Logical, Piece, Sliceable
from trainer.skeleton import materialise, skeleton

ROOT = Path(__file__).resolve().parents[2]
SEED = 5
SMALL: dict[str, Any] = {
    "vocab_size": 321,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TINY_GPT2: dict[str, Any] = {"vocab_size": 321, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}
TINY_GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama with padding": LlamaConfig(**SMALL, pad_token_id=3),
    "gpt2": GPT2Config(**TINY_GPT2, tie_word_embeddings=False),
    "gpt2 tied": GPT2Config(**TINY_GPT2, tie_word_embeddings=True),
    "neox": GPTNeoXConfig(**SMALL),
    "mixtral": MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4),
    "mamba": MambaConfig(vocab_size=321, hidden_size=32, num_hidden_layers=2),
}


def whole_model(architecture: PreTrainedConfig) -> Any:
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)


def whole(tensor: Sliceable, shape: torch.Size) -> Tensor:
    return tensor[tuple(slice(0, size) for size in shape)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_random_weights_are_those_of_a_model_built_in_one_piece(name: str) -> None:
    found = dict(random_weights(ARCHITECTURES[name], SEED))
    expected = dict(whole_model(ARCHITECTURES[name]).named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_other_random_numbers_are_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert list(random_weights(ARCHITECTURES["gpt2"], SEED))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_skeleton_has_buffers_but_no_numbers_in_its_parameters(name: str) -> None:
    module, _ = skeleton(ARCHITECTURES[name])
    expected = whole_model(ARCHITECTURES[name])
    assert all(parameter.is_meta for parameter in module.parameters())
    assert dict(module.named_buffers()).keys() == dict(expected.named_buffers()).keys()
    for key, buffer in module.named_buffers():
        assert torch.equal(buffer, expected.get_buffer(key))


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2 tied"])
def test_a_skeleton_that_is_filled_computes_what_the_model_does(name: str) -> None:
    module, _ = skeleton(ARCHITECTURES[name])
    materialise(module, torch.device("cpu"))
    weights = dict(random_weights(ARCHITECTURES[name], SEED))
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.copy_(weights[key])
    inputs = torch.arange(16)[None]
    expected = whole_model(ARCHITECTURES[name]).eval()(inputs).logits
    assert torch.equal(module.eval()(inputs).logits, expected)


def saved(directory: Path, name: str, form: str) -> Any:
    """A parent on disk in one of the forms that checkpoints come in; returns the model."""
    model = whole_model(ARCHITECTURES[name])
    if form == "bf16":
        model = model.to(torch.bfloat16)
    if form == "without its head":
        model.base_model.save_pretrained(directory)
    else:
        model.save_pretrained(directory, max_shard_size="20KB" if form == "in parts" else "5GB")
    return model.float()


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("llama", "in one file"),
        ("llama tied", "in parts"),
        ("llama", "bf16"),
        ("gpt2 tied", "without its head"),
        ("gpt2", "in parts"),
        ("mixtral", "in parts"),
    ],
)
def test_weights_of_a_parent_are_read_as_they_are(tmp_path: Path, name: str, form: str) -> None:
    expected = dict(saved(tmp_path, name, form).named_parameters())
    module, _ = skeleton(ARCHITECTURES[name])
    found = {
        key: whole(tensor, expected[key].shape).float()
        for key, tensor in pretrained_weights(str(tmp_path), module)
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_part_of_a_parents_weight_is_read_alone(tmp_path: Path) -> None:
    expected = saved(tmp_path, "llama", "in one file").lm_head.weight.detach()
    module, _ = skeleton(ARCHITECTURES["llama"])
    stored = dict(pretrained_weights(str(tmp_path), module))["lm_head.weight"]
    assert not isinstance(stored, Tensor)
    assert torch.equal(stored[slice(7, 9), slice(3, 30)], expected[7:9, 3:30])


def test_a_parent_whose_files_do_not_fit_its_configuration_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama", "in one file")
    other = LlamaConfig(**SMALL | {"intermediate_size": 64}, architectures=["LlamaForCausalLM"])
    other.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"^model.path={tmp_path}: cannot be loaded: "):
        list(pretrained_weights(str(tmp_path), skeleton(other)[0]))


def test_buffers_that_a_parent_has_trained_are_read(tmp_path: Path) -> None:
    sizes = SMALL | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    architecture = DeepseekV3Config(**sizes, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8)
    parent = whole_model(architecture)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    parent.get_buffer(name).copy_(torch.arange(4.0))
    parent.save_pretrained(tmp_path)
    module, _ = skeleton(architecture)
    load_buffers(str(tmp_path), module)
    assert torch.equal(module.get_buffer(name), torch.arange(4.0))


def test_every_weight_must_get_its_numbers() -> None:
    state = {
        f"weight/{name}": Logical(torch.Size([2]), (Piece((0,), torch.zeros(2)),)) for name in ("a", "b")
    }
    with pytest.raises(AssertionError, match="no initial weights for weight/b"):
        fill(state, iter([("a", torch.ones(2))]))
    assert torch.equal(state["weight/a"].pieces[0].tensor, torch.ones(2))


def test_a_quantized_parent_is_refused(site: Site, tmp_path: Path) -> None:
    architecture = LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"])
    architecture.quantization_config = {"quant_method": "fp8"}
    architecture.save_pretrained(tmp_path)
    texts = [text for text in site.overrides() if not text.startswith("model")]
    config = compose([*texts, "model=hf", f"model.path={tmp_path}", "model.sequence_length=16"])
    with pytest.raises(ConfigError, match=f"^model.path={tmp_path}: has quantized weights"):
        build_model(config, VOCABULARY, 0)


def test_the_host_never_holds_the_model() -> None:
    """In a process of its own, whose peak is its own: 302 MB of weights, of which the largest has 8."""
    program = """
import resource
from transformers import LlamaConfig
from trainer.initial import random_weights
sizes = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 22}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
list(random_weights(LlamaConfig(**sizes | {"num_hidden_layers": 1}), 0))
before, total = peak(), 0
for _, weight in random_weights(LlamaConfig(**sizes), 0):
    total += 4 * weight.numel()
print(total, peak() - before)
"""
    command = [sys.executable, "-c", program]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    total, extra = (int(number) for number in outcome.stdout.split()[-2:])
    assert total > 250e6
    assert extra < total / 8
