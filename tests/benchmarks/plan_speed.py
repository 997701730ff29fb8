"""How long does a plan take? CPU seconds, beside the floor: a Python that only imports Hydra and pydantic.

python tests/benchmarks/plan_speed.py
"""

from __future__ import annotations

import resource
import subprocess
import sys

FLOOR = ("-c", "import hydra, pydantic, rich.console")
PLANS = {
    "one node": ("model=llama-7b", "hardware=h100-sxm-80gb", "gpus_per_node=8"),
    "search over 10,000 GPUs": (
        "model=llama-2-70b",
        "hardware=h100-sxm-80gb",
        "nodes=1250",
        "gpus_per_node=8",
        "global_batch=80000",
        "sharding=auto",
    ),
}
TRIES = 5


def cpu_seconds(*arguments: str) -> float:
    """The least of several runs of Python with these arguments."""
    taken = []
    for _ in range(TRIES):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


def main() -> None:
    floor = cpu_seconds(*FLOOR)
    print(f"floor {floor:.2f} s")
    for name, overrides in PLANS.items():
        seconds = cpu_seconds("-m", "launcher", "plan", *overrides)
        print(f"{name} {seconds:.2f} s, {seconds / floor:.2f} x the floor")


if __name__ == "__main__":
    main()
