"""The plan is one JSON object, quickly, without torch; a plan that cannot fit is refused."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.compose import ROOT, compose
from configs.schema import ConfigError
from launcher.plan.plan import make_plan, refusal
from launcher.plan.runnable import why_not
from launcher.plan.setup import STRATEGIES
from launcher.plan.table import render, render_explained
from launcher.words import short

ON_H100 = [
    "model=llama-7b",
    "hardware=h100-sxm-80gb",
    "sharding=fsdp",
    "nodes=8",
    "gpus_per_node=8",
    "micro_batch=4",
]
CONTRACT: dict[str, set[str]] = {
    "model": {"name", "parameters", "parameters_active", "parameters_embedding", "layers", "hidden", "heads"}
    | {"kv_heads", "ffn", "vocabulary", "sequence_length"},
    "budget": {"tokens", "tokens_per_parameter", "steps", "global_batch_tokens", "epochs", "verdict"},
    "compute": {"flops", "flops_per_token", "recomputed_flops_per_token", "petaflop_s_days"},
    "memory": {"strategy", "components_gib", "active_gib", "reserved_gib", "device_gib", "limit_gib"}
    | {"verdict", "by_strategy"},
    "time": {"step_seconds", "tokens_per_second", "mfu", "days", "bound_by"},
    "cost": {"gpu_hours", "usd", "kwh", "kg_co2"},
    "checkpoint": {"size_gib", "interval_minutes", "expected_goodput"},
}
"""What programs may rely on; a plan has more."""


def plan(*overrides: str) -> dict[str, Any]:
    return make_plan(compose(list(overrides)))


def refused(*overrides: str) -> str | None:
    config = compose(list(overrides))
    return refusal(make_plan(config), config)


@pytest.mark.parametrize("overrides", [ON_H100, ["hardware=cpu"], ["hardware=v100-sxm2-32gb"]])
def test_a_plan_is_json_with_every_key_of_the_contract(overrides: list[str]) -> None:
    made = plan(*overrides)
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    for section, keys in CONTRACT.items():
        assert keys <= set(made[section]), section
    assert set(made["memory"]["by_strategy"]) == set(STRATEGIES)
    for peak in made["memory"]["by_strategy"].values():
        assert {"active_gib", "reserved_gib", "verdict"} <= set(peak)
    assert isinstance(made["advice"], list)
    assert all(isinstance(sentence, str) for sentence in made["assumptions"].values())


def test_the_chosen_strategy_is_the_one_reported() -> None:
    memory = plan(*ON_H100)["memory"]
    assert memory["strategy"] == "fsdp"
    assert memory["reserved_gib"] == memory["by_strategy"]["fsdp"]["reserved_gib"]
    assert memory["by_strategy"]["ddp"]["active_gib"] > 3 * memory["by_strategy"]["fsdp"]["active_gib"]


def test_total_compute_and_time_follow_from_flops_per_token() -> None:
    made = plan(*ON_H100)
    compute, budget, pace = made["compute"], made["budget"], made["time"]
    assert compute["flops"] == compute["flops_per_token"] * budget["tokens"]
    assert compute["petaflop_s_days"] == pytest.approx(compute["flops"] / 8.64e19)
    productive = 0.85 * made["checkpoint"]["expected_goodput"]
    assert pace["seconds"] == pytest.approx(pace["step_seconds"] * budget["steps"] / productive)
    assert pace["days"] == pytest.approx(pace["seconds"] / 86400)
    assert pace["tokens_per_second"] == pytest.approx(budget["global_batch_tokens"] / pace["step_seconds"])
    spent = compute["flops_per_token"] * pace["tokens_per_second"]
    assert pace["mfu"] == pytest.approx(spent / (64 * 989.5e12))
    assert made["cost"]["gpu_hours"] == pytest.approx(pace["days"] * 24 * 64)


def test_recomputation_takes_time_but_counts_in_neither_flops_nor_mfu() -> None:
    kept = plan(*ON_H100)
    repeated = plan(*ON_H100, "activation_checkpointing=full")
    assert repeated["compute"]["flops"] == kept["compute"]["flops"]
    assert 1.25 < repeated["time"]["step_seconds"] / kept["time"]["step_seconds"] < 1.34
    assert repeated["time"]["mfu"] * repeated["time"]["step_seconds"] == pytest.approx(
        kept["time"]["mfu"] * kept["time"]["step_seconds"]
    )


def test_an_unknown_peak_gives_no_time_rather_than_a_guess() -> None:
    made = plan("hardware=v100-sxm2-32gb", "precision=bf16")
    assert set(made["time"].values()) == {None}
    assert made["cost"]["usd"] is None
    assert "hardware.peak_tflops.bf16" in made["assumptions"]["time"]
    assert plan("hardware=v100-sxm2-32gb", "precision=fp32")["time"]["days"] > 0


def test_on_cpu_the_machine_is_timed_and_shared_among_its_workers() -> None:
    alone, shared = plan("hardware=cpu"), plan("hardware=cpu", "gpus_per_node=4")
    assert alone["time"]["mfu"] is None
    assert alone["time"]["step_seconds"] == pytest.approx(shared["time"]["step_seconds"])
    assert "timed on this machine" in alone["assumptions"]["time"]


def test_a_checkpoint_holds_twelve_bytes_per_parameter() -> None:
    assert plan("model=llama-7b")["checkpoint"]["size_gib"] == pytest.approx(12 * 6_738_415_616 / 2**30)


def test_what_does_not_fit_is_refused_in_one_line_that_says_what_to_type() -> None:
    options = ("model=llama-7b", "hardware=h100-sxm-80gb", "gpus_per_node=8", "sharding=fsdp")
    line = refused(*options, "micro_batch=32")
    assert line is not None
    assert "\n" not in line
    assert line.startswith("micro_batch=32: needs ")
    assert "GiB per rank, there are 79.1; fits: sharding=" in line
    assert line.endswith("; or plan.force=true")
    typed = line.split("fits: ")[1].removesuffix("; or plan.force=true").split()
    assert refused(*options, *typed) is None


def test_where_nothing_fits_the_line_names_how_many_gpus_would_do() -> None:
    small = ["model=llama-65b", "hardware=h100-sxm-80gb", "hardware.host_memory_gib=500"]
    line = refused(*small, "micro_batch=1", "sharding=fsdp")
    assert line is not None
    typed = ["sharding=fsdp", "micro_batch=1", "activation_checkpointing=full"]
    gpus, *words = line.split("fits on ")[1].removesuffix("; or plan.force=true").split()
    assert words == ["with", *typed]
    enough = [*small, f"nodes={gpus}", *typed]
    assert refused(*enough) is None


def test_a_deadline_above_the_peak_is_refused_with_what_would_do() -> None:
    line = refused(*ON_H100, "micro_batch=1", "plan.deadline_days=0.1")
    assert line is not None
    assert line.startswith("plan.deadline_days=0.1: implies ")
    assert "above the peak of 990" in line
    assert refused(*ON_H100, "micro_batch=1", "plan.deadline_days=30") is None


def test_ranks_that_do_not_divide_are_refused_with_the_nearest_batch() -> None:
    for sharding in ("fsdp", "auto"):
        with pytest.raises(ConfigError, match=r"^global_batch=100: must be a multiple of .*for example \d+$"):
            plan(*ON_H100, f"sharding={sharding}", "global_batch=100")


@pytest.mark.parametrize(
    "override",
    [
        "precision.compute=fp8",
        "precision.weights=bf16",
        "optimizer.kind=adamw_8bit",
        "objective.logits=chunked",
        "plan.tensor_parallel=2",
    ],
)
def test_what_is_planned_but_not_trained_is_named(override: str) -> None:
    config = compose([*ON_H100, "micro_batch=1", override])
    assert make_plan(config)["memory"]["active_gib"] > 0
    line = why_not(config)
    assert line is not None
    assert "can be planned but not trained yet" in line
    assert why_not(compose(ON_H100)) is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["hardware=v100-sxm2-32gb", "precision=bf16"],
            "precision.compute=bf16: Tesla V100-SXM2-32GB has no units for it, choose fp32 or fp16",
        ),
        (
            ["hardware=cpu", "sharding=zero3", "sharding.quantized_weights=true"],
            "sharding.quantized_weights=true: needs GPUs, choose false",
        ),
        (
            ["sharding=zero3", "compile=true"],
            "compile=true: not with sharding=zero3, whose hooks are compiled anew each time; use fsdp",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_what_can(overrides: list[str], said: str) -> None:
    assert why_not(compose(overrides)) == said


def test_what_fits_or_is_forced_is_not_refused() -> None:
    assert refused(*ON_H100, "micro_batch=1") is None
    assert refused("model=llama-7b", "hardware=h100-sxm-80gb", "plan.force=true") is None


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from launcher.cli import run\n"
        "run(['plan', 'hardware=cpu'])\n"
        "print(*{'torch', 'transformers', 'jax', 'matplotlib'} & set(sys.modules), file=sys.stderr)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True)
    assert ran.returncode == 0
    assert ran.stderr.strip() == ""


@pytest.mark.parametrize(
    "overrides", [ON_H100, ["hardware=cpu"], ["hardware=v100-sxm2-32gb", "model=gpt2-124m"]]
)
def test_the_table_tells_people_the_essentials(overrides: list[str]) -> None:
    made = plan(*overrides)
    screen = io.StringIO()
    Console(file=screen, width=200).print(render(made))
    for text in (
        made["model"]["name"],
        short(made["model"]["parameters"]),
        made["memory"]["verdict"],
        made["budget"]["verdict"],
        made["world"]["hardware"],
    ):
        assert text in screen.getvalue()


def test_a_directory_cannot_speak_to_the_terminal_through_its_name(tmp_path: Path) -> None:
    directory = tmp_path / "model\x1b[31m"
    directory.mkdir()
    sizes = {
        "model_type": "gpt2",
        "n_layer": 2,
        "n_embd": 64,
        "n_head": 4,
        "vocab_size": 320,
        "n_positions": 64,
    }
    (directory / "config.json").write_text(json.dumps(sizes))
    made = plan("model=hf", f"model.path='{directory}'", "model.sequence_length=64")
    screen = io.StringIO()
    Console(file=screen, width=200).print(render(made), render_explained(made))
    assert "model[31m" in screen.getvalue()
    assert "\x1b" not in screen.getvalue()
