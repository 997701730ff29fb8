"""Peak memory of a rank: what torch keeps, the closed forms, and how the configuration moves them."""

from collections.abc import Callable

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from configs.compose import compose
from launcher.plan.activations import block_activation_bytes
from launcher.plan.memory import Memory, memory
from launcher.plan.shape import shape_of

GIB = 2**30
ON_H100 = ("model=llama-7b", "hardware=h100-sxm-80gb", "micro_batch=1")
ON_64 = (*ON_H100, "sharding=fsdp", "nodes=8", "gpus_per_node=8", "global_batch=64")


def peak(*overrides: str) -> Memory:
    config = compose(list(overrides))
    return memory(shape_of(config.model), config, config.sharding.strategy)


def kept_bytes(model: torch.nn.Module, rows: int, sequence_length: int, autocast: bool) -> int:
    """Bytes of the distinct tensors that autograd saves in a forward pass, weights and their casts apart."""
    shapes = {tuple(weight.shape) for weight in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in shapes:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=autocast):
        model(input_ids=torch.zeros(rows, sequence_length, dtype=torch.long), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def llama(layers: int) -> torch.nn.Module:
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 2048}
    return LlamaModel(LlamaConfig(num_hidden_layers=layers, **sizes))


def gpt2(layers: int) -> torch.nn.Module:
    return GPT2Model(
        GPT2Config(
            n_layer=layers,
            n_embd=192,
            n_inner=512,
            n_head=4,
            vocab_size=2048,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    )


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("family", "module"), [("llama", llama), ("gpt2", gpt2)])
def test_a_block_keeps_what_autograd_saves(
    family: str, module: Callable[[int], torch.nn.Module], autocast: bool
) -> None:
    rows, sequence_length = 3, 112
    saved = kept_bytes(module(3), rows, sequence_length, autocast)
    saved -= kept_bytes(module(2), rows, sequence_length, autocast)
    config = compose(["model=llama-demo", "model.tokenizer=any", f"model.family={family}"])
    planned = block_activation_bytes(
        shape_of(config.model), rows * sequence_length, 2 if autocast else 4, "none", autocast
    )
    assert planned == pytest.approx(saved, rel=0.01)


def test_components_add_up_to_the_active_peak() -> None:
    for overrides in (ON_H100, ON_64, ("hardware=cpu",)):
        planned = peak(*overrides)
        assert sum(planned.components_gib.values()) == pytest.approx(planned.active_gib)


def test_fully_sharded_states_and_gathered_blocks_follow_the_closed_form() -> None:
    """Backward through the first block of 64 ranks, the peak of a small micro batch."""
    parameters, table, tokens, ranks = 6_738_415_616, 32000 * 4096, 2048, 64
    block = (parameters - 2 * table - 4096) // 32
    activations = 2 * tokens * (8 * 4096 + 4 * 4096 + 4 * 11008) + 4 * tokens * 32
    expected = 12 * parameters / ranks + 32 * activations + 10 * block + 4 * table
    assert peak(*ON_64).active_gib * GIB == pytest.approx(expected, rel=1e-4)


def test_a_large_vocabulary_moves_the_peak_to_the_loss() -> None:
    options = ("micro_batch=4", "global_batch=256", "activation_checkpointing=full")
    planned = peak(*ON_64, *options, "model.vocabulary=128256")
    assert planned.components_gib["logits"] * GIB == 12 * 4 * 2048 * 128256
    assert peak(*ON_64, *options).components_gib["logits"] == 0
    assert planned.components_gib["gradients"] == 0


def test_replicated_states_take_sixteen_bytes_per_parameter_and_two_of_casts() -> None:
    parts = peak(*ON_H100, "sharding=ddp", "activation_checkpointing=full").components_gib
    states = sum(parts[name] for name in ("weights", "gradients", "optimizer"))
    assert states * GIB == 16 * 6_738_415_616
    assert parts["working"] * GIB >= 2 * 6_738_415_616


def test_a_7b_model_does_not_fit_replicated_on_80_gb_and_fits_sharded_over_64() -> None:
    assert peak(*ON_H100).verdict == "does not fit"
    assert peak(*ON_64).verdict == "fits"


def test_accumulation_keeps_sharded_gradients_over_the_whole_step() -> None:
    added = peak(*ON_64, "global_batch=128").active_gib - peak(*ON_64).active_gib
    assert added * GIB == pytest.approx(4 * 6_738_415_616 / 64)


def test_keeping_gathered_weights_after_forward_costs_memory() -> None:
    assert peak(*ON_64, "sharding.reshard_after_forward=false").active_gib > peak(*ON_64).active_gib + 10


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_checkpointing_more_keeps_less(sharding: str) -> None:
    none, selective, full = (
        peak(*ON_H100, "micro_batch=8", f"sharding={sharding}", f"activation_checkpointing={kind}").active_gib
        for kind in ("none", "selective", "full")
    )
    assert none > selective > full


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_fp32_activations_are_larger(sharding: str) -> None:
    options = (*ON_H100, "micro_batch=8", f"sharding={sharding}")
    bf16, fp32 = (peak(*options, f"precision={kind}").components_gib for kind in ("bf16", "fp32"))
    assert fp32["activations"] > 1.3 * bf16["activations"]


def test_a_gpu_needs_more_than_its_active_bytes() -> None:
    planned = peak(*ON_64)
    assert planned.reserved_gib == pytest.approx(1.2 * planned.active_gib)
    assert planned.device_gib == pytest.approx(planned.reserved_gib + 2)
    assert planned.limit_gib == 79.1


def test_a_worker_on_cpu_has_its_share_of_this_machine_and_carries_the_runtime() -> None:
    alone, shared = peak("hardware=cpu"), peak("hardware=cpu", "gpus_per_node=4")
    assert alone.limit_gib == pytest.approx(4 * shared.limit_gib)
    assert alone.components_gib["runtime"] == 0.6
    assert alone.active_gib == alone.reserved_gib == alone.device_gib


@pytest.mark.parametrize(("share", "verdict"), [(0.89, "fits"), (0.91, "tight"), (1.01, "does not fit")])
def test_the_verdict_turns_at_ninety_and_one_hundred_percent(share: float, verdict: str) -> None:
    limit = peak(*ON_64).device_gib / share
    assert peak(*ON_64, f"hardware.memory_gib={limit}").verdict == verdict
