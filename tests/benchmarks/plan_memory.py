"""The plan's memory against that of real runs on this machine: planned GiB, measured resident peak.

    python tests/benchmarks/plan_memory.py

Not a test: it takes minutes and the memory of the models. Each run is done twice, the second time with a C
library that gives freed memory back at once, which is what a plan counts. Prints one row per run.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import Site, metrics

STEPS = 2
RUNS = (
    "model=llama-160m sharding=ddp gpus_per_node=2 micro_batch=2 precision=fp32",
    "model=llama-160m sharding=fsdp gpus_per_node=2 micro_batch=2 precision=fp32",
    "model=llama-60m sharding=fsdp gpus_per_node=4 micro_batch=4 precision=fp32",
    "model=llama-60m sharding=ddp gpus_per_node=4 micro_batch=2 precision=fp32 activation_checkpointing=full",
    "model=gpt2-124m sharding=fsdp gpus_per_node=2 micro_batch=4 precision=fp32",
    "model=llama-60m sharding=ddp gpus_per_node=2 micro_batch=1 precision=bf16",
)


def overrides(site: Site, run: str, directory: Path) -> list[str]:
    """A few short steps on the site's corpora with the model of a row."""
    settings = dict(text.split("=", 1) for text in run.split())
    global_batch = int(settings["gpus_per_node"]) * int(settings["micro_batch"])
    length = 512
    return [
        *run.split(),
        f"model.tokenizer={site.root / 'tokenizer'}",
        f"model.sequence_length={length}",
        "budget=tokens",
        f"budget.tokens={STEPS * global_batch * length}",
        "data=local",
        f"data.corpora.general.train={site.root / 'general'}/train.*",
        f"global_batch={global_batch}",
        "log_every_steps=1",
        "run.export=false",
        f"run.directory={directory}",
    ]


def measured_gib(site: Site, run: str, directory: Path) -> float:
    """Most resident memory of rank 0 up to its last logged step."""
    finished = site.trainyard("train", *overrides(site, run, directory), timeout_seconds=1800)
    assert finished.returncode == 0, finished.stderr
    return max(row["memory_gib"] for row in metrics(directory))


def main() -> None:
    print("| run | active, planned | giving back | ratio | resident, planned | interval | measured | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        site = Site.create(Path(root))
        for number, run in enumerate(RUNS):
            directory = Path(root) / f"run-{number}"
            measured = measured_gib(site, run, directory)
            memory = json.loads((directory / "plan.json").read_text())["memory"]
            active, planned = memory["active_gib"], memory["device_gib"]
            low, high = memory["device_interval_gib"]
            # glibc keeps freed memory of up to 32 MiB a piece for itself, unless told to give it back.
            os.environ |= dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(2**20))
            returned = measured_gib(site, run, Path(root) / f"returning-{number}")
            for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
                del os.environ[name]
            first = f"{active:.2f} | {returned:.2f} | {active / returned:.3f}"
            second = f"{planned:.2f} | {low:.2f} to {high:.2f} | {measured:.2f} | {planned / measured:.3f}"
            print(f"| {run} | {first} | {second} |", flush=True)


if __name__ == "__main__":
    main()
