"""The reference: a plain single-process loop, written here without any trainer code.

It reads one file in order, packs it, and trains with torch's own AdamW. `trainyard train` on any
number of processes and with any strategy must follow its losses.
"""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from support import SEQUENCE_LENGTH, VOCABULARY, Site, metrics
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

STEPS, GLOBAL_BATCH, SEED, PEAK = 20, 8, 3, 1e-2
TOLERANCE = 1e-5


def plain_rows(shard: Path, tokenizer_file: Path) -> torch.Tensor:
    """[rows, SEQUENCE_LENGTH + 1]: documents in file order, each ended by id 0, rows overlapping by one."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    ids: list[int] = []
    with gzip.open(shard, "rt") as lines:
        for line in lines:
            ids += [*tokenizer.encode(json.loads(line)["text"]).ids, 0]
    starts = range(0, STEPS * GLOBAL_BATCH * SEQUENCE_LENGTH, SEQUENCE_LENGTH)
    return torch.tensor([ids[start : start + SEQUENCE_LENGTH + 1] for start in starts])


def plain_losses(rows: torch.Tensor) -> list[float]:
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=SEQUENCE_LENGTH,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
    )
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    losses = []
    for step in range(STEPS):
        batch = rows[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]
        logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warmup = math.ceil(0.1 * STEPS)
        progress = (step + 1 - warmup) / (STEPS - warmup)
        falling = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = PEAK * ((step + 1) / warmup if step < warmup else falling)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp_grad_op"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_losses_follow_a_plain_loop(site: Site, strategy: str, world_size: int) -> None:
    shard = site.root / "general" / "train.00000.json.gz"
    overrides = [
        text for text in site.overrides(STEPS, GLOBAL_BATCH) if not text.startswith("data.corpora.legal")
    ]
    finished = site.trainyard(
        "train",
        *overrides,
        f"data.corpora.general.train={shard}",
        "data.lanes=1",
        "data.shuffle_window=1",
        "schedule.warmup_fraction=0.1",
        f"seed={SEED}",
        f"sharding={strategy}",
        f"gpus_per_node={world_size}",
        f"micro_batch={2 if world_size < 4 else 1}",
    )
    assert finished.returncode == 0, finished.stderr
    expected = plain_losses(plain_rows(shard, site.root / "tokenizer" / "tokenizer.json"))
    assert [row["loss"] for row in metrics(site.root / "run")] == pytest.approx(expected, rel=TOLERANCE)
