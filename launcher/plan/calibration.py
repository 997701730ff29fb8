"""What was measured on hardware like this: achieved FLOP/s, bandwidth, reserved over active memory.

Kept in $XDG_STATE_HOME/trainyard/calibration.json, by hardware preset and compute format.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from configs.schema import Config
from launcher.plan.ask import ask
from launcher.plan.flops import flops_per_token, recomputed_flops_per_token
from launcher.plan.hardware import on_gpu
from launcher.plan.shape import shape_of
from launcher.plan.time import peak_flops_per_second
from launcher.registry import registry_file

Calibration = dict[str, Any]


def calibration_file() -> Path:
    """Beside the registry of runs. Raises ConfigError without a home directory."""
    return registry_file().with_name("calibration.json")


def calibrate(config: Config) -> Calibration:
    """Run a few steps on this machine and remember what they reached.

    flops_per_second is that of one worker, with FLOPs that checkpointing repeats. Of a model that was cut to
    its first blocks only those count: three times a block's forward, and the head.
    Raises ConfigError, one line, when this machine is not the configured hardware or cannot hold the model.
    """
    measured = ask("trainer.calibration", config)
    shape = shape_of(config.model)
    share = measured["layers"] / shape.layers
    blocks = 3 * recomputed_flops_per_token(shape, "full")
    repeated = recomputed_flops_per_token(shape, config.activation_checkpointing)
    per_token = flops_per_token(shape) - (1 - share) * blocks + share * repeated
    achieved = per_token * measured["tokens_per_step"] / measured["step_seconds"]
    peak = peak_flops_per_second(config.hardware, config.precision.compute)
    calibration = measured | {
        "hardware": config.hardware.name,
        "compute": config.precision.compute,
        "model": shape.name,
        "layers_of_model": shape.layers,
        "flops_per_second": achieved,
        "efficiency": achieved / peak if peak else None,
        "shared": not on_gpu(config.hardware),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    _store(_key(config.hardware.name, config.precision.compute), calibration)
    return calibration


def calibrated(hardware_name: str, compute: str, workers: int | None = None) -> Calibration | None:
    """The newest calibration of a hardware preset in a format; none where there is none.

    workers: of the planned machine. The workers of a machine without GPUs share it, so that one of twice as
    many is half as fast; none means as many as were measured.
    """
    stored, key = _stored(), _key(hardware_name, compute)
    if key not in stored:
        return None
    entry: Calibration = stored[key]
    if not _sound(entry):
        _say_damaged()
        return None
    if entry.get("shared") and workers:
        rate, measured_workers = entry["flops_per_second"], entry.get("workers", workers)
        return entry | {"flops_per_second": rate * measured_workers / workers}
    return entry


def _sound(entry: Any) -> bool:
    """Whether an entry holds what plans compute with, within what a machine can reach."""
    if not isinstance(entry, dict):
        return False
    reserved, workers = entry.get("reserved_over_active"), entry.get("workers", 1)
    return (
        _within(entry.get("flops_per_second"), 1, 1e19)
        and (reserved is None or _within(reserved, 1, 3))
        and type(workers) is int
        and 1 <= workers < 2**31
    )


def _within(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high  # NaN is not, and True is no number


def _key(hardware_name: str, compute: str) -> str:
    return f"{hardware_name}/{compute}"


def _stored() -> dict[str, Any]:
    """All calibrations; a damaged file is said to be so and counts as none."""
    file = calibration_file()
    try:
        found = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        _say_damaged()
        return {}
    return found


def _say_damaged() -> None:
    file = calibration_file()
    print(f"trainyard: {file}: damaged, plans go without it; plan --calibrate writes it", file=sys.stderr)


def _store(key: str, calibration: Calibration) -> None:
    """Add to the file, which is replaced whole and readable by its owner only."""
    file = calibration_file()
    text = json.dumps(_stored() | {key: calibration}, indent=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:  # made with mode 0600
        try:
            new.write(text)
            new.flush()
            os.replace(new.name, file)
        except BaseException:
            os.unlink(new.name)
            raise
