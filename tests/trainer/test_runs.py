"""Whole runs: what the choices of a user do to the losses, and what comes out at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import SEQUENCE_LENGTH, Site, event_names, metrics
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster import events


def losses(site: Site, name: str, *overrides: str) -> list[float]:
    run = site.root / name
    finished = site.trainyard("train", *site.overrides(), f"run.directory={run}", *overrides)
    assert finished.returncode == 0, finished.stderr
    return [row["loss"] for row in metrics(run)]


def evaluations(run: Path) -> list[dict[str, float]]:
    rows = events.read(run / "metrics.jsonl")
    return [
        {key: value for key, value in row.items() if key.startswith("eval/")}
        for row in rows
        if "loss" not in row
    ]


def test_accumulation_does_not_change_the_losses(site: Site) -> None:
    at_once = losses(site, "at-once", "micro_batch=8")
    assert losses(site, "in-parts", "micro_batch=1", "gpus_per_node=2") == pytest.approx(at_once, rel=1e-5)
    assert losses(site, "sharded", "micro_batch=1", "gpus_per_node=2", "sharding=fsdp") == pytest.approx(
        at_once, rel=1e-5
    )


def test_bf16_follows_fp32_within_one_percent(site: Site) -> None:
    exact = losses(site, "fp32")
    for strategy in ("ddp", "fsdp"):
        rounded = losses(site, strategy, "precision=bf16", f"sharding={strategy}", "gpus_per_node=2")
        assert rounded == pytest.approx(exact, rel=1e-2)
        assert rounded != exact


def test_a_run_ends_as_a_hugging_face_model_that_the_next_run_continues(site: Site) -> None:
    base = site.root / "base"
    losses(site, "base", "run.export=true", "gpus_per_node=2", "sharding=fsdp")
    assert event_names(base)[-2:] == ["exported", "ended"]

    exported = AutoModelForCausalLM.from_pretrained(base / "export", dtype=torch.float32)
    dcp_to_torch_save(base / "checkpoints" / "latest", site.root / "base.pt")
    trained = torch.load(site.root / "base.pt", weights_only=True)
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, trained[f"weight/{name}"])
    assert AutoTokenizer.from_pretrained(base / "export").eos_token == "<|endoftext|>"

    precious = site.root / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    assert site.trainyard("export", str(base), "--to", str(precious)).returncode == 2
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]

    without_model = [text for text in site.overrides() if not text.startswith("model")]
    continued = site.root / "continued"
    finished = site.trainyard(
        "train",
        *without_model,
        "model=hf",
        f"model.path={base / 'export'}",
        f"model.sequence_length={SEQUENCE_LENGTH}",
        f"run.directory={continued}",
    )
    assert finished.returncode == 0, finished.stderr
    assert evaluations(continued)[0] == pytest.approx(evaluations(base)[-1], rel=1e-6)


def test_an_epoch_budget_reads_the_corpus_once(site: Site) -> None:
    overrides = [text for text in site.overrides() if not text.startswith(("budget", "data.corpora.legal"))]
    run = site.root / "run"
    finished = site.trainyard("train", *overrides, "budget=epochs", "budget.epochs=1")
    assert finished.returncode == 0, finished.stderr
    counted = int((run / "epoch-tokens").read_text())
    tokenizer = AutoTokenizer.from_pretrained(site.root / "tokenizer")
    from support import sentences

    texts = [*sentences(200), *sentences(200, 1000)]
    assert counted == sum(len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False).input_ids)
    assert metrics(run)[-1]["step"] == -(-counted // (8 * SEQUENCE_LENGTH))


def test_a_diverged_run_keeps_its_last_good_checkpoint_and_gives_up(site: Site) -> None:
    run = site.root / "run"
    finished = site.trainyard(
        "train",
        *site.overrides(steps=40),
        "optimizer.lr=1e30",
        "optimizer.clip_norm=1e30",
        "schedule.warmup_fraction=0",
        "checkpoint.every_steps=1",
        "cluster.restarts=1",
    )
    assert finished.returncode == 77
    assert "diverged" in event_names(run)
    assert "is nan" in finished.stderr or "is inf" in finished.stderr
    for row in metrics(run):
        assert row["loss"] == row["loss"]
