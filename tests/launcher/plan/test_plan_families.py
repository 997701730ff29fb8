"""Every architecture in the table has as many weights as its transformers module, switch by switch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
)

from configs.schema import ConfigError, Model
from launcher.plan.families import FAMILIES
from launcher.plan.shape import Shape, shape_of

# Widths that are not multiples of each other, so that a misplaced bias or norm changes the sum.
LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 301,
    "max_position_embeddings": 130,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 130, "vocab_size": 301}
BERT = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
NEO = {key: LLAMA[key] for key in ("hidden_size", "vocab_size", "max_position_embeddings")} | {
    "num_layers": 2,
    "num_heads": 6,
    "attention_types": [[["global", "local"], 1]],
}
OPT = {key: value for key, value in BERT.items() if key != "intermediate_size"} | {"ffn_dim": 100}
BLOOM = {"hidden_size": 48, "n_layer": 3, "n_head": 6, "vocab_size": 301}
FALCON = {key: BERT[key] for key in BERT if key not in ("intermediate_size", "pad_token_id")}
MPT = {"d_model": 48, "n_heads": 6, "n_layers": 3, "vocab_size": 301, "max_seq_len": 130}
T5 = {"d_model": 48, "d_kv": 10, "d_ff": 100, "num_layers": 3, "num_heads": 6, "vocab_size": 301}
MIXTRAL = {"num_local_experts": 5, "num_experts_per_tok": 2}
QWEN_MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 28}
QWEN2_MOE = QWEN_MOE | {"shared_expert_intermediate_size": 30}
DEEPSEEK = {
    "q_lora_rank": 14,
    "kv_lora_rank": 22,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 8,
    "v_head_dim": 10,
    "head_dim": 6,
    "num_key_value_heads": 6,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 28,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
BIASED = {"attention_bias": True}

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", LLAMA),
    ("llama", LLAMA | BIASED | {"mlp_bias": True, "head_dim": 10, "tie_word_embeddings": True}),
    ("mistral", LLAMA | {"head_dim": 10}),
    ("ministral", LLAMA | {"head_dim": 10}),
    ("qwen2", LLAMA),
    ("qwen3", LLAMA | {"head_dim": 10}),
    ("qwen3", LLAMA | BIASED | {"tie_word_embeddings": True}),
    ("phi3", LLAMA),
    ("gemma", LLAMA),
    ("gemma2", LLAMA | {"head_dim": 10}),
    ("gemma2", LLAMA | BIASED),
    ("gemma3_text", LLAMA | {"head_dim": 10}),
    ("olmo", LLAMA),
    ("olmo2", LLAMA | BIASED),
    ("olmo3", LLAMA),
    ("smollm3", LLAMA),
    ("granite", LLAMA | BIASED | {"mlp_bias": True}),
    ("arcee", LLAMA | {"head_dim": 8, "mlp_bias": True}),
    ("seed_oss", LLAMA | {"head_dim": 10}),
    ("seed_oss", LLAMA | {"attention_bias": False, "attention_out_bias": True}),
    ("helium", LLAMA | BIASED | {"head_dim": 8}),
    ("ernie4_5", LLAMA | {"use_bias": True, "head_dim": 10}),
    ("exaone4", LLAMA),
    ("glm", LLAMA | {"head_dim": 10}),
    ("glm4", LLAMA | {"attention_bias": False, "head_dim": 10}),
    ("cohere", LLAMA | {"use_qk_norm": True}),
    ("cohere", LLAMA | BIASED),
    ("cohere2", LLAMA),
    ("stablelm", LLAMA | {"use_qkv_bias": True, "qk_layernorm": True}),
    ("stablelm", LLAMA | {"use_parallel_residual": True}),
    ("starcoder2", LLAMA),
    ("starcoder2", LLAMA | {"use_bias": False}),
    ("phi", LLAMA),
    ("phi", LLAMA | {"qk_layernorm": True}),
    ("gpt2", GPT2),
    ("gpt2", GPT2 | {"n_inner": 100, "tie_word_embeddings": False}),
    ("gpt_bigcode", GPT2),
    ("gpt_bigcode", GPT2 | {"multi_query": False}),
    ("gpt_neo", NEO),
    ("gpt_neox", BERT),
    ("gpt_neox", BERT | {"attention_bias": False, "tie_word_embeddings": True}),
    ("gptj", GPT2 | {"rotary_dim": 4}),
    ("codegen", GPT2 | {"rotary_dim": 4, "n_head": 4}),
    ("opt", OPT),
    ("opt", OPT | {"word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    ("opt", OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("bloom", BLOOM),
    ("falcon", FALCON),
    ("falcon", FALCON | {"bias": True, "parallel_attn": False, "alibi": True}),
    ("falcon", FALCON | {"multi_query": False, "num_kv_heads": 6}),
    ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 100}),
    ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    ("mpt", MPT),
    ("mixtral", LLAMA | MIXTRAL),
    ("olmoe", LLAMA | {"num_experts": 5, "num_experts_per_tok": 2}),
    ("granitemoe", LLAMA | MIXTRAL),
    ("qwen2_moe", LLAMA | QWEN2_MOE),
    ("qwen2_moe", LLAMA | QWEN2_MOE | {"decoder_sparse_step": 2, "qkv_bias": False}),
    ("qwen3_moe", LLAMA | QWEN_MOE | {"mlp_only_layers": [1], "head_dim": 10}),
    ("gpt_oss", LLAMA | MIXTRAL | {"head_dim": 10}),
    ("deepseek_v2", LLAMA | DEEPSEEK),
    ("deepseek_v3", LLAMA | DEEPSEEK),
    ("deepseek_v3", LLAMA | DEEPSEEK | BIASED | {"q_lora_rank": None}),
    ("bert", BERT | {"type_vocab_size": 3}),
    ("roberta", BERT),
    ("xlm-roberta", BERT),
    ("camembert", BERT),
    ("t5", T5),
    ("t5", T5 | {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 2}),
    ("mt5", T5),
    ("umt5", T5),
]


def built(config: PreTrainedConfig) -> torch.nn.Module:
    encoder_only = config.model_type in ("bert", "roberta", "xlm-roberta", "camembert")
    auto = AutoModelForMaskedLM if encoder_only else AutoModelForCausalLM
    if config.is_encoder_decoder:
        auto = AutoModelForSeq2SeqLM
    with torch.device("meta"):
        module: torch.nn.Module = auto.from_config(config)
    return module


def counted(directory: Path) -> Shape:
    return shape_of(Model(family="hf", path=str(directory), sequence_length=128))


def weights(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def looked_up(module: torch.nn.Module) -> int:
    tables = [layer for layer in module.modules() if isinstance(layer, torch.nn.Embedding)]
    per_head = 6  # relative positions of T5 are in embeddings too
    unique = {id(layer.weight): layer.weight for layer in tables if layer.embedding_dim != per_head}
    return sum(weight.numel() for weight in unique.values())


@pytest.mark.parametrize(("kind", "sizes"), VARIANTS, ids=[kind for kind, _ in VARIANTS])
def test_a_known_architecture_is_counted_from_its_config_alone(
    kind: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    config = AutoConfig.for_model(kind, **sizes)
    config.save_pretrained(tmp_path)
    module, shape = built(config), counted(tmp_path)
    assert shape.parameters == weights(module)
    assert shape.parameters_embedding == looked_up(module)
    assert shape.family == kind


@pytest.mark.parametrize(("kind", "sizes"), VARIANTS, ids=[kind for kind, _ in VARIANTS])
def test_a_config_that_leaves_switches_out_means_what_transformers_makes_of_it(
    kind: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **sizes}))
    assert counted(tmp_path).parameters == weights(built(AutoConfig.from_pretrained(tmp_path)))


def test_every_architecture_in_the_table_is_compared_with_its_module() -> None:
    assert {kind for kind, _ in VARIANTS} == set(FAMILIES)


@pytest.mark.parametrize(
    ("kind", "sizes", "experts_per_block", "blocks"),
    [
        ("mixtral", LLAMA | MIXTRAL, 3 * 48 * 100, 3),
        ("qwen3_moe", LLAMA | QWEN_MOE | {"mlp_only_layers": [1]}, 3 * 48 * 28, 2),
        ("gpt_oss", LLAMA | MIXTRAL, 3 * 48 * 100 + 2 * 100 + 48, 3),
    ],
    ids=["mixtral", "qwen3_moe", "gpt_oss"],
)
def test_a_token_passes_the_experts_that_it_is_routed_to(
    kind: str, sizes: dict[str, Any], experts_per_block: int, blocks: int, tmp_path: Path
) -> None:
    AutoConfig.for_model(kind, **sizes).save_pretrained(tmp_path)
    shape = counted(tmp_path)
    assert shape.parameters - shape.parameters_active == blocks * (5 - 2) * experts_per_block
    assert (shape.experts, shape.experts_per_token) == (5, 2)


def test_shared_experts_are_passed_by_every_token(tmp_path: Path) -> None:
    AutoConfig.for_model("deepseek_v3", **(LLAMA | DEEPSEEK)).save_pretrained(tmp_path)
    shape = counted(tmp_path)
    assert shape.parameters - shape.parameters_active == 2 * (4 - 2) * 3 * 48 * 28
    assert shape.ffn_active == (2 + 2) * 28


def test_a_token_meets_half_of_an_encoder_decoder(tmp_path: Path) -> None:
    AutoConfig.for_model("t5", **T5).save_pretrained(tmp_path)
    shape = counted(tmp_path)
    assert shape.parameters_active == shape.parameters // 2
    assert (shape.layers, shape.encoder_layers) == (6, 3)


@pytest.mark.parametrize(
    ("written", "parameters"),
    [
        # Falcon-7B and BLOOM as first published, with the keys of their own code.
        (
            {
                "model_type": "falcon",
                "n_embed": 4544,
                "n_layer": 32,
                "n_head": 71,
                "multi_query": True,
                "parallel_attn": True,
                "bias": False,
                "vocab_size": 65024,
            },
            6_921_720_704,
        ),
        (
            {
                "model_type": "bloom",
                "n_embed": 14336,
                "n_layer": 70,
                "num_attention_heads": 112,
                "vocab_size": 250880,
            },
            176_247_271_424,
        ),
        (
            {
                "model_type": "t5",
                "d_model": 1024,
                "d_kv": 128,
                "d_ff": 65536,
                "num_layers": 24,
                "num_heads": 128,
                "n_positions": 64,  # written, but positions are relative
                "vocab_size": 32128,
            },
            11_307_321_344,
        ),
    ],
    ids=["falcon", "bloom", "t5"],
)
def test_old_spellings_of_sizes_are_read(written: dict[str, Any], parameters: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert counted(tmp_path).parameters == parameters


@pytest.mark.parametrize(
    ("kind", "sizes", "said"),
    [
        ("qwen3_moe", LLAMA | QWEN_MOE | {"mlp_only_layers": 3}, "mlp_only_layers=3, must be a list"),
        ("qwen3_moe", LLAMA | QWEN_MOE | {"mlp_only_layers": "012"}, "mlp_only_layers=012, must be a list"),
        ("qwen3_moe", LLAMA | QWEN_MOE | {"mlp_only_layers": [True]}, "mlp_only_layers=[True], must be"),
        (
            "qwen3_moe",
            LLAMA | QWEN_MOE | {"num_experts_per_tok": 6},
            "num_experts_per_tok=6, must be at most",
        ),
        ("mixtral", LLAMA | MIXTRAL | {"num_experts_per_tok": 6}, "num_experts_per_tok=6, must be at most"),
        ("deepseek_v3", LLAMA | DEEPSEEK | {"num_experts_per_tok": 5}, "num_experts_per_tok=5, must be at"),
        ("deepseek_v3", LLAMA | DEEPSEEK | {"first_k_dense_replace": 4}, "first_k_dense_replace=4, must be"),
        ("llama", LLAMA | {"num_key_value_heads": 12}, "num_key_value_heads=12, must divide the 6 heads"),
        ("llama", LLAMA | {"num_key_value_heads": 4}, "num_key_value_heads=4, must divide the 6 heads"),
        (
            "falcon",
            FALCON | {"new_decoder_architecture": True, "num_kv_heads": 4},
            "num_kv_heads=4, must divide the 6 heads",
        ),
        (
            "llama",
            LLAMA | {"tie_word_embeddings": "false"},
            "tie_word_embeddings=false, must be true or false",
        ),
        ("llama", LLAMA | {"attention_bias": [0]}, "attention_bias=[0], must be true or false"),
        ("llama", LLAMA | {"hidden_size": 48.0}, "hidden_size=48.0, must be a whole number from 1"),
        ("gpt2", GPT2 | {"n_embd": -1}, "n_embd=-1, must be a whole number from 1"),
        ("llama", LLAMA | {"vocab_size": "9" * 999}, f"vocab_size={'9' * 60}..., must be a whole number"),
    ],
)
def test_a_config_that_no_module_could_be_built_from_is_refused_by_its_key(
    kind: str, sizes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **sizes}))
    with pytest.raises(ConfigError) as refused:
        counted(tmp_path)
    assert str(refused.value).startswith(f"model.path={tmp_path}: config.json has {said}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "sizes", "ignored"),
    [
        ("gpt2", GPT2, {"num_key_value_heads": 4}),
        ("t5", T5, {"num_key_value_heads": 4}),
        ("deepseek_v3", LLAMA | DEEPSEEK, {"num_key_value_heads": 128}),
    ],
    ids=["gpt2", "t5", "deepseek"],
)
def test_key_value_heads_that_an_architecture_has_not_are_ignored(
    kind: str, sizes: dict[str, Any], ignored: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **sizes}))
    plain = counted(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **sizes, **ignored}))
    assert counted(tmp_path) == plain


def test_mixtures_are_counted_as_fast_in_any_number_of_blocks(tmp_path: Path) -> None:
    sizes = LLAMA | QWEN_MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [1, 1, 2, 2**31]}
    parameters = []
    for layers in (4, 2**31 - 4):
        sizes["num_hidden_layers"] = layers
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **sizes}))
        parameters.append(counted(tmp_path).parameters)
    assert parameters[0] == weights(
        built(AutoConfig.for_model("qwen3_moe", **sizes | {"num_hidden_layers": 4}))
    )
    assert parameters[1] > 2**28 * parameters[0]
