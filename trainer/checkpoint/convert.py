"""Checkpoints to and from other programs' layouts, tensor by tensor.

The run's own checkpoint is the hub: out of it to a Hugging Face directory or to DeepSpeed's universal
layout, and from either into a run that has not come so far.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from cluster import attempt as attempts
from cluster import events, exit_codes
from cluster.streams import libraries_to_stderr
from configs.load import load
from configs.schema import Config, ConfigError
from trainer.checkpoint import universal
from trainer.checkpoint.loading import Found, whole_checkpoint
from trainer.checkpoint.manifest import difference
from trainer.checkpoint.places import places_of
from trainer.checkpoint.planner import Loading
from trainer.checkpoint.store import Store
from trainer.data.loader import Position
from trainer.data.tokenizer import load_tokenizer
from trainer.distributed import World
from trainer.export import export
from trainer.initial import fill, initial_weights
from trainer.model import build_model
from trainer.sharding import Progress
from trainer.sharding.logical import Logical, logical


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory")
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", type=Path, metavar="DIR", help="write a checkpoint of the run to DIR")
    direction.add_argument(
        "--from",
        type=Path,
        dest="source",
        metavar="DIR",
        help="make a checkpoint of the run from DIR: a Hugging Face model, or DeepSpeed's universal layout",
    )
    parser.add_argument(
        "--layout",
        choices=("huggingface", "universal"),
        default="huggingface",
        help="what --to writes (default: huggingface)",
    )
    parser.add_argument(
        "--step", type=int, help="of the checkpoint; the newest, or with --from what DIR says, else 0"
    )


def run(arguments: argparse.Namespace) -> int:
    """Convert as the arguments say and print where to. Raises ConfigError in one line."""
    directory: Path = arguments.run
    if arguments.step is not None and arguments.step < 0:
        raise ConfigError(f"--step={arguments.step}: must be 0 or more")
    with libraries_to_stderr():
        if arguments.source is not None:
            written = take_in(directory, arguments.source, arguments.step)
        elif arguments.layout == "huggingface":
            written = str(export(directory, arguments.step, arguments.to))
        else:
            written = str(to_universal(directory, arguments.step, arguments.to))
    print(written)
    return exit_codes.DONE


def to_universal(run: Path, step: int | None, folder: Path) -> Path:
    """Write the checkpoint of a step, by default the newest, for DeepSpeed; returns its folder."""
    found = whole_checkpoint(run, load(run / "config.yaml"), step)
    made = universal.write(folder, stored_tensors(found), found.place.state(found.manifest))
    events.record(run, "exported", path=str(made))
    return made


def take_in(run: Path, source: Path, step: int | None) -> str:
    """Make a run's checkpoint out of another program's; returns where it is.

    Of a Hugging Face model the moments are zero, and so is the step. Of a universal checkpoint of ours all
    is as it was; of one that DeepSpeed wrote the data begin anew. Raises ConfigError if that is another
    model, or if the run has a checkpoint that is as far or further.
    """
    config = load(run / "config.yaml")
    tokenizer = load_tokenizer(config.model)
    folder = universal.find(source)
    if folder is None and not (source / "config.json").is_file():
        raise ConfigError(f"--from={source}: neither a Hugging Face model nor a universal checkpoint")
    state = _state(config, folder, step)
    _check_free(run, config, state["step"])
    module = build_model(config, tokenizer.vocabulary, tokenizer.end_of_document)
    shapes = _shapes(module)
    if folder is None:
        config = config.model_copy(deep=True)
        config.model.family, config.model.path = "hf", str(source)
        module = build_model(config, tokenizer.vocabulary, tokenizer.end_of_document)
    there = _shapes(module) if folder is None else universal.shapes(folder, shapes)
    if folder is not None:  # DeepSpeed lists shared weights under each of their names
        for name, _ in module.named_parameters(remove_duplicate=False):
            if f"weight/{name}" not in shapes:
                there.pop(f"weight/{name}", None)
    if differs := difference(there, shapes):
        raise ConfigError(f"--from={source}: another model: {differs}")
    with tempfile.TemporaryDirectory(dir=run, prefix=".convert-") as scratch:
        tensors = _on_disk(shapes, Path(scratch) / "state")
        if folder is None:
            fill(tensors, initial_weights(module, config))
        else:
            for name, tensor in universal.read(folder, shapes):
                tensors[name].fill(tensor)
        world = _alone(Path(scratch) / "rendezvous")
        try:
            options = config.checkpoint.model_copy(update={"asynchronous": False})
            name = config.run.name or ""
            store = Store(run, world, attempts.begin(run), config.sharding.strategy, options, name)
            store.save(state["step"], tensors, state)
            store.close()
        finally:
            world.leave()
    return store.place.at(state["step"])


def stored_tensors(found: Found) -> Iterator[tuple[str, Tensor]]:
    """Name and numbers of each logical tensor of a checkpoint, whole, one at a time."""
    reader = found.place.reader(found.manifest)
    metadata = reader.read_metadata()  # long in a large checkpoint, and asked for with every tensor
    reader.read_metadata = lambda *_, **__: metadata  # type: ignore[method-assign]
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be here
    for name, shape in found.manifest.tensors.items():
        tensor = torch.empty(shape, dtype=torch.float32)
        load_tensors({name: logical(tensor)}, storage_reader=reader, planner=Loading(), no_dist=True)
        yield name, tensor


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    """Global shape of each logical tensor of a model."""
    parameters = list(module.named_parameters())
    shapes = {f"weight/{name}": list(parameter.shape) for name, parameter in parameters}
    for kind in ("exp_avg", "exp_avg_sq"):
        shapes |= {f"{kind}/{name}": list(p.shape) for name, p in parameters if p.requires_grad}
    return shapes


def _state(config: Config, folder: Path | None, step: int | None) -> dict[str, Any]:
    """What state.json will say. folder: of a universal checkpoint."""
    said = universal.state(folder) if folder else {}
    if universal.OURS in said and step in (None, said["global_steps"]):
        return dict(said[universal.OURS])
    trained = int(said.get("global_steps", 0))
    progress = Progress(trained - int(said.get("skipped_steps") or 0))
    step = trained if step is None else step
    tokens = step * config.global_batch * config.model.sequence_length
    return {"step": step, "tokens": tokens, "data": Position(0, {}).to_json(), "progress": asdict(progress)}


def _check_free(run: Path, config: Config, step: int) -> None:
    """Raise ConfigError if the run would go on from another checkpoint than that of this step."""
    steps = [
        known for place in places_of(run, config.checkpoint, config.run.name or "") for known in place.steps()
    ]
    if steps and max(steps) >= step:
        newest = f"step-{max(steps):08d}"
        raise ConfigError(f"--step={step}: {run} has {newest} already, give a larger one or another run")


def _on_disk(shapes: dict[str, list[int]], file: Path) -> dict[str, Logical]:
    """Logical tensors of zeros whose numbers are in a file, so that the host need not hold them."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    numbers = torch.from_file(str(file), shared=True, size=sum(sizes), dtype=torch.float32)
    parts = zip(shapes.items(), numbers.split(sizes), strict=True)
    return {name: logical(part.view(shape)) for (name, shape), part in parts}


def _alone(rendezvous: Path) -> World:
    """The only rank of a world of its own. rendezvous: a file that does not exist."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    return World(0, 1, torch.device("cpu"), group)
