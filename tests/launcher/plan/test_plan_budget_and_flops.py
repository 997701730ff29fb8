"""Tokens, steps and FLOPs follow published formulas."""

import gzip
import math
from pathlib import Path

import pytest
from transformers import LlamaConfig

from configs.compose import compose
from configs.schema import ConfigError
from launcher.plan.budget import TokenBudget, token_budget
from launcher.plan.flops import flops_per_token, recomputed_flops_per_token
from launcher.plan.shape import Shape, shape_of


def shape(*overrides: str) -> Shape:
    return shape_of(compose(list(overrides)).model)


def budget(*overrides: str) -> TokenBudget:
    config = compose(list(overrides))
    return token_budget(shape_of(config.model), config)


def test_an_untied_model_multiplies_all_but_its_embedding() -> None:
    weights = 6_738_415_616 - 32000 * 4096
    assert flops_per_token(shape("model=llama-7b")) == 6 * weights + 12 * 32 * 4096 * 2048


def test_a_tied_table_counts_once_for_the_head_and_learned_positions_do_not() -> None:
    weights = 124_439_808 - 1024 * 768
    assert flops_per_token(shape("model=gpt2-124m")) == 6 * weights + 12 * 12 * 768 * 1024


def test_full_checkpointing_repeats_the_forward_pass_of_the_blocks() -> None:
    llama = shape("model=llama-7b")
    head = 6 * 32000 * 4096
    blocks = flops_per_token(llama) - head
    assert recomputed_flops_per_token(llama, "full") == pytest.approx(blocks / 3, rel=1e-4)
    assert 0 < recomputed_flops_per_token(llama, "selective") < recomputed_flops_per_token(llama, "full")
    assert recomputed_flops_per_token(llama, "none") == 0


def test_chinchilla_trains_twenty_tokens_per_parameter() -> None:
    planned = budget("model=llama-7b", "global_batch=2048")
    assert planned.tokens == 20 * 6_738_415_616
    assert planned.global_batch_tokens == 2048 * 2048
    assert planned.steps == math.ceil(planned.tokens / (2048 * 2048))
    assert planned.estimate is None


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (16 * 2048, 1), (16 * 2048 + 1, 2)])
def test_the_last_step_may_exceed_the_budget_but_no_step_is_missing(tokens: int, steps: int) -> None:
    assert budget("budget=tokens", f"budget.tokens={tokens}", "global_batch=16").steps == steps


def test_a_compute_budget_buys_c_over_6n_tokens() -> None:
    planned = budget("model=llama-7b", "budget=flops", "budget.flops=1e21")
    assert planned.tokens == pytest.approx(1e21 / 6 / 6_738_415_616)


@pytest.mark.parametrize(
    ("tokens_per_parameter", "verdict"),
    [
        (9.9, "under-trained"),
        (10.1, "balanced"),
        (20, "balanced"),
        (39.9, "balanced"),
        (40.1, "over-trained"),
    ],
)
def test_a_budget_is_judged_against_twenty_tokens_per_parameter(
    tokens_per_parameter: float, verdict: str
) -> None:
    assert budget(f"budget.tokens_per_parameter={tokens_per_parameter}").verdict == verdict


def test_continued_pretraining_is_not_judged_by_its_own_tokens_alone(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    assert budget("model=hf", f"model.path={tmp_path}").verdict == "continued"


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
