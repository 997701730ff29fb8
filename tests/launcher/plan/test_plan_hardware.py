"""The catalogue of accelerators: complete, plausible, found by the names people use."""

import subprocess
import sys

import pytest

from configs.compose import ROOT, compose
from configs.schema import ConfigError
from launcher.plan.hardware import catalogue, hardware_named, on_gpu

GPUS = sorted(name for name in catalogue() if name != "cpu")
ASKED_FOR = {
    "v100-sxm2-32gb",
    "a10g",
    "a100-sxm-40gb",
    "a100-sxm-80gb",
    "h100-sxm-80gb",
    "h100-pcie-80gb",
    "h200-141gb",
    "b200-192gb",
    "mi300x-192gb",
    "l40s-48gb",
    "rtx4090-24gb",
    "cpu",
}


def test_the_catalogue_has_every_promised_accelerator() -> None:
    assert set(catalogue()) >= ASKED_FOR


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_says_all_that_time_and_memory_are_planned_from(name: str) -> None:
    hardware = catalogue()[name]
    peaks = hardware.peak_tflops
    assert peaks.fp32 is not None
    assert (peaks.fp16 or 0) > peaks.fp32
    if peaks.fp8 is not None and peaks.bf16 is not None:
        assert peaks.fp8 == pytest.approx(2 * peaks.bf16, rel=0.02)
    for known in ("memory_gib", "memory_gb_s", "intra_node_gb_s", "inter_node_gb_s", "host_gb_s", "watts"):
        assert getattr(hardware, known) is not None
    assert hardware.inter_node_gb_s <= hardware.intra_node_gb_s
    assert hardware.efficiency is None


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_every_preset_names_its_source(name: str) -> None:
    assert catalogue()[name].source.endswith(".")


def test_fewer_bytes_can_be_used_than_the_card_is_named_for() -> None:
    for name in GPUS:
        *_, size = name.split("-")
        if size.endswith("gb"):
            assert catalogue()[name].memory_gib < int(size.removesuffix("gb"))


def test_a_preset_is_what_the_configuration_composes() -> None:
    assert compose(["hardware=b200-192gb"]).hardware == hardware_named("b200-192gb")


def test_prices_and_links_can_be_overridden() -> None:
    mine = compose(
        ["hardware=l40s-48gb", "hardware.usd_per_hour=0.5", "hardware.inter_node_gb_s=50"]
    ).hardware
    assert (mine.usd_per_hour, mine.inter_node_gb_s) == (0.5, 50)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("A100-80GB", "a100-sxm-80gb"),
        ("A100", "a100-sxm-80gb"),
        ("a100_40gb", "a100-sxm-40gb"),
        ("A100-64GB", "a100-sxm-64gb"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("H200-141GB", "h200-141gb"),
        ("H800", "h800-sxm-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24gb"),
        ("AMD Instinct MI300X", "mi300x-192gb"),
        ("V100", "v100-sxm2-32gb"),
        ("A10G", "a10g"),
        ("cpu", "cpu"),
    ],
)
def test_an_accelerator_is_found_by_the_names_people_use(said: str, meant: str) -> None:
    assert hardware_named(said).name == meant


def test_a_memory_size_without_a_preset_is_the_common_card_with_that_memory() -> None:
    known, other = hardware_named("H100-80GB"), hardware_named("H100-96GB")
    assert other.memory_gib == pytest.approx(96 * 79.1 / 80, rel=0.001)
    assert other.peak_tflops == known.peak_tflops


def test_an_unknown_accelerator_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"^hardware=TPUv4: no such preset; allowed: a100.*v100") as error:
        hardware_named("TPUv4")
    assert "\n" not in str(error.value)


def test_only_the_cpu_is_no_accelerator() -> None:
    assert [name for name, hardware in catalogue().items() if not on_gpu(hardware)] == ["cpu"]


def test_the_catalogue_is_read_without_torch() -> None:
    code = "import sys, launcher.plan.hardware as h; h.catalogue(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=True)
