"""What does it cost? Accelerator-hours, dollars, electricity, emissions and storage."""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import Hardware, PlanOptions

SECONDS_PER_HOUR = 3600
GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """Price of a run; none where the speed, the price or the power is unknown."""

    gpu_hours: float | None = None
    usd: float | None = None
    kwh: float | None = None
    kg_co2: float | None = None
    checkpoint_storage_gib: float | None = None


def cost(
    seconds: float | None,
    world_size: int,
    hardware: Hardware,
    options: PlanOptions,
    checkpoint_bytes: float,
    kept_checkpoints: int,
) -> Cost:
    """Price of so many seconds on all ranks, and the disk that the kept checkpoints fill.

    One more than is kept lies on disk while a new one is written.
    """
    storage_gib = checkpoint_bytes * (kept_checkpoints + 1) / GIB
    if seconds is None:
        return Cost(checkpoint_storage_gib=storage_gib)
    hours = seconds * world_size / SECONDS_PER_HOUR
    kwh = None if hardware.watts is None else energy_kwh(hours, hardware.watts, options.overhead_power)
    return Cost(
        gpu_hours=hours,
        usd=None if hardware.usd_per_hour is None else price_usd(hours, hardware.usd_per_hour),
        kwh=kwh,
        kg_co2=None if kwh is None else emissions_kg_co2(kwh, options.kg_co2_per_kwh),
        checkpoint_storage_gib=storage_gib,
    )


def gpu_hours(flops: float, peak_flops_per_second: float, utilisation: float) -> float:
    """FLOPs / (peak x utilisation) in hours; the number of accelerators does not matter."""
    return flops / (peak_flops_per_second * utilisation) / SECONDS_PER_HOUR


def gpu_hours_of_days(days: float, accelerators: int) -> float:
    """Days on so many accelerators."""
    return days * 24 * accelerators


def price_usd(hours: float, usd_per_hour: float) -> float:
    """Accelerator-hours x price of one."""
    return hours * usd_per_hour


def energy_kwh(hours: float, watts: float, overhead_power: float) -> float:
    """Accelerator-hours x power x PUE."""
    return hours * watts / 1000 * overhead_power


def emissions_kg_co2(kwh: float, kg_co2_per_kwh: float) -> float:
    """Electricity x the grid's emission factor, CO2-equivalent."""
    return kwh * kg_co2_per_kwh


def usd_per_million_parameters(usd: float, parameters: float) -> float:
    """Price by model size."""
    return usd / (parameters / 1e6)


def relative_cost(flops: float, other_flops: float) -> float:
    """Price of one run over another's on the same hardware at the same utilisation."""
    return flops / other_flops


def gpu_hours_of_rate(tokens: float, gpu_hours_per_trillion_tokens: float) -> float:
    """Tokens at a published pace."""
    return tokens / 1e12 * gpu_hours_per_trillion_tokens
