"""Parameter counts are exact: they equal the transformers module, preset by preset."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    GPT2Config,
    LlamaConfig,
    PhimoeConfig,
    PreTrainedConfig,
)

from configs.compose import ROOT, compose
from configs.schema import ConfigError, Model
from launcher.plan.shape import Shape, shape_of

PRESETS = sorted(file.stem for file in (ROOT / "model").glob("*.yaml") if file.stem != "hf")
TINY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 500,
}


def preset(name: str) -> Model:
    return compose([f"model={name}", "model.tokenizer=any"]).model


def checkpoint(directory: Path, sequence_length: int = 128) -> Shape:
    return shape_of(
        compose(["model=hf", f"model.path={directory}", f"model.sequence_length={sequence_length}"]).model
    )


def built(config: PreTrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def number_of_weights(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def as_transformers(model: Model) -> PreTrainedConfig:
    if model.family == "gpt2":
        return GPT2Config(
            vocab_size=model.vocabulary,
            n_positions=model.sequence_length,
            n_embd=model.hidden,
            n_layer=model.layers,
            n_head=model.heads,
            n_inner=model.ffn,
            tie_word_embeddings=model.tied_embeddings,
        )
    return LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.ffn,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        tie_word_embeddings=model.tied_embeddings,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_as_many_parameters_as_its_transformers_module(name: str) -> None:
    module, shape = built(as_transformers(preset(name))), shape_of(preset(name))
    looked_up = [layer for layer in module.modules() if isinstance(layer, torch.nn.Embedding)]
    assert shape.parameters == shape.parameters_active == number_of_weights(module)
    assert shape.parameters_embedding == sum(layer.weight.numel() for layer in looked_up)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-65b", 65_285_660_672),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("gpt2-124m", 124_439_808),
    ],
)
def test_a_preset_has_the_published_number_of_parameters(name: str, published: int) -> None:
    assert shape_of(preset(name)).parameters == published


@pytest.mark.parametrize("tied", [True, False])
def test_a_config_without_optional_keys_means_what_transformers_makes_of_it(
    tied: bool, tmp_path: Path
) -> None:
    """Old checkpoints leave out kv heads and head size; GPT-2's leaves out its tied embeddings."""
    if tied:
        written = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    else:
        written = {"model_type": "llama", **TINY, "max_position_embeddings": 256}
    (tmp_path / "config.json").write_text(json.dumps({**written, "vocab_size": 500}))
    config = (GPT2Config if tied else LlamaConfig).from_pretrained(tmp_path)
    shape = checkpoint(tmp_path)
    assert shape.tied is tied
    assert shape.parameters == number_of_weights(built(config))


def test_any_other_architecture_is_counted_from_its_safetensors(tmp_path: Path) -> None:
    module = AutoModelForCausalLM.from_config(BioGptConfig(**TINY, max_position_embeddings=126))
    module.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    shape = checkpoint(tmp_path, 126)
    assert shape.parameters == shape.parameters_active == number_of_weights(module)
    assert shape.parameters_embedding == (500 + 128) * 64
    assert shape.tied


def test_stored_experts_are_active_where_a_token_is_routed_to_them(tmp_path: Path) -> None:
    config = PhimoeConfig(**TINY, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    shape = checkpoint(tmp_path)
    one_expert = 3 * 64 * 160
    assert shape.parameters - shape.parameters_active == 3 * (4 - 1) * one_expert


def test_buffers_of_an_old_checkpoint_are_not_parameters(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    module = AutoModelForCausalLM.from_config(BioGptConfig(**TINY))
    module.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    buffers = {
        "layers.0.attention.bias": torch.ones(1, 1, 128, 128, dtype=torch.bool),
        "layers.0.attention.masked_bias": torch.tensor(-1e9),
        "layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(load_file(file) | buffers, file, {"format": "pt"})
    assert checkpoint(tmp_path).parameters == number_of_weights(module)


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_missing_directory_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory") as error:
        checkpoint(tmp_path / "nowhere")
    assert one_line(error).startswith(f"model.path={tmp_path / 'nowhere'}: ")


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json") as error:
        checkpoint(tmp_path)
    assert one_line(error).startswith(f"model.path={tmp_path}: ")


@pytest.mark.parametrize("text", ["{not json", "[1]", '{"model_type": "llama"}'])
def test_an_unusable_config_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json") as error:
        checkpoint(tmp_path)
    assert one_line(error).startswith(f"model.path={tmp_path}: ")


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{"])
def test_an_unknown_architecture_without_readable_weights_is_refused(
    content: bytes | None, tmp_path: Path
) -> None:
    BioGptConfig(**TINY).save_pretrained(tmp_path)
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="safetensors") as error:
        checkpoint(tmp_path)
    assert one_line(error).startswith(f"model.path={tmp_path}: ")


def test_rows_longer_than_the_checkpoint_has_positions_are_refused(tmp_path: Path) -> None:
    GPT2Config(n_embd=64, n_layer=1, n_head=4, n_positions=256).save_pretrained(tmp_path)
    assert checkpoint(tmp_path, 256).sequence_length == 256
    with pytest.raises(ConfigError, match="at most 256") as error:
        checkpoint(tmp_path, 257)
    assert one_line(error).startswith("model.sequence_length=257: ")


def hub_shape(cache: Path) -> subprocess.CompletedProcess[str]:
    """Count a hub model in a fresh process that is offline and has its own cache."""
    code = (
        "from configs.compose import compose; from launcher.plan.shape import shape_of\n"
        "print(shape_of(compose(['model=hf', 'model.path=someone/something']).model).parameters)"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "PYTHONPATH": str(ROOT.parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_hub_model_that_cannot_be_fetched_is_refused_by_name(tmp_path: Path) -> None:
    last_line = hub_shape(tmp_path).stderr.strip().splitlines()[-1]
    assert "ConfigError: model.path=someone/something: " in last_line


def test_a_hub_model_in_the_cache_needs_no_network(tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--something"
    config = LlamaConfig(**TINY)
    config.save_pretrained(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert hub_shape(tmp_path).stdout.strip() == str(number_of_weights(built(config)))


def test_a_config_json_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    LlamaConfig(**TINY).save_pretrained(tmp_path)
    plain = checkpoint(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert checkpoint(tmp_path) == plain


def test_a_multimodal_model_is_asked_for_its_text_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": TINY}))
    with pytest.raises(
        ConfigError, match="a multimodal model, give the directory of its text model"
    ) as error:
        checkpoint(tmp_path)
    assert one_line(error).startswith(f"model.path={tmp_path}: ")


def stored(directory: Path, tensors: dict[str, object], **switches: object) -> Shape:
    """A checkpoint of an unknown architecture with such safetensors headers, without the weights."""
    (directory / "config.json").write_text(json.dumps({"model_type": "unknown", **TINY, **switches}))
    header = json.dumps({name: {"dtype": "F32", "shape": shape} for name, shape in tensors.items()}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return checkpoint(directory)


TABLE: dict[str, object] = {"embed_tokens.weight": [500, 64]}


@pytest.mark.parametrize("shape", [[-5, 7], [2**40, 2**40], [1.5], [True, 7], "99", {"1": 2}, None])
def test_a_tensor_of_a_shape_that_none_has_is_damage(shape: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged") as error:
        stored(tmp_path, {**TABLE, "blocks": [1000, 1000], "wrong": shape})
    assert one_line(error).startswith(f"model.path={tmp_path}: ")


@pytest.mark.parametrize("switches", [{}, {"vocab_size": 2**30}])
def test_weights_that_cannot_be_those_of_the_config_are_refused(
    switches: dict[str, object], tmp_path: Path
) -> None:
    blocks = [1000, 1000] if switches else [0]
    with pytest.raises(ConfigError, match="fewer than the tables that vocab_size and hidden_size") as error:
        stored(tmp_path, {**TABLE, "blocks": blocks}, **switches)
    assert one_line(error).startswith(f"model.path={tmp_path}: ")


def test_stored_experts_are_at_least_those_that_a_token_is_routed_to(tmp_path: Path) -> None:
    experts = {**TABLE, "blocks": [1000, 1000], "blocks.experts.up": [1000, 1000]}
    assert stored(tmp_path, experts, num_experts=2, num_experts_per_tok=2).parameters == 2_032_000
    with pytest.raises(ConfigError, match="num_experts_per_tok=3, must be at most the 2 experts") as error:
        stored(tmp_path, experts, num_experts=2, num_experts_per_tok=3)
    assert one_line(error).startswith(f"model.path={tmp_path}: ")
