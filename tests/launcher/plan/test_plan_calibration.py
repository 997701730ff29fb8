"""plan --calibrate: what this machine reached is measured once, and later plans use it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from configs.compose import compose
from configs.schema import Config, ConfigError
from launcher.plan.calibration import Calibration, _store, calibrate, calibrated, calibration_file

WORKERS = 2


def config(*overrides: str) -> Config:
    return compose(
        [
            "model=llama-20m",
            "model.layers=2",
            "model.hidden=64",
            "model.heads=2",
            "model.ffn=128",
            "model.vocabulary=320",
            "model.sequence_length=64",
            "precision=fp32",
            f"gpus_per_node={WORKERS}",
            "micro_batch=2",
            f"global_batch={2 * WORKERS}",
            *overrides,
        ]
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Calibration]:
    """A state directory with one calibration in it."""
    home = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(home))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return home, calibrate(config())


@pytest.fixture
def home(measured: tuple[Path, Calibration], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that directory, in use."""
    shutil.copytree(measured[0], tmp_path / "state")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path / "state"


def test_a_calibration_says_what_was_measured(measured: tuple[Path, Calibration]) -> None:
    found = measured[1]
    assert found["flops_per_second"] > 0
    assert found["step_seconds"] > 0
    assert found["all_reduce_gb_s"] > 0
    assert found["workers"] == WORKERS
    assert found["device_name"] is None
    assert found["efficiency"] is None, "no peak of a CPU is published"
    assert found["reserved_over_active"] is None, "a CPU has no caching allocator"


def test_flops_are_those_of_the_tokens_that_a_worker_stepped(measured: tuple[Path, Calibration]) -> None:
    found = measured[1]
    matrices = 2 * (4 * 64**2 + 3 * 64 * 128) + 2 * 64  # the norms' weights, by the usual count
    per_token = 6 * (matrices + 2 * 64 + 64 + 320 * 64) + 12 * 2 * 64 * 64
    assert found["flops_per_second"] == pytest.approx(per_token * 2 * 64 / found["step_seconds"], rel=1e-2)


def test_later_plans_of_the_same_hardware_and_format_find_it(
    home: Path, measured: tuple[Path, Calibration]
) -> None:
    assert calibrated("cpu", "fp32") == measured[1]
    assert calibrated("cpu", "bf16") is None
    assert calibrated("h100-sxm-80gb", "fp32") is None


def test_more_workers_share_the_same_processors(home: Path, measured: tuple[Path, Calibration]) -> None:
    shared = calibrated("cpu", "fp32", workers=2 * WORKERS)
    assert shared is not None
    assert shared["flops_per_second"] == measured[1]["flops_per_second"] / 2


def test_a_new_calibration_leaves_those_of_other_formats(home: Path) -> None:
    before = calibrated("cpu", "fp32")
    calibrate(config("precision=bf16"))
    assert calibrated("cpu", "fp32") == before
    assert calibrated("cpu", "bf16") is not None


def test_only_its_owner_reads_the_file(home: Path) -> None:
    assert calibration_file() == home / "trainyard" / "calibration.json"
    assert calibration_file().stat().st_mode & 0o777 == 0o600
    assert [file.name for file in calibration_file().parent.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"cpu/fp32":', "\xff", "[" * 100_000])
def test_a_damaged_file_is_ignored_and_said_to_be(
    home: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration_file().write_text(content, encoding="latin-1")
    assert calibrated("cpu", "fp32") is None
    said = capsys.readouterr().err
    assert f"{calibration_file()}: damaged" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "entry",
    [
        None,
        7,
        {},
        {"flops_per_second": "fast"},
        {"flops_per_second": 0},
        {"flops_per_second": True},
        {"flops_per_second": float("nan")},
        {"flops_per_second": float("inf")},
        {"flops_per_second": 1e19 * 2},
        {"flops_per_second": 1e-300},
        {"flops_per_second": 10**400},
        {"flops_per_second": 1e12, "reserved_over_active": "1.1"},
        {"flops_per_second": 1e12, "reserved_over_active": float("nan")},
        {"flops_per_second": 1e12, "reserved_over_active": 0.9},
        {"flops_per_second": 1e12, "reserved_over_active": 3.1},
        {"flops_per_second": 1e12, "reserved_over_active": True},
        {"flops_per_second": 1e12, "shared": True, "workers": None},
        {"flops_per_second": 1e12, "shared": True, "workers": "2"},
        {"flops_per_second": 1e12, "shared": True, "workers": 0},
        {"flops_per_second": 1e12, "shared": True, "workers": 2.5},
        {"flops_per_second": 1e12, "shared": True, "workers": True},
    ],
    ids=str,
)
def test_a_damaged_entry_counts_as_none_and_is_said_to_be(
    home: Path, entry: object, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration_file().write_text(json.dumps({"cpu/fp32": entry}))
    assert calibrated("cpu", "fp32", workers=2) is None
    said = capsys.readouterr()
    assert f"{calibration_file()}: damaged" in said.err
    assert said.err.count("\n") == 1
    assert not said.out


def test_a_damaged_entry_leaves_the_others(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = json.loads(calibration_file().read_text())
    calibration_file().write_text(json.dumps(stored | {"cpu/bf16": 7}))
    assert calibrated("cpu", "fp32") == stored["cpu/fp32"]
    assert not capsys.readouterr().err


def test_a_calibration_that_cannot_be_stored_leaves_nothing_behind(home: Path) -> None:
    file = calibration_file()
    file.unlink()
    file.mkdir()
    with pytest.raises(OSError, match="directory"):
        _store("cpu/fp32", {})
    assert list(file.parent.iterdir()) == [file]


def test_without_a_file_nothing_is_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert calibrated("cpu", "fp32") is None


def test_hardware_that_is_not_here_cannot_be_calibrated() -> None:
    with pytest.raises(ConfigError, match=r"hardware=h100-sxm-80gb: this machine has") as refused:
        calibrate(config("hardware=h100-sxm-80gb"))
    assert "\n" not in str(refused.value)
