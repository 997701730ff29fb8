"""LoRA and frozen blocks: what is trained, from where, and what it is merged into."""

from __future__ import annotations

import importlib
import shutil
from typing import Any

import pytest
import torch
from support import Site, metrics
from torch import nn
from transformers import AutoModelForCausalLM

from configs.compose import compose
from configs.load import load
from configs.schema import Config, ConfigError
from trainer.adapters import add_adapters, is_adapter, merge_adapters
from trainer.initial import fill, initial_weights, random_weights
from trainer.model import architecture_of, blocks, build_model
from trainer.sharding.logical import logical
from trainer.skeleton import materialise

RANK, LAYERS, HIDDEN = 4, 3, 32
FAMILIES = ("llama", "gpt2")


def config(*overrides: str) -> Config:
    sizes = [f"model.layers={LAYERS}", f"model.hidden={HIDDEN}", "model.heads=4", "model.ffn=64"]
    own = ["model.tokenizer=unused", "model.vocabulary=321", "model.sequence_length=16", "seed=7"]
    return compose(["model=llama-demo", *sizes, *own, *overrides])


def filled(configured: Config) -> Any:
    module = build_model(configured, 321, 0)
    materialise(module, torch.device("cpu"))
    state = {f"weight/{name}": logical(parameter) for name, parameter in module.named_parameters()}
    fill(state, initial_weights(module, configured))
    return module


def trained(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module.eval()(torch.arange(48).view(3, 16)).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_lie_beside_queries_and_values_of_every_block_and_nothing_else_is_trained(
    family: str,
) -> None:
    module = filled(config(f"model.family={family}", f"model.lora_rank={RANK}"))
    assert len(blocks(module)) == LAYERS
    names = trained(module)
    assert all(is_adapter(name) for name in names)
    beside = {name.split(".lora_")[0].rpartition(".")[-1] for name in names}
    assert beside == ({"q_proj", "v_proj"} if family == "llama" else {"c_attn"})
    # 2 x 2 h r in llama; (h + 3 h) r beside GPT-2's one matrix of queries, keys and values
    sizes = [p.numel() for p in module.parameters() if p.requires_grad]
    assert sum(sizes) == LAYERS * 4 * HIDDEN * RANK


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_new_adapters_is_its_parent(family: str) -> None:
    adapted = filled(config(f"model.family={family}", f"model.lora_rank={RANK}"))
    assert torch.equal(logits(adapted), logits(filled(config(f"model.family={family}"))))


def test_adapters_begin_the_same_with_the_same_seed_and_differ_from_one_another() -> None:
    first, again, other = (
        dict(filled(config(f"model.lora_rank={RANK}", f"seed={seed}")).named_parameters())
        for seed in (1, 1, 2)
    )
    name = "model.layers.{}.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(first[name.format(0)], again[name.format(0)])
    assert not torch.equal(first[name.format(0)], other[name.format(0)])
    assert not torch.equal(first[name.format(0)], first[name.format(1)])
    assert 0 < first[name.format(0)].abs().max() <= (1 / HIDDEN) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("alpha", "scale"), [("null", 2.0), ("6", 6 / RANK)])
def test_merged_weights_are_the_plain_ones_plus_the_scaled_product(
    family: str, alpha: str, scale: float
) -> None:
    configured = config(f"model.family={family}", f"model.lora_rank={RANK}", f"model.lora_alpha={alpha}")
    module, plain = filled(configured), filled(config(f"model.family={family}"))
    projection = "self_attn.q_proj" if family == "llama" else "attn.c_attn"
    block = blocks(module)[1].get_submodule(projection)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=0.1)
    a, b = (getattr(block, part)["default"].weight.detach() for part in ("lora_A", "lora_B"))
    adapted = logits(module)
    merge_adapters(module)
    before = blocks(plain)[1].get_submodule(projection).weight
    after = blocks(module)[1].get_submodule(projection).weight
    product = scale * b @ a
    torch.testing.assert_close(after - before, product if family == "llama" else product.T)
    torch.testing.assert_close(logits(module), adapted)
    assert dict(module.named_parameters()).keys() == dict(plain.named_parameters()).keys()


def test_the_first_blocks_are_frozen_and_all_else_is_trained() -> None:
    names = trained(filled(config("model.frozen_blocks=2")))
    assert not any(name.startswith(("model.layers.0.", "model.layers.1.")) for name in names)
    assert {"model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight", "model.norm.weight"} <= set(
        names
    )


def test_frozen_blocks_get_no_adapters() -> None:
    module = filled(config("model.frozen_blocks=2", f"model.lora_rank={RANK}"))
    assert {name.split(".")[2] for name in trained(module)} == {"2"}
    assert {name.split(".")[2] for name, _ in module.named_parameters() if is_adapter(name)} == {"2"}


def test_adapters_without_a_block_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model\.frozen_blocks=3: leaves no block with adapters, must be"):
        filled(config("model.frozen_blocks=3", f"model.lora_rank={RANK}"))


def test_a_model_without_such_projections_is_refused() -> None:
    from transformers import MambaConfig

    architecture = MambaConfig(vocab_size=321, hidden_size=32, num_hidden_layers=2)
    module = AutoModelForCausalLM.from_config(architecture)
    with pytest.raises(ConfigError, match=r"^model\.lora_rank=4: MambaForCausalLM has no query and value"):
        add_adapters(module, config(f"model.lora_rank={RANK}").model, blocks(module))


def test_without_peft_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importlib.import_module("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"^model\.lora_rank=4: needs peft, install it with: pip install"):
        filled(config(f"model.lora_rank={RANK}"))


def test_adapters_are_trained_saved_resumed_and_exported_merged(site: Site) -> None:
    run = site.root / "run"
    lora = [f"model.lora_rank={RANK}", "gpus_per_node=2", "run.export=true", "checkpoint.every_steps=4"]
    finished = site.trainyard("train", *site.overrides(steps=12), *lora, "sharding=fsdp")
    assert finished.returncode == 0, finished.stderr
    last = metrics(run)[-1]
    assert last["loss"] < metrics(run)[0]["loss"]
    # Adapters and the parent's weights alike are in the checkpoint that the run is put back to.
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    shutil.rmtree(run / "export")
    assert site.trainyard("resume", str(run)).returncode == 0
    assert metrics(run)[-1]["loss"] == last["loss"]
    exported = dict(AutoModelForCausalLM.from_pretrained(run / "export").named_parameters())
    assert not any(is_adapter(name) for name in exported)
    parent = dict(random_weights(architecture_of(load(run / "config.yaml").model), seed=0))
    trained = {name for name in parent if not torch.equal(exported[name], parent[name])}
    assert {name.split(".")[-2] for name in trained} == {"q_proj", "v_proj"}
