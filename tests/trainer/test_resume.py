"""A run that is interrupted ends exactly as one that is not: same losses, same weights, bit for bit.

Through the command line, as a user sees it; test_resume_matrix.py does it for every strategy.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import saved_tensors
from support import Site, event_names, metrics

STEPS = 8
PACKED = [
    "data.packing=best_fit",
    "objective.mask_documents=true",
    "data.stages=[{until_tokens:512,weights:{legal:3,general:1}},{weights:{general:1}}]",
    "data.temperature=2",
    "data.decontaminate=ngram",
]


def deterministic(run: Path) -> list[tuple[float, ...]]:
    keys = ("step", "tokens", "loss", "lr", "grad_norm")
    return [tuple(row[key] for key in keys) for row in metrics(run)]


@pytest.mark.parametrize(
    ("strategy", "world_size", "extra"),
    [
        # Four ranks sum in an order that depends on DDP's buckets; dropout depends on random numbers.
        ("ddp", 4, ["sharding.bucket_mib=0.02", "micro_batch=1"]),
        ("ddp", 2, ["model.family=gpt2", "model.dropout=0.1", *PACKED]),
    ],
)
def test_two_interruptions_leave_no_trace(
    site: Site, strategy: str, world_size: int, extra: list[str]
) -> None:
    overrides = [*site.overrides(STEPS), f"sharding={strategy}", f"gpus_per_node={world_size}", *extra]
    whole, parts = site.root / "whole", site.root / "parts"
    assert site.trainyard("train", *overrides, f"run.directory={whole}").returncode == 0

    # A checkpoint at every third step; the run is then put back to it, as after a lost node.
    cadence = ["checkpoint.every_steps=3", "checkpoint.keep_last=9"]
    assert site.trainyard("train", *overrides, *cadence, f"run.directory={parts}").returncode == 0
    for step in (3, 6):
        for name in ("step-00000006", "step-00000008"):
            path = parts / "checkpoints" / name
            if path.exists() and int(name.removeprefix("step-")) > step:
                path.rename(path.with_name(f"gone-{step}-{name}"))
        latest = parts / "checkpoints" / "latest"
        latest.unlink()
        latest.symlink_to(f"step-{step:08d}")
        assert site.trainyard("resume", str(parts)).returncode == 0
        assert deterministic(parts) == deterministic(whole)

    expected, actual = (saved_tensors(run / "checkpoints" / "latest") for run in (whole, parts))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_sigterm_saves_stops_and_resumes_bit_exactly(site: Site) -> None:
    overrides = [*site.overrides(60), "gpus_per_node=2"]
    whole, stopped = site.root / "whole", site.root / "stopped"
    assert site.trainyard("train", *overrides, f"run.directory={whole}").returncode == 0

    process = site.start("train", *overrides, f"run.directory={stopped}")
    while len(metrics(stopped)) < 4 and process.poll() is None:
        pass
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert event_names(stopped)[-4:] == ["signal", "checkpoint", "stopped", "ended"]
    assert 4 <= metrics(stopped)[-1]["step"] < 60

    assert site.trainyard("resume", str(stopped)).returncode == 0
    assert deterministic(stopped) == deterministic(whole)
