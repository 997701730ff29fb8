"""How often does it break, and what does that cost? Failures, checkpoint intervals, goodput."""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.schema import PlanOptions

SECONDS_PER_DAY = 86400


@dataclass(frozen=True)
class Reliability:
    """What failures and checkpoints leave of the wall time."""

    mtbf_seconds: float
    """Mean time between failures of the whole machine."""
    save_seconds: float
    """Training stands still for so long at every checkpoint."""
    interval_seconds: float
    """Recommended: Daly's."""
    lost_seconds_per_failure: float
    """Work that is done again, and the restart."""
    expected_goodput: float


def reliability(size_bytes: float, nodes: int, options: PlanOptions) -> Reliability:
    """Failures of a run on so many nodes, which write a checkpoint of size_bytes together."""
    mtbf_seconds = mtbf_of_rate(nodes, options.failures_per_1000_node_days)
    pause_seconds = save_seconds(size_bytes, options.storage_gb_s * nodes)
    interval_seconds = daly_seconds(pause_seconds, mtbf_seconds)
    lost_seconds = lost_work_seconds(interval_seconds) + 60 * options.restart_minutes
    return Reliability(
        mtbf_seconds=mtbf_seconds,
        save_seconds=pause_seconds,
        interval_seconds=interval_seconds,
        lost_seconds_per_failure=lost_seconds,
        expected_goodput=goodput(interval_seconds, pause_seconds, lost_seconds, mtbf_seconds),
    )


def mtbf_of_rate(nodes: int, failures_per_1000_node_days: float) -> float:
    """Seconds between failures: 1000 days / (rate x nodes), for failures that do not depend on each other.

    Kokolis et al. 2024 (arXiv:2410.21680) measured 6.5 per 1000 node-days on nodes of eight A100s.
    """
    return 1000 * SECONDS_PER_DAY / (failures_per_1000_node_days * nodes)


def mtbf_of_interruptions(interruptions: int, days: float) -> float:
    """Seconds between the failures that a run saw."""
    return days * SECONDS_PER_DAY / interruptions


def save_seconds(size_bytes: float, gb_s: float) -> float:
    """Size over bandwidth."""
    return size_bytes / (gb_s * 1e9)


def young_seconds(pause_seconds: float, mtbf_seconds: float) -> float:
    """Interval between checkpoints sqrt(2 C M). Young 1974, doi:10.1145/361147.361115."""
    return math.sqrt(2 * pause_seconds * mtbf_seconds)


def daly_seconds(pause_seconds: float, mtbf_seconds: float) -> float:
    """sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + C / 2M / 9) - C where C < 2M, else M.

    Daly 2006, doi:10.1016/j.future.2004.11.016, equation 37.
    """
    ratio = pause_seconds / (2 * mtbf_seconds)
    if ratio >= 1:
        return mtbf_seconds
    correction = 1 + math.sqrt(ratio) / 3 + ratio / 9
    return young_seconds(pause_seconds, mtbf_seconds) * correction - pause_seconds


def lost_work_seconds(interval_seconds: float) -> float:
    """Work that a failure destroys on average: half of the interval between checkpoints."""
    return interval_seconds / 2


def goodput(interval_seconds: float, pause_seconds: float, lost_seconds: float, mtbf_seconds: float) -> float:
    """Share of the wall time that advances training: I / (I + C) / (1 + lost / M).

    I interval, C pause, lost what a failure costs, M mean time between failures while training.
    """
    saving = interval_seconds / (interval_seconds + pause_seconds)
    return saving / (1 + lost_seconds / mtbf_seconds)
