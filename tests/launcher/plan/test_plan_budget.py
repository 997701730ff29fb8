"""A budget becomes tokens and steps, is judged against a scaling law, and says what is contradictory."""

import dataclasses
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from configs.compose import compose
from configs.schema import ConfigError
from launcher.plan.budget import TokenBudget, over_training, token_budget, verdict_of
from launcher.plan.scaling import BESIROGLU, HOFFMANN, LAWS, Law
from launcher.plan.shape import shape_of

LLAMA_7B = 6_738_415_616


def budget(*overrides: str, tokens_per_gpu_hour: float | None = None) -> TokenBudget:
    config = compose(list(overrides))
    return token_budget(shape_of(config.model), config, tokens_per_gpu_hour)


def on_llama(*overrides: str, **speed: Any) -> TokenBudget:
    return budget("model=llama-7b", "hardware=h100-sxm-80gb", *overrides, **speed)


@pytest.fixture
def checkpoint(tmp_path: Path) -> list[str]:
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    return ["model=hf", f"model.path={tmp_path}"]


def test_chinchilla_trains_twenty_tokens_per_parameter() -> None:
    planned = on_llama("global_batch=2048")
    assert planned.tokens == 20 * LLAMA_7B
    assert planned.tokens_per_parameter == 20
    assert planned.over_training == 1
    assert planned.global_batch_tokens == 2048 * 2048
    assert planned.steps == math.ceil(planned.tokens / (2048 * 2048))
    assert planned.estimate is None
    assert planned.epochs is None


@pytest.mark.parametrize("law", [BESIROGLU, HOFFMANN])
def test_another_law_trains_its_optimal_tokens_for_this_model(law: Law) -> None:
    name = next(name for name, known in LAWS.items() if known is law)
    planned = on_llama(f"budget.law={name}")
    assert planned.tokens == round(law.optimal_tokens(LLAMA_7B))
    assert planned.verdict == "balanced"


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (16 * 2048, 1), (16 * 2048 + 1, 2)])
def test_the_last_step_may_exceed_the_budget_but_no_step_is_missing(tokens: int, steps: int) -> None:
    assert budget("budget=tokens", f"budget.tokens={tokens}", "global_batch=16").steps == steps


def test_a_compute_budget_buys_c_over_6n_tokens() -> None:
    planned = on_llama("budget=flops", "budget.flops=1e21")
    assert planned.tokens == pytest.approx(1e21 / 6 / LLAMA_7B)


def test_half_of_an_encoder_decoder_sees_a_token_so_compute_buys_twice_as_many() -> None:
    config = compose(["model=llama-7b", "budget=flops", "budget.flops=1e21"])
    shape = shape_of(config.model)
    both = dataclasses.replace(shape, encoder_layers=12, parameters_active=shape.parameters // 2)
    planned = token_budget(both, config)
    assert planned.tokens == pytest.approx(1e21 / 3 / LLAMA_7B)
    assert planned.parameters == LLAMA_7B
    assert planned.optimum["rule"].parameters == pytest.approx((1e21 / 3 / 20) ** 0.5, rel=1e-6)


def test_a_mixture_of_experts_counts_the_parameters_that_a_token_passes_through() -> None:
    config = compose(["model=llama-7b", "budget=flops", "budget.flops=1e21"])
    mixture = dataclasses.replace(shape_of(config.model), parameters_active=1_000_000_000)
    planned = token_budget(mixture, config)
    assert planned.tokens == pytest.approx(1e21 / 6e9)
    assert planned.tokens_per_parameter == pytest.approx(1e21 / 6e18)


def test_gpu_hours_buy_tokens_at_the_planned_speed() -> None:
    planned = on_llama("budget=gpu_hours", "budget.gpu_hours=1000", tokens_per_gpu_hour=4e7)
    assert planned.tokens == 40_000_000_000
    assert planned.estimate is not None


def test_days_are_gpu_hours_of_all_machines() -> None:
    planned = on_llama("budget=days", "budget.days=2", "nodes=2", "gpus_per_node=8", tokens_per_gpu_hour=1e7)
    assert planned.tokens == 2 * 24 * 16 * 10_000_000


def test_dollars_are_gpu_hours_at_the_hardware_s_price() -> None:
    planned = on_llama("budget=usd", "budget.usd=5000", "hardware.usd_per_hour=2.5", tokens_per_gpu_hour=1e7)
    assert planned.tokens == 20_000_000_000


def test_dollars_without_a_price_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^hardware\.usd_per_hour=null: budget=usd needs the price of h100"
    ):
        on_llama("budget=usd", "budget.usd=5000", "hardware.usd_per_hour=null", tokens_per_gpu_hour=1e7)


@pytest.mark.parametrize("kind", ["gpu_hours", "days", "usd"])
def test_time_and_money_without_a_speed_are_refused(kind: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^hardware\.peak_tflops\.bf16=null: budget={kind} needs the speed"
    ):
        budget(f"budget={kind}", f"budget.{kind}=5", "hardware=v100-sxm2-32gb", "hardware.usd_per_hour=2")


def test_what_contradicts_the_law_or_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^budget\.tokens_per_parameter=30: contradicts budget\.law=besir"):
        on_llama("budget.law=besiroglu", "budget.tokens_per_parameter=30")
    with pytest.raises(ConfigError, match=r"^budget\.parent_tokens=5: only with model=hf"):
        on_llama("budget.parent_tokens=5")


@pytest.mark.parametrize(
    ("model", "parameters", "tokens", "verdict"),
    [
        ("GPT-3", 175e9, 300e9, "under-trained"),
        ("OPT", 175e9, 180e9, "under-trained"),
        ("BLOOM", 176e9, 366e9, "under-trained"),
        ("BloombergGPT", 50.6e9, 569e9, "under-trained"),
        ("Chinchilla", 70e9, 1.4e12, "balanced"),
        ("LLaMA-65B", 65.2e9, 1.4e12, "balanced"),
        ("LLaMA-7B", 6.7e9, 1e12, "over-trained"),
        ("Llama-3.1-405B", 405e9, 15.6e12, "over-trained"),
    ],
)
def test_published_models_are_judged_as_in_the_chinchilla_table(
    model: str, parameters: float, tokens: float, verdict: str
) -> None:
    assert verdict_of(parameters, tokens) == verdict, model


@given(st.sampled_from(list(LAWS.values())), st.floats(1e6, 1e13), st.floats(1.11, 100))
def test_a_law_calls_its_own_optimum_balanced_and_much_less_or_more_not(
    law: Law, parameters: float, times: float
) -> None:
    tokens = law.optimal_tokens(parameters)
    assert verdict_of(parameters, tokens, law) == "balanced"
    assert verdict_of(parameters, tokens * times, law) == "over-trained"
    assert verdict_of(parameters, tokens / times, law) == "under-trained"


def test_over_training_counts_from_twenty_whatever_the_law() -> None:
    assert over_training(15e12, 8e9) == pytest.approx(93.75)
    planned = on_llama("budget.law=hoffmann")
    assert planned.over_training == pytest.approx(planned.tokens / 20 / LLAMA_7B)


def test_every_law_offers_the_model_and_tokens_that_this_compute_should_buy() -> None:
    planned = on_llama("budget=tokens", "budget.tokens=2_000_000_000_000")
    assert set(planned.optimum) == {"rule", "besiroglu", "hoffmann"}
    for optimum in planned.optimum.values():
        assert optimum.parameters * optimum.tokens == pytest.approx(LLAMA_7B * 2e12)
    assert planned.optimum["rule"].parameters > LLAMA_7B


def test_hoffmann_s_law_comes_with_a_warning() -> None:
    assert any("wants 42 tokens per parameter" in line for line in on_llama("budget.law=hoffmann").advice)
    assert on_llama("budget.law=besiroglu").advice == ()


def test_loss_is_estimated_by_both_parametric_laws() -> None:
    planned = on_llama("budget=tokens", "budget.tokens=1_000_000_000_000")
    assert planned.loss_nats == {
        "besiroglu": BESIROGLU.loss(LLAMA_7B, 1e12),
        "hoffmann": HOFFMANN.loss(LLAMA_7B, 1e12),
    }


@pytest.mark.parametrize(("epochs", "said"), [(0.5, None), (4, None), (8, "almost free"), (20, "train less")])
def test_repeats_beyond_four_epochs_are_warned_of_and_beyond_sixteen_advised_against(
    epochs: float, said: str | None
) -> None:
    unique = 100_000_000_000
    planned = on_llama(
        "budget=tokens", f"budget.tokens={round(epochs * unique)}", f"budget.unique_tokens={unique}"
    )
    assert planned.epochs == epochs
    assert [said in line for line in planned.advice if said] == ([True] if said else [])
    assert len(planned.advice) == (said is not None)
    assert (planned.effective_tokens < planned.tokens) == (epochs > 1)
    assert (planned.repetition_penalty > 0) == (epochs > 1)


def test_repeats_raise_the_estimated_loss() -> None:
    tokens = ["budget=tokens", "budget.tokens=1_000_000_000_000"]
    repeated, new = on_llama(*tokens, "budget.unique_tokens=50_000_000_000"), on_llama(*tokens)
    assert repeated.loss_nats["besiroglu"] > new.loss_nats["besiroglu"]
    ratio = repeated.loss_nats["besiroglu"] / new.loss_nats["besiroglu"]
    assert repeated.repetition_penalty == pytest.approx(ratio - 1)


def test_tokens_are_split_over_training_corpora_by_weight() -> None:
    planned = on_llama(
        "data=local",
        "data.corpora.law.train=law.jsonl",
        "data.corpora.law.weight=0.95",
        "data.corpora.replay.train=web.jsonl",
        "data.corpora.replay.weight=0.05",
        "data.corpora.held_out.validation=held.jsonl",
        "budget=tokens",
        "budget.tokens=300_000_000_000",
    )
    assert planned.tokens_by_corpus == {"law": 285_000_000_000, "replay": 15_000_000_000}


def test_an_architecture_without_weights_is_judged_like_a_model_of_ones_own(checkpoint: list[str]) -> None:
    Path(checkpoint[1].removeprefix("model.path="), "model.safetensors").unlink()
    planned = budget(*checkpoint, "hardware=h100-sxm-80gb", "budget=tokens", "budget.tokens=1000000")
    assert planned.verdict == "under-trained"


def test_continued_pretraining_is_not_judged_by_its_own_tokens_alone(checkpoint: list[str]) -> None:
    planned = budget(*checkpoint)
    assert planned.verdict == "continued"
    assert planned.continuation is None
    assert any("Warm the learning rate up" in line for line in planned.advice)


def test_continuing_is_compared_with_training_anew_on_both(checkpoint: list[str]) -> None:
    planned = budget(
        *checkpoint, "budget=tokens", "budget.tokens=100_000_000", "budget.parent_tokens=300_000_000"
    )
    assert planned.continuation is not None
    assert planned.continuation.cost_of_training_anew == 0.25
    assert planned.continuation.tokens_per_parameter == pytest.approx(4 * planned.tokens_per_parameter)


def test_a_budget_is_plain_json(checkpoint: list[str]) -> None:
    planned = budget(*checkpoint, "budget.parent_tokens=300_000_000", "budget.unique_tokens=1000")
    assert json.loads(json.dumps(dataclasses.asdict(planned)))["verdict"] == "continued"


def epochs(tmp_path: Path, epochs: float, *overrides: str) -> TokenBudget:
    return budget(
        "data=local",
        f"data.corpora.big.train={tmp_path}/big-*",
        "data.corpora.big.weight=3",
        f"data.corpora.small.train={tmp_path}/small.jsonl",
        "budget=epochs",
        f"budget.epochs={epochs}",
        *overrides,
    )


def test_epochs_are_estimated_from_file_sizes_of_the_heaviest_corpus_and_its_share(tmp_path: Path) -> None:
    (tmp_path / "big-1.jsonl").write_bytes(b"x" * 60_000)
    (tmp_path / "big-2.jsonl").write_bytes(b"x" * 40_000)
    (tmp_path / "small.jsonl").write_bytes(b"x" * 999)
    planned = epochs(tmp_path, 2)
    assert planned.tokens == round(2 * 100_000 * 0.24 / 0.75)
    assert planned.epochs == 2
    assert planned.effective_tokens < planned.tokens
    assert planned.estimate is not None
    assert "big" in planned.estimate
    assert "2 files" in planned.estimate


def test_a_compressed_byte_holds_more_tokens_than_a_plain_one(tmp_path: Path) -> None:
    file = tmp_path / "big-1.json.gz"
    file.write_bytes(gzip.compress(bytes(range(256)) * 50))
    (tmp_path / "small.jsonl").write_bytes(b"x")
    assert epochs(tmp_path, 1).tokens == round(file.stat().st_size * 0.74 / 0.75)


def test_epochs_of_a_corpus_without_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file") as error:
        epochs(tmp_path, 1)
    assert str(error.value).startswith("data.corpora.big.train=")
    assert "\n" not in str(error.value)


def test_epochs_at_an_unreadable_address_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data\.corpora\.a\.train=nothing://x: ") as error:
        budget("data=local", "data.corpora.a.train='nothing://x'", "budget=epochs", "budget.epochs=1")
    assert "\n" not in str(error.value)


def test_a_budget_beyond_all_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^budget=flops: comes to .* tokens, at most 1e\+18 are allowed$"):
        budget("model=llama-20m", "budget=flops", "budget.flops=1e32")
