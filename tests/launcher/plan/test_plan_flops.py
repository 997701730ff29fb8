"""FLOPs follow published formulas, and what torch counts in real modules."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from configs.compose import compose
from configs.schema import Config
from launcher.plan.adapters import lora_parameters, low_rank_saving, trained_parameters
from launcher.plan.checkpoint_size import training_state_bytes, weights_bytes
from launcher.plan.flops import (
    flops_per_token,
    hardware_utilisation,
    hoffmann_flops,
    implied_rate,
    megatron_flops,
    petaflop_s_days,
    recomputed_flops_per_token,
    trained_flops_per_token,
    utilisation,
)
from launcher.plan.loss import bits_per_byte, bits_per_token, perplexity
from launcher.plan.pretrained import ConfigFile
from launcher.plan.published import catalogue, published
from launcher.plan.setup import Checkpointing
from launcher.plan.shape import Shape, gpt_like, llama_like, shape_from_config, shape_of
from trainer.model import prepared

ROWS, LENGTH = 2, 64
LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
GPT2 = {
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 8,
    "n_positions": 128,
    "vocab_size": 512,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
NEOX = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "head_dim")}
OPT = {key: value for key, value in NEOX.items() if key != "intermediate_size"} | {
    "ffn_dim": 384,
    "dropout": 0.0,
}
T5 = {"d_model": 128, "d_kv": 16, "d_ff": 384, "num_layers": 1, "num_heads": 8, "vocab_size": 512}
MIXTRAL = LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}


def shape(*overrides: str) -> Shape:
    return shape_of(compose(list(overrides)).model)


def tiny(kind: str, sizes: dict[str, Any]) -> Shape:
    config = AutoConfig.for_model(kind, **sizes).to_dict()
    return shape_from_config(kind, ConfigFile(kind, config), LENGTH)


@cache
def recomputing(checkpointing: Checkpointing) -> Config:
    return compose(["model.tokenizer=any", f"activation_checkpointing={checkpointing}"])


def counted_flops_per_token(
    kind: str, sizes: dict[str, Any], checkpointing: Checkpointing = "none", attention: str = "eager"
) -> float:
    """What torch's counter sees in one forward and backward; it does not see fused attention on a CPU."""
    config = AutoConfig.for_model(kind, **sizes, use_cache=False)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    # Grouped products of experts are not counted either.
    implementations = {"attn_implementation": attention, "experts_implementation": "eager"}
    module = auto.from_config(config, dtype=torch.float32, **implementations)
    module = prepared(module, recomputing(checkpointing))
    rows = torch.randint(1, 500, (ROWS, LENGTH))
    inputs = {"input_ids": rows} | ({"decoder_input_ids": rows} if config.is_encoder_decoder else {})
    with FlopCounterMode(display=False) as counter:
        module(**inputs).logits.sum().backward()
    tokens = rows.numel() * len(inputs)
    return float(counter.get_total_flops()) / tokens


def test_an_untied_model_multiplies_all_but_its_embedding() -> None:
    weights = 6_738_415_616 - 32000 * 4096
    assert flops_per_token(shape("model=llama-7b")) == 6 * weights + 12 * 32 * 4096 * 2048


def test_a_tied_table_counts_once_for_the_head_and_learned_positions_do_not() -> None:
    weights = 124_439_808 - 1024 * 768
    assert flops_per_token(shape("model=gpt2-124m")) == 6 * weights + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", LLAMA),
        ("qwen3", LLAMA),
        ("gemma2", LLAMA),
        ("phi3", LLAMA),
        ("gpt2", GPT2),
        ("gpt_neox", NEOX),
        ("opt", OPT),
        ("mixtral", MIXTRAL),
        ("t5", T5),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_planned_flops_are_those_that_torch_counts(kind: str, sizes: dict[str, Any]) -> None:
    """Within 1 %: norms and biases are weights, but no products."""
    assert flops_per_token(tiny(kind, sizes)) == pytest.approx(counted_flops_per_token(kind, sizes), rel=0.01)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", LLAMA),
        ("qwen3", LLAMA),
        ("phi3", LLAMA),
        ("glm", LLAMA),
        ("starcoder2", LLAMA | {"residual_dropout": 0.0, "embedding_dropout": 0.0}),
        ("gpt2", GPT2),
        ("gpt_neox", NEOX),
        ("opt", OPT),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_selective_checkpointing_repeats_the_products_that_torch_counts(
    kind: str, sizes: dict[str, Any]
) -> None:
    once = counted_flops_per_token(kind, sizes, attention="sdpa")
    repeated = counted_flops_per_token(kind, sizes, "selective", attention="sdpa") - once
    assert recomputed_flops_per_token(tiny(kind, sizes), "selective") == repeated


@pytest.mark.parametrize(
    ("kind", "sizes", "skipped"),
    [("gemma2", LLAMA, 0), ("mixtral", MIXTRAL, 0), ("llama", LLAMA, 2 * 2 * 384 * 128), ("t5", T5, 0)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_full_checkpointing_repeats_the_forward_pass_of_the_blocks(
    kind: str, sizes: dict[str, Any], skipped: int
) -> None:
    """torch skips the last product of a block whose output no gradient needs, which the convention counts."""
    repeated = counted_flops_per_token(kind, sizes, "full") - counted_flops_per_token(kind, sizes)
    planned = recomputed_flops_per_token(tiny(kind, sizes), "full")
    assert planned == pytest.approx(repeated + skipped, rel=0.01)


def test_full_checkpointing_costs_a_third_of_the_blocks() -> None:
    llama = shape("model=llama-7b")
    head = 6 * 32000 * 4096
    assert recomputed_flops_per_token(llama, "full") == pytest.approx(
        (flops_per_token(llama) - head) / 3, rel=1e-9
    )
    assert 0 < recomputed_flops_per_token(llama, "selective") < recomputed_flops_per_token(llama, "full")
    assert recomputed_flops_per_token(llama, "none") == 0


def test_all_experts_of_a_token_are_repeated_by_selective_checkpointing() -> None:
    sizes = {"layers": 4, "hidden": 128, "heads": 8, "ffn": 384, "vocabulary": 512, "sequence_length": 64}
    dense, mixture = llama_like(**sizes), llama_like(**sizes, experts=4, experts_per_token=2)
    more = recomputed_flops_per_token(mixture, "selective") - recomputed_flops_per_token(dense, "selective")
    assert more == 2 * 4 * 128 * 384 * (2 * 3 - 1)


def test_a_mixture_costs_its_active_parameters_only() -> None:
    mixtral = published("Mixtral-8x7B").shape(1)
    assert flops_per_token(mixtral) == pytest.approx(6 * (mixtral.parameters_active - 32000 * 4096), rel=1e-4)


def test_a_token_of_an_encoder_decoder_costs_three_flops_per_parameter() -> None:
    t5 = published("T5-11B").shape(1)
    assert flops_per_token(t5) == pytest.approx(3 * t5.parameters, rel=0.01)


def test_hoffmann_counts_each_component_with_and_without_tables() -> None:
    """By hand: one block of width 2 with one head, 3 tokens, 5 words."""
    model = gpt_like(layers=1, hidden=2, heads=1, vocabulary=5, sequence_length=3)
    attention = 2 * 3 * 3 * 2 * 2 + 2 * 3 * 3 * 2 + 3 * 3 * 3 + 2 * 3 * 3 * 2 + 2 * 3 * 2 * 2
    dense = 2 * 3 * (2 * 8 + 8 * 2)
    tables = 2 * (2 * 3 * 5 * 2)
    counted = hoffmann_flops(model)
    assert counted.blocks == 3 * (attention + dense)
    assert counted.all == 3 * (attention + dense + tables)


def test_megatron_counts_as_palm_does_up_to_norms_and_positions() -> None:
    model = published("Korthikanti-175B").shape()
    step = megatron_flops(model, rows=64)
    assert step == pytest.approx(flops_per_token(model) * 64 * 2048, rel=1e-3)
    assert step < megatron_flops(model, 64, "attention") < megatron_flops(model, 64, "full")


def test_an_unknown_recomputation_is_refused() -> None:
    with pytest.raises(ValueError, match="recompute=some: must be none, attention or full"):
        megatron_flops(published("GPT-3").shape(), 1, "some")


def test_korthikanti_s_step_time_is_their_mfu_and_hfu() -> None:
    """arXiv:2205.05198, table 5: 1T parameters, 71.49 s on 512 A100."""
    model = published("Korthikanti-1T").shape()
    assert utilisation(megatron_flops(model, 512), 71.49, 512, 312e12) == pytest.approx(0.563, rel=0.01)
    hardware = megatron_flops(model, 512, "attention")
    assert utilisation(hardware, 71.49, 512, 312e12) == pytest.approx(0.570, rel=0.01)


def test_repeating_a_whole_forward_pass_makes_hfu_four_thirds_of_mfu() -> None:
    assert hardware_utilisation(0.3, 6e9, 2e9) == pytest.approx(0.4)


def test_gpt3_took_3640_petaflop_s_days() -> None:
    assert petaflop_s_days(3.14e23) == pytest.approx(3640, rel=0.01)


def test_a_promise_beyond_the_peak_is_impossible() -> None:
    assert implied_rate(5.88e23, days=85, accelerators=4, peak_flops_per_second=7.5e15).possible is False
    promised = implied_rate(8.64e19, days=1, accelerators=2, peak_flops_per_second=1e15)
    assert promised == (0.5e15, True)


def test_frozen_weights_need_no_gradients_of_their_own() -> None:
    llama = shape("model=llama-7b")
    weights = 6_738_415_616 - 32000 * 4096
    assert trained_flops_per_token(llama, 1) == flops_per_token(llama)
    assert trained_flops_per_token(llama, 0) == flops_per_token(llama) - 2 * weights


def test_lora_on_gpt3_trains_its_published_number_of_weights() -> None:
    """Hu et al. 2021: 4.7 M with rank 1 on queries and values."""
    gpt3 = published("GPT-3").shape()
    assert lora_parameters(gpt3, 1) == 4 * 96 * 12288
    assert trained_parameters(gpt3, lora_rank=4) == 16 * 96 * 12288


def test_grouped_values_and_attention_to_an_encoder_have_adapters_of_their_size() -> None:
    llama = published("Llama-3-8B").shape()
    assert lora_parameters(llama, 8) == 32 * 8 * (2 * 4096 + 4096 + 1024)
    t5 = published("T5-Small").shape()
    assert lora_parameters(t5, 1) == (6 + 2 * 6) * 2 * (512 + 512)


def test_frozen_blocks_are_not_trained() -> None:
    llama = published("Llama-3-8B").shape()
    assert trained_parameters(llama) == llama.parameters
    assert trained_parameters(llama, frozen_blocks=2) == llama.parameters - 2 * llama.parameters_layer
    everything = trained_parameters(llama, frozen_blocks=99)
    assert everything == pytest.approx(llama.parameters_root, abs=llama.layers)


def test_a_low_rank_pair_saves_what_it_does_not_store() -> None:
    assert low_rank_saving(512, 64, 8) == pytest.approx(1 - (512 * 8 + 8 * 64) / (512 * 64))


def test_a_checkpoint_holds_weights_and_perhaps_what_training_goes_on_from() -> None:
    """BLOOM: 329 GiB of bf16 weights, 2.3 TB with the optimizer (BigScience)."""
    bloom = published("BLOOM").parameters
    assert weights_bytes(bloom, "bf16") / 2**30 == pytest.approx(329, rel=0.01)
    assert training_state_bytes(bloom, "bf16") == 14 * bloom
    assert training_state_bytes(bloom, "fp32") == 12 * bloom


def test_a_loss_is_told_in_the_units_that_people_know() -> None:
    assert perplexity(2.0) == pytest.approx(7.389056)
    assert bits_per_token(1.69) == pytest.approx(2.43815, rel=1e-5)
    assert bits_per_byte(1.69, 4) == bits_per_token(1.69) / 4


def test_longer_rows_cost_more_attention_and_nothing_else() -> None:
    short = published("LLaMA-7B").shape(1024)
    long = replace(short, sequence_length=2048)
    assert flops_per_token(long) - flops_per_token(short) == 12 * 32 * 4096 * 1024


def test_a_published_model_is_found_whatever_its_spelling() -> None:
    entry = published("Llama-3.1-405B")
    assert published("llama_3.1 405b") is entry
    assert published("BLOOM") is published("bloom-176B")
    with pytest.raises(KeyError):
        published("no such model")


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("Llama-3.1-405B", 405_853_388_800, 405_853_388_800),
        ("BLOOM-176B", 176_247_271_424, 176_247_271_424),
        ("BloombergGPT", 50_558_868_480, 50_558_868_480),
        ("GPT-NeoX-20B", 20_554_567_680, 20_554_567_680),
        ("Mixtral-8x7B", 46_702_792_704, 12_879_925_248),
        ("DeepSeek-V3", 671_026_404_352, 37_552_282_624),
        ("T5-11B", 11_307_321_344, 11_307_321_344 // 2),
        ("Pythia-12B", 11_846_072_320, 11_846_072_320),
    ],
)
def test_a_published_model_s_sizes_give_its_parameters(name: str, total: int, active: int) -> None:
    model = published(name).shape()
    assert (model.parameters, model.parameters_active) == (total, active)


NOT_OF_THESE_FAMILIES = {"Gopher 280B", "Chinchilla 70B"}
"""Their attention has one more matrix per block, for relative positions."""


def test_printed_parameters_agree_with_the_sizes_beside_them() -> None:
    for entry in catalogue():
        if entry.parameters_printed and entry.name not in NOT_OF_THESE_FAMILIES:
            assert entry.shape().parameters == pytest.approx(entry.parameters_printed, rel=0.06), entry.name


def test_a_plan_needs_nothing_but_config_json(tmp_path: Path) -> None:
    AutoConfig.for_model("mixtral", **MIXTRAL).save_pretrained(tmp_path)
    planned = shape("model=hf", f"model.path={tmp_path}", "model.sequence_length=64")
    assert planned.parameters == tiny("mixtral", MIXTRAL).parameters
