"""Every preset that ships composes, is documented, and survives the way through a run directory."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from configs.compose import ROOT, compose, groups
from configs.load import load
from configs.schema import Config, ConfigError
from launcher.freeze import freeze
from launcher.plan.plan import make_plan

REQUIRED = {
    "model=hf": ["model.path=gpt2"],
    "model=llama-demo": ["model.tokenizer=gpt2"],
    "budget=tokens": ["budget.tokens=1000"],
    "budget=flops": ["budget.flops=1e15"],
    "budget=epochs": ["budget.epochs=2"],
    "budget=gpu_hours": ["budget.gpu_hours=100"],
    "budget=usd": ["budget.usd=100"],
    "budget=days": ["budget.days=2"],
    "data=local": ["data.corpora.own.train=here/*.jsonl"],
}
"""What the presets that leave something open need."""
PRESETS = [f"{group}={name}" for group, names in groups().items() for name in names]


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """Dotted name and description of every key, those of nested and named sections included."""
    for name, field in model.model_fields.items():
        kinds = [
            kind
            for kind in (field.annotation, *typing.get_args(field.annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        yield prefix + name, field.description or (kinds[0].__doc__ if kinds else None)
        for kind in kinds:
            yield from sections(kind, f"{prefix}{name}.")


def test_every_group_of_the_schema_has_a_preset() -> None:
    assert {"model", "budget", "data", "objective", "sharding", "precision", "optimizer"} < set(groups())
    assert {"schedule", "hardware", "cluster", "experiment", "checkpoint", "tracker"} < set(groups())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_composes_to_a_configuration(preset: str) -> None:
    group, name = preset.split("=")
    config = compose([preset, *REQUIRED.get(preset, [])])
    if group in ("model", "hardware"):
        assert getattr(config, group).name == name


@pytest.mark.parametrize("preset", REQUIRED)
def test_what_a_preset_leaves_open_must_be_given(preset: str) -> None:
    key = REQUIRED[preset][0].split("=")[0].removesuffix(".own.train")
    with pytest.raises(ConfigError, match=f"^{key}: "):
        compose([preset])


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if not preset.startswith("experiment")])
def test_a_composed_configuration_is_the_same_after_it_was_frozen(preset: str, tmp_path: Path) -> None:
    config = compose([preset, *REQUIRED.get(preset, []), f"run.directory={tmp_path / 'run'}", "run.name=r"])
    frozen = load(freeze(config, {"budget": {"tokens": 123}}) / "config.yaml")
    if config.budget.kind == "epochs":  # counted by the trainer
        assert frozen == config
    else:
        assert frozen.model_copy(update={"budget": config.budget}) == config
        assert (frozen.budget.kind, frozen.budget.tokens) == ("tokens", 123)


@pytest.mark.parametrize(("key", "description"), list(sections(Config)), ids=lambda value: str(value)[:40])
def test_every_key_says_what_it_means(key: str, description: str | None) -> None:
    assert description, f"{key} needs a docstring below its field in configs/schema.py"


def test_no_preset_repeats_its_own_group(tmp_path: Path) -> None:
    for file in ROOT.glob("*/*.yaml"):
        if file.parent.name != "experiment":
            assert f"\n{file.parent.name}:" not in file.read_text(), f"{file} nests its keys once too deep"


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("run.directory='/tmp/\\${oops}'", lambda config: config.run.directory),
        ("run.name='1e5'", lambda config: config.run.name),
        ("run.name='2020-01-01'", lambda config: config.run.name),
        ("run.name='null'", lambda config: config.run.name),
        ('run.directory="/tmp/a: #b\nc é"', lambda config: config.run.directory),
        ("tracker.project='???x'", lambda config: config.tracker.project),
        ("optimizer.lr=1e-5", lambda config: config.optimizer.lr),
    ],
)
def test_a_hostile_value_survives_the_run_directory(override: str, read: Any, tmp_path: Path) -> None:
    config = compose([override])
    config.run.directory, shown = str(tmp_path / "run"), read(config)
    if "directory" in override:
        config.tracker.project = shown
    frozen = load(freeze(config, make_plan(config)) / "config.yaml")
    assert (frozen.tracker.project if "directory" in override else read(frozen)) == shown
