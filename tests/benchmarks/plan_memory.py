"""The plan's memory against that of real runs on this machine: planned device_gib, measured resident peak.

    python tests/benchmarks/plan_memory.py

Not a test: it takes some minutes and the memory of the models. Prints one row per run.
"""

from __future__ import annotations

import json
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


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        site = Site.create(Path(root))
        print("| run | planned GiB | interval | measured GiB | planned / measured |\n|---|---|---|---|---|")
        for number, run in enumerate(RUNS):
            directory = Path(root) / f"run-{number}"
            finished = site.trainyard("train", *overrides(site, run, directory), timeout_seconds=1800)
            assert finished.returncode == 0, finished.stderr
            memory = json.loads((directory / "plan.json").read_text())["memory"]
            planned, (low, high) = memory["device_gib"], memory["device_interval_gib"]
            measured = max(row["memory_gib"] for row in metrics(directory))
            ratio = planned / measured
            print(
                f"| {run} | {planned:.2f} | {low:.2f} to {high:.2f} | {measured:.2f} | {ratio:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
