"""Configuration of machines and of plans for them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.section import Quantity, Section, Size


class PeakTflops(Section):
    """Dense peak by number format."""

    fp32: Quantity | None = None
    """TFLOP/s of fp32 matrix products as torch runs them by default; none where unknown."""
    bf16: Quantity | None = None
    """TFLOP/s of bf16 matrix products without sparsity; none where unknown."""
    fp16: Quantity | None = None
    """TFLOP/s of fp16 matrix products without sparsity; none where unknown."""
    fp8: Quantity | None = None
    """TFLOP/s of fp8 matrix products without sparsity; none where unknown."""


class Hardware(Section):
    """The accelerator that plans are made for."""

    name: str = ""
    """The preset's name; set from the file chosen for the group."""
    device_name: str | None = None
    """Name torch reports for this device; MFU is computed only where it matches."""
    memory_gib: Quantity | None = None
    """Memory a program can really use, GiB; none means the machine's own."""
    peak_tflops: PeakTflops = PeakTflops()
    """Dense peaks; none where unknown, MFU is then null."""
    efficiency: Annotated[float, Field(ge=1e-3, le=1)] | None = None
    """Share of the peak that large matrix products reach; none means calibrated here, else measured by
    others on such hardware."""
    memory_gb_s: Quantity | None = None
    """Bandwidth of the device's memory, GB/s; none where unknown."""
    intra_node_gb_s: Quantity | None = None
    """Bandwidth between accelerators of a node, GB/s per accelerator and direction; none where unknown."""
    inter_node_gb_s: Quantity | None = None
    """Bandwidth of the network between nodes, GB/s per accelerator and direction; none where unknown."""
    host_gb_s: Quantity | None = None
    """Bandwidth between an accelerator and host memory, GB/s per direction; none where unknown."""
    host_memory_gib: Quantity | None = None
    """Host memory of a node, GiB; none means unknown (the machine's own with hardware=cpu)."""
    usd_per_hour: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    """Price of one accelerator for an hour, US dollars; none where unknown."""
    watts: Quantity | None = None
    """Electric power of one accelerator with its share of the node; none where unknown."""
    source: str = ""
    """Where the numbers above are from, with their date."""


class Cluster(Section):
    """Where the run is scheduled."""

    kind: Literal["local"]
    """local: worker processes on this machine."""
    restarts: Annotated[int, Field(ge=0, lt=2**31)] = 3
    """Crashes in a row without a new checkpoint that are answered with a restart."""
    stop_seconds: Annotated[float, Field(gt=0, le=1e7)] = 120.0
    """Longest time from a signal to stop until the workers have saved and ended; then they are killed."""


class PlanOptions(Section):
    """Behaviour of the planner."""

    force: bool = False
    """Start a run although the plan says that it does not fit."""
    deadline_days: Annotated[float, Field(ge=1e-9, le=1e6)] | None = None
    """Days the run may take; the plan refuses what would need more than the machines' peak."""
    tensor_parallel: Size = 1
    """Ranks that split each matrix; to compare with other trainers, planned only."""
    pipeline_parallel: Size = 1
    """Ranks that split the blocks; to compare with other trainers, planned only."""
    context_parallel: Size = 1
    """Ranks that split each row; to compare with other trainers, planned only."""
    productive_share: Annotated[float, Field(ge=0.01, le=1)] = 0.85
    """Share of the wall time that trains: the rest is start-up, evaluation and waiting for people. Failures
    and checkpoints are counted on top. Whole runs of Llama 3.1 405B and BLOOM: 0.85 of their steps' MFU."""
    failures_per_1000_node_days: Annotated[float, Field(ge=1e-6, le=1e6)] = 6.5
    """Interruptions; Kokolis et al. 2024 (arXiv:2410.21680) measured 6.5 on 8-GPU A100 nodes."""
    restart_minutes: Annotated[float, Field(gt=0, le=1e5)] = 10.0
    """Minutes from a failure until training goes on."""
    storage_gb_s: Annotated[float, Field(ge=1e-4, le=1e6)] = 1.0
    """Bandwidth to checkpoint storage, GB/s of one node; BLOOM's 48 nodes wrote 2.3 TB in 40 seconds."""
    overhead_power: Annotated[float, Field(ge=1, le=100)] = 1.1
    """Electricity of the data centre over that of its machines (PUE)."""
    kg_co2_per_kwh: Annotated[float, Field(ge=0, le=100)] = 0.4
    """Emissions of the grid, kg CO2-equivalent per kWh; depends on country and hour."""
