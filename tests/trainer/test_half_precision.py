"""fp16: steps whose gradients overflow change nothing, are told, and are few."""

from __future__ import annotations

import json

from support import Site, event_names, metrics

from cluster import events

STEPS = 32


def test_overflowing_steps_are_skipped_until_the_scale_fits(site: Site) -> None:
    run = site.root / "run"
    fp16 = ["precision=fp16", f"precision.loss_scale={2**32}", "gpus_per_node=2", "sharding=fsdp"]
    finished = site.trainyard("train", *site.overrides(STEPS), *fp16)
    assert finished.returncode == 0, finished.stderr
    skipped = [event for event in events.read(run / "events.jsonl") if event["event"] == "step_skipped"]
    assert skipped
    assert [event["step"] for event in skipped] == list(range(1, len(skipped) + 1))
    assert [event["loss_scale"] for event in skipped] == [2.0 ** (31 - n) for n in range(len(skipped))]
    norms = [row["grad_norm"] for row in metrics(run)]
    assert norms[: len(skipped)] == [None] * len(skipped)
    assert all(norm > 0 for norm in norms[len(skipped) :])
    losses = [row["loss"] for row in metrics(run)]
    assert losses[-1] < losses[0]
    state = json.loads((run / "checkpoints" / "latest" / "state.json").read_text())
    assert state["progress"]["updates"] == STEPS - len(skipped)
    assert state["progress"]["loss_scale"] == skipped[-1]["loss_scale"]


def test_gradients_that_overflow_without_a_scale_end_the_run(site: Site) -> None:
    wild = ["optimizer.lr=1e30", "optimizer.clip_norm=1e30", "schedule.warmup_fraction=0"]
    fp16 = ["precision=fp16", "precision.loss_scale=1", "cluster.restarts=0", "log_every_steps=100"]
    finished = site.trainyard("train", *site.overrides(STEPS), *wild, *fp16)
    assert finished.returncode not in (0, 2, 75)
    assert "diverged" in event_names(site.root / "run")
    assert "loss_scale is 0.5" in finished.stderr
