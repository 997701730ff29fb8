"""Command-line overrides and YAML groups to a checked `Config`, through Hydra."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from configs.load import check_key, first_line, is_text, parse, unknown
from configs.schema import Config, ConfigError

ROOT = Path(__file__).resolve().parent


def compose(overrides: list[str], config_directory: Path | None = None) -> Config:
    """Compose and check one run.

    overrides: Hydra's syntax, for example ["model=llama-7b", "optimizer.lr=1e-4"].
    config_directory: a folder with more presets for our groups, under names that ours do not have.
    Raises ConfigError: one line that names the key, its value and what is allowed.
    """
    arguments = [_checked(override, config_directory) for override in overrides]
    if config_directory is not None:
        if not config_directory.is_dir():
            raise ConfigError(f"--config-dir={config_directory}: no such directory")
        path = str(config_directory.resolve()).replace("'", r"\'")
        arguments.append(f"hydra.searchpath=['file://{path}']")
    try:
        with initialize_config_dir(str(ROOT), version_base="1.3"):
            composed = hydra_compose("config", overrides=arguments, return_hydra_config=True)
        choices = composed.hydra.runtime.choices
        with open_dict(composed):
            composed.pop("hydra")
            for group in ("model", "hardware"):
                composed[group].name = choices[group]
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        key = getattr(error, "full_key", None) or "config"
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from None
    except ValueError as error:  # Hydra's own, for a malformed defaults list or text that is not UTF-8
        raise ConfigError(f"config: {first_line(error)}") from None
    except yaml.YAMLError as error:  # in a file of config_directory, which its text names
        raise ConfigError(f"config: {' '.join(str(error).split())}") from None
    return with_absolute_paths(parse(values))


def groups(config_directory: Path | None = None) -> dict[str, list[str]]:
    """Group name -> names of its presets."""
    found: dict[str, set[str]] = {}
    for root in filter(None, (ROOT, config_directory)):
        for file in root.glob("*/*.yaml"):
            names = found.setdefault(file.parent.name, set())
            if file.stem in names:
                raise ConfigError(f"{file}: a preset of ours has this name, choose another")
            names.add(file.stem)
    return {group: sorted(names) for group, names in sorted(found.items())} | (
        {} if "experiment" in found else {"experiment": []}
    )


def with_absolute_paths(config: Config) -> Config:
    """Local paths made absolute, so that a frozen run means the same from any directory."""
    config = config.model_copy(deep=True)
    for corpus in config.data.corpora.values():
        corpus.train = corpus.train and [_absolute(path) for path in corpus.train]
        corpus.validation = corpus.validation and [_absolute(path) for path in corpus.validation]
    for key in ("path", "tokenizer"):
        value = getattr(config.model, key)
        if value is not None and os.path.exists(os.path.expanduser(value)):
            setattr(config.model, key, _absolute(value))
    if config.run.directory is not None:
        if "://" in config.run.directory:
            raise ConfigError(f"run.directory={config.run.directory}: must be a local path")
        config.run.directory = _absolute(config.run.directory)
    return config


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _checked(text: str, config_directory: Path | None) -> str:
    """Check an override against groups and schema; return it in the form that Hydra accepts."""
    if "=" not in text and not text.startswith("~"):
        raise ConfigError(f"{text}: give KEY=VALUE")
    try:
        override: Override = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError) as error:
        raise ConfigError(
            f"{text}: {first_line(error)}; a value with special characters needs quotes, \"KEY='VALUE'\""
        ) from None
    if override.package is not None:
        raise ConfigError(f"{text}: a group has one place only; give {override.key_or_group}=PRESET")
    if override.is_sweep_override():
        raise ConfigError(f"{text}: a list of values needs a sweep; give one value")
    key, value = override.key_or_group, override.value()
    known = groups(config_directory)
    if override.is_delete():
        if key not in known:
            raise ConfigError(f"{text}: only a group can be removed: {', '.join(known)}")
        return text
    if key in known and not isinstance(value, dict):
        return _checked_choice(key, value, known[key])
    if is_text(check_key(key)) and isinstance(value, bool | int | float):
        # 2024_10 and 1e3 are numbers to Hydra; a name or a path keeps the letters that were typed.
        return f"++{key}='{text.partition('=')[2].strip()}'"
    return f"++{key}={override.get_value_element_as_str()}"


def _checked_choice(group: str, value: Any, presets: list[str]) -> str:
    name = str(value).removesuffix(".yaml")
    if name not in presets:
        message = unknown(f"{group}={value}", name, presets).replace("no such key", "no such preset")
        raise ConfigError(message)
    return f"{group}={name}"
