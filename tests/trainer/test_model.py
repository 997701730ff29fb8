from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import SEQUENCE_LENGTH, VOCABULARY, Site
from torch import nn

from configs.compose import compose
from configs.schema import Config, ConfigError
from launcher.plan.flops import flops_per_token as planned_flops_per_token
from launcher.plan.shape import shape_of
from trainer import objective
from trainer.initial import fill, initial_weights
from trainer.model import architecture_of, blocks, build_model, flops_per_token
from trainer.sharding.logical import logical
from trainer.skeleton import materialise


def filled(config: Config) -> nn.Module:
    """The model as it is before the first step, on the CPU and whole."""
    module = build_model(config, VOCABULARY, 0)
    assert all(parameter.is_meta for parameter in module.parameters())
    materialise(module, torch.device("cpu"))
    fill(
        {f"weight/{name}": logical(parameter) for name, parameter in module.named_parameters()},
        initial_weights(module, config),
    )
    return module


def built(site: Site, *overrides: str) -> tuple[Config, nn.Module]:
    config = compose([*site.overrides(), *overrides])
    return config, filled(config)


def gradients(site: Site, *overrides: str) -> list[torch.Tensor]:
    _, model = built(site, *overrides)
    rows = torch.arange(3 * (SEQUENCE_LENGTH + 1)).view(3, -1) % VOCABULARY
    inputs, targets, _ = objective.causal(rows)
    objective.loss_sum(model(input_ids=inputs).logits, targets).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("choice", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradients(site: Site, choice: str) -> None:
    expected = gradients(site)
    actual = gradients(site, f"activation_checkpointing={choice}")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def saved_bytes(site: Site, choice: str) -> int:
    """Bytes that the forward pass keeps for the backward pass."""
    _, model = built(site, f"activation_checkpointing={choice}")
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=torch.zeros(8, SEQUENCE_LENGTH, dtype=torch.int64))
    return sum(kept.values())


def test_full_recomputation_keeps_less_for_the_backward_pass(site: Site) -> None:
    assert saved_bytes(site, "full") < saved_bytes(site, "none") / 2


def test_the_same_seed_gives_the_same_weights(site: Site) -> None:
    first, second, other = (
        torch.cat([p.flatten() for p in built(site, f"seed={seed}")[1].parameters()]) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("preset", ["llama-60m", "llama-3-8b", "llama-demo", "gpt2-124m"])
def test_mfu_and_plan_count_the_same_flops(preset: str) -> None:
    config = compose([f"model={preset}", "model.tokenizer=unused"])
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(architecture_of(config.model))
    assert flops_per_token(module, config.model.sequence_length) == pytest.approx(
        planned_flops_per_token(shape_of(config.model)), rel=1e-9
    )


def test_a_checkpoint_of_hugging_face_is_taken_up_unchanged(site: Site, tmp_path: Path) -> None:
    _, model = built(site)
    model.save_pretrained(tmp_path / "parent")  # type: ignore[operator]
    config = compose(
        [
            *(text for text in site.overrides() if not text.startswith("model")),
            "model=hf",
            f"model.path={tmp_path / 'parent'}",
            f"model.sequence_length={SEQUENCE_LENGTH}",
        ]
    )
    taken = filled(config)
    assert len(blocks(taken)) == 2
    for mine, parent in zip(taken.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, parent)
    config.model.sequence_length = 4 * SEQUENCE_LENGTH
    with pytest.raises(ConfigError, match=r"model\.sequence_length=64: .* has 16 positions"):
        build_model(config, VOCABULARY, 0)


@pytest.mark.parametrize("harm", ["a weight is missing", "cut short", "no weights at all"])
def test_a_parent_that_is_not_whole_is_refused(site: Site, tmp_path: Path, harm: str) -> None:
    _, model = built(site, "model.tied_embeddings=false")
    parent = tmp_path / "parent"
    weights = model.state_dict()
    if harm == "a weight is missing":
        del weights["lm_head.weight"]
    model.save_pretrained(parent, state_dict=weights)  # type: ignore[operator]
    file = parent / "model.safetensors"
    if harm == "cut short":
        file.write_bytes(file.read_bytes()[:1000])
    if harm == "no weights at all":
        file.unlink()
    config = compose(
        [
            *(text for text in site.overrides() if not text.startswith("model")),
            "model=hf",
            f"model.path={parent}",
            f"model.sequence_length={SEQUENCE_LENGTH}",
        ]
    )
    with pytest.raises(ConfigError, match=f"^model.path={parent}: "):
        filled(config)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(site: Site) -> None:
    config = compose(site.overrides())
    with pytest.raises(ConfigError, match=r"model\.vocabulary=320: the tokenizer has 321 ids"):
        build_model(config, VOCABULARY + 1, 0)
