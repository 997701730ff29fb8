"""What a block keeps for its backward pass: the plan's bytes are those of the tensors that autograd saves."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import CONFIG_MAPPING as CONFIGS
from transformers import AutoModel, PreTrainedConfig

from launcher.plan.activations import (
    block_activation_bytes,
    final_norm_bytes,
    kept_by,
    logits_bytes,
)
from launcher.plan.pretrained import ConfigFile
from launcher.plan.setup import Setup
from launcher.plan.shape import Shape, llama_like, shape_from_config

ROWS, SEQUENCE = 3, 97
SIZES = {"hidden_size": 192, "intermediate_size": 416, "num_attention_heads": 6, "vocab_size": 2048}
GROUPED = SIZES | {"num_key_value_heads": 2, "pad_token_id": 0}
GPT = {"n_embd": 192, "n_inner": 416, "n_head": 6, "vocab_size": 2048}
NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
SPELLED_DIFFERENTLY = {"gpt2": "n_layer", "gptj": "n_layer", "bloom": "n_layer"}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED | {"head_dim": 40},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 40},
    "phi3": GROUPED,
    "gemma": GROUPED | {"head_dim": 40},
    "gemma2": GROUPED | {"head_dim": 40},
    "olmo2": GROUPED,
    "gpt2": GPT | NO_DROPOUT,
    "gptj": GPT | NO_DROPOUT | {"rotary_dim": 8},
    "gpt_neox": SIZES | {"attention_dropout": 0, "hidden_dropout": 0},
    "opt": {"hidden_size": 192, "ffn_dim": 416, "num_attention_heads": 6, "vocab_size": 2048, "dropout": 0}
    | {"word_embed_proj_dim": 192},
    "bloom": {"hidden_size": 192, "n_head": 6, "vocab_size": 2048, "hidden_dropout": 0}
    | {"attention_dropout": 0},
    "bert": SIZES | {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
}


MIXTURE = GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}


def config_of(family: str, layers: int) -> PreTrainedConfig:
    sizes = ARCHITECTURES.get(family, MIXTURE) | {
        SPELLED_DIFFERENTLY.get(family, "num_hidden_layers"): layers
    }
    config: PreTrainedConfig = CONFIGS[family](**sizes)
    return config


def kept_bytes(config: PreTrainedConfig, setup: Setup) -> int:
    """Bytes of the distinct tensors that autograd saves in a forward pass, weights and their casts apart."""
    model = AutoModel.from_config(config, dtype=torch.float32).train()
    if setup.compute == "bf16" and not setup.autocast:
        model.to(torch.bfloat16)
    shapes = {tuple(weight.shape) for weight in model.parameters()}
    shapes |= {(*shape[:-2], *shape[:-3:-1]) for shape in shapes}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in shapes:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    options = {} if config.model_type == "bert" else {"use_cache": False}
    with (
        saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", enabled=setup.autocast),
    ):
        model(input_ids=torch.zeros(ROWS, SEQUENCE, dtype=torch.long), **options)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


FP32 = Setup(strategy="fsdp", world_size=8, gpus_per_node=8, micro_batch=ROWS, compute="fp32")
BF16 = replace(FP32, compute="bf16")
AUTOCAST = replace(BF16, strategy="ddp")


CASES = [(family, setup) for family in ARCHITECTURES for setup in (FP32, BF16, AUTOCAST)]
"""CPUs have no grouped product in bf16."""


@pytest.mark.parametrize(
    ("family", "setup"),
    [*CASES, ("mixtral", FP32)],
    ids=lambda case: case if isinstance(case, str) else case.compute + " autocast" * case.autocast,
)
def test_a_block_keeps_what_autograd_saves(family: str, setup: Setup) -> None:
    saved = kept_bytes(config_of(family, 3), setup) - kept_bytes(config_of(family, 2), setup)
    values = config_of(family, 3).to_dict()
    shape = shape_from_config(family, ConfigFile(family, values), SEQUENCE)
    assert block_activation_bytes(shape, setup) == pytest.approx(saved, rel=0.015)


LLAMA_3_8B = llama_like(
    layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocabulary=128256, sequence_length=8192
)
T, H, F, KV = ROWS * 8192, 4096, 14336, 1024


def test_a_llama_that_repeats_keys_and_values_follows_the_closed_form() -> None:
    planned = block_activation_bytes(LLAMA_3_8B, replace(BF16, repeated_kv=True))
    assert planned == 2 * T * (8 * H + 4 * H + 4 * F) + 4 * T * 32


def test_one_kernel_for_the_norm_keeps_no_fp32_copies() -> None:
    planned = block_activation_bytes(LLAMA_3_8B, replace(BF16, repeated_kv=True, fused_norm=True))
    assert planned == 2 * T * (4 * H + 4 * H + 4 * F) + 4 * T * 32


def test_selective_checkpointing_keeps_attention_and_every_second_product() -> None:
    planned = block_activation_bytes(LLAMA_3_8B, replace(BF16, checkpointing="selective"))
    assert planned == 2 * T * (2 * H + 2 * H + KV + F) + 4 * T * 32


def test_fused_products_are_kept_whole_by_selective_checkpointing() -> None:
    fused = replace(LLAMA_3_8B, fused_qkv=True)
    planned = block_activation_bytes(fused, replace(BF16, checkpointing="selective"))
    assert planned == 2 * T * (H + (H + 2 * KV) + 2 * F + H) + 4 * T * 32


def test_full_checkpointing_keeps_the_input_of_a_block() -> None:
    assert block_activation_bytes(LLAMA_3_8B, replace(BF16, checkpointing="full")) == 2 * T * H


def test_compiling_keeps_less_and_so_does_freezing() -> None:
    eager = block_activation_bytes(LLAMA_3_8B, BF16)
    assert block_activation_bytes(LLAMA_3_8B, replace(BF16, compile=True)) < eager
    assert block_activation_bytes(LLAMA_3_8B, BF16, trained=False) < eager


def test_adapters_need_the_input_that_frozen_weights_do_not() -> None:
    frozen = kept_by(LLAMA_3_8B, BF16, trained=False)
    adapted = kept_by(LLAMA_3_8B, replace(BF16, lora_rank=8), trained=False)
    assert adapted.hidden == frozen.hidden + 1


def test_a_token_of_a_mixture_keeps_what_its_experts_see() -> None:
    def mixture(per_token: int) -> Shape:
        sizes: Any = {"layers": 4, "hidden": 512, "heads": 8, "ffn": 1024, "vocabulary": 100}
        return llama_like(**sizes, sequence_length=64, experts=8, experts_per_token=per_token)

    two, one = block_activation_bytes(mixture(2), BF16), block_activation_bytes(mixture(1), BF16)
    assert two - one == ROWS * 64 * 2 * (4 * 1024 + 2 * 512)


def test_parallelism_divides_tokens() -> None:
    full = replace(BF16, checkpointing="full")
    whole = block_activation_bytes(LLAMA_3_8B, full)
    assert block_activation_bytes(LLAMA_3_8B, replace(full, tensor_parallel=4)) == whole / 4
    assert block_activation_bytes(LLAMA_3_8B, replace(full, context_parallel=4)) == whole / 4


def test_tensor_parallelism_gathers_the_inputs_of_products() -> None:
    alone, split = (
        final_norm_bytes(LLAMA_3_8B, BF16),
        final_norm_bytes(LLAMA_3_8B, replace(BF16, tensor_parallel=8)),
    )
    assert split == alone / 8 + 7 / 8 * 4 * T * H


@pytest.mark.parametrize(("logits", "each"), [("fp32", 12), ("bf16", 6), ("chunked", 1.5)])
def test_logits_take_bytes_by_their_format(logits: Any, each: float) -> None:
    assert logits_bytes(LLAMA_3_8B, replace(BF16, logits=logits)) == each * T * 128256


def test_logits_of_a_model_in_fp32_are_fp32_whatever_is_asked() -> None:
    assert logits_bytes(LLAMA_3_8B, replace(FP32, logits="bf16")) == 12 * T * 128256


def test_recomputing_every_second_block_keeps_half_of_the_rest() -> None:
    shape = llama_like(layers=4, hidden=192, heads=6, ffn=416, vocabulary=2048, sequence_length=SEQUENCE)
    base = Setup("fsdp", 8, 8, 1)
    whole = block_activation_bytes(shape, base)
    full = block_activation_bytes(shape, replace(base, checkpointing="full"))
    second = block_activation_bytes(shape, replace(base, checkpointing="full", checkpointed_every=2))
    assert second == pytest.approx((whole + full) / 2)
