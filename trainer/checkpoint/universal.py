"""DeepSpeed's universal checkpoints: a folder per parameter, from which its engine resumes at any size.

FOLDER/latest_universal                 the name of the newest checkpoint's folder, here step-00000005
FOLDER/step-00000005/zero/PARAMETER/    fp32.pt, and of a trained parameter exp_avg.pt, exp_avg_sq.pt, step.pt
FOLDER/step-00000005/zero/optimizer_state.pt
FOLDER/step-00000005/mp_rank_00_model_states.pt, zero_pp_rank_0_mp_rank_00_model_states.pt

As DeepSpeed 0.19 reads them (runtime/base_optimizer.py, runtime/zero/stage3.py). All files hold tensors and
plain values only, so torch.load(weights_only=True) reads them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from configs.schema import ConfigError

FILES = {"weight": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""File by kind of logical tensor."""
LATEST = "latest_universal"
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""Read by stages 1 and 2, and by stage 3."""
FORMAT_VERSION = "0.19.8"
"""Of DeepSpeed, whose stage 1 asks for one above 0.3.17."""
MOST_GROUPS = 64
"""DeepSpeed loads as many optimizer groups as are listed; ours name no settings, so that it keeps its own."""
OURS = "trainyard"
"""Key of our own state among what DeepSpeed hands back to its user."""


def write(folder: Path, tensors: Iterable[tuple[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write logical tensors, one at a time, as a checkpoint of DeepSpeed; returns its folder.

    tensors: weight/NAME, exp_avg/NAME, exp_avg_sq/NAME, fp32 and whole. state: JSON values, as a
    checkpoint of ours has them. Raises ConfigError if the folder has this step already.
    """
    name = f"step-{state['step']:08d}"
    final, temporary = folder / name, folder / f".{name}.partial-{os.getpid()}"
    if final.exists():
        raise ConfigError(f"--to={folder}: has {name} already, choose another directory")
    state = {"progress": {"updates": state["step"]}} | state  # older checkpoints do not say
    updates = float(state["progress"]["updates"])
    for key, tensor in tensors:
        kind, parameter = key.split("/", 1)
        if kind not in FILES or Path(parameter).name != parameter:
            raise ConfigError(f"{key}: no name of a tensor")
        of_parameter = temporary / "zero" / parameter
        of_parameter.mkdir(parents=True, exist_ok=True)
        torch.save({"param": tensor}, of_parameter / f"{FILES[kind]}.pt")
        if kind == "exp_avg":
            torch.save(torch.tensor(updates), of_parameter / "step.pt")
    optimizer: dict[str, Any] = {
        "ds_version": FORMAT_VERSION,
        "param_groups": [{} for _ in range(MOST_GROUPS)],
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(updates)}}, "param_groups": [{}]},
    }
    torch.save(optimizer, temporary / "zero" / "optimizer_state.pt")
    model = {
        "module": {},
        "lr_scheduler": None,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": state["step"],
        "skipped_steps": state["step"] - state["progress"]["updates"],
        OURS: state,
    }
    for file in MODEL_STATES:
        torch.save(model, temporary / file)
    temporary.rename(final)
    (folder / LATEST).write_text(name)
    return final


def find(source: Path) -> Path | None:
    """The newest universal checkpoint of a folder, or the folder if it is one itself; None if neither."""
    latest = source / LATEST
    folder = source / latest.read_text().strip() if latest.is_file() else source
    return folder if (folder / "zero").is_dir() else None


def shapes(folder: Path, wanted: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Shape by name of the wanted logical tensors that are there, and of all weights beside them.

    DeepSpeed's stage 3 leaves its tensors flat: those have the wanted shape if they are as long.
    """
    weights = {f"weight/{file.parent.name}" for file in (folder / "zero").glob(f"*/{FILES['weight']}.pt")}
    found = {}
    for key in sorted(wanted.keys() | weights):
        if (file := _file(folder, key)).is_file():
            shape = list(_tensor(file).shape)
            flat = key in wanted and shape == [math.prod(wanted[key])]
            found[key] = wanted[key] if flat else shape
    return found


def read(folder: Path, wanted: Mapping[str, list[int]]) -> Iterator[tuple[str, Tensor]]:
    """The wanted logical tensors, one at a time, in the shapes that are given."""
    for key, shape in wanted.items():
        yield key, _tensor(_file(folder, key)).view(shape)


def state(folder: Path) -> dict[str, Any]:
    """What is said of the whole checkpoint: global_steps, skipped_steps, and under OURS the state of ours.

    Raises ConfigError naming the folder.
    """
    for file in filter(Path.is_file, (folder / name for name in MODEL_STATES)):
        said = _load(file)
        if not isinstance(said, dict):
            continue
        counts = [said.get("global_steps"), said.get("skipped_steps") or 0]
        if all(isinstance(count, int) and count >= 0 for count in counts):
            ours = said.get(OURS)
            whole = isinstance(ours, dict) and ours.keys() >= {"step", "tokens", "data", "progress"}
            return said if whole else {key: value for key, value in said.items() if key != OURS}
    raise ConfigError(f"{folder}: no file says how many steps it has been trained")


def _file(folder: Path, key: str) -> Path:
    kind, parameter = key.split("/", 1)
    return folder / "zero" / parameter / f"{FILES[kind]}.pt"


def _tensor(file: Path) -> Tensor:
    stored = _load(file)
    tensor = stored.get("param") if isinstance(stored, dict) else stored
    if not isinstance(tensor, Tensor):
        raise ConfigError(f"{file}: holds no tensor")
    return tensor


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, UnpicklingError) as error:
        reason = str(error).strip().splitlines()
        raise ConfigError(f"{file}: cannot be read: {reason[0][:200] if reason else error!r}") from None
