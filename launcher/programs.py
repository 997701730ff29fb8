"""Verbs that are programs of the trainer, each in a process of its own so that this one starts fast."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile

import yaml

from cluster import exit_codes
from configs.compose import compose
from configs.schema import Config, ConfigError


def sample(options: argparse.Namespace) -> int:
    """let a run's exported model continue a prompt"""
    from launcher import registry

    directory = registry.find(options.run) / "export"
    if not directory.is_dir():
        raise ConfigError(f"{directory}: not exported yet; `trainyard export {options.run}` does it")
    return _trainer("trainer.sampling", str(directory), *options.rest)


def export(options: argparse.Namespace) -> int:
    """write a checkpoint as a Hugging Face directory"""
    from launcher import registry

    return _trainer("trainer.export", str(registry.find(options.run)), *options.rest)


def checkpoint(options: argparse.Namespace) -> int:
    """list a run's checkpoints, verify them, or convert them from and to other layouts"""
    from launcher import registry

    directory = registry.find(options.run)
    arguments = ("trainer.checkpoint", options.what, str(directory), *options.rest)
    if not any(word.startswith("--from") for word in options.rest):
        return _trainer(*arguments)
    with registry.hold(directory):  # what is training must not find a checkpoint that it has not written
        return _trainer(*arguments)


def data(options: argparse.Namespace) -> int:
    """look at a run's text: how much there is, how often it is read, what is wrong with it"""
    from launcher.freeze import fixed_budget
    from launcher.plan.plan import make_plan, resolve

    config = config_of(options)
    if options.cfg:
        return print_config(config)
    if config.budget.kind != "epochs":
        config = fixed_budget(config, make_plan(resolve(config)))
    wanted = [f"--{name}" for name in ("exact", "json") if getattr(options, name)]
    return _trainer_of("trainer.inspecting", config, *wanted)


def tokenize(options: argparse.Namespace) -> int:
    """tokenize a run's corpora ahead of training, into data.tokenized"""
    config = config_of(options)
    if options.cfg:
        return print_config(config)
    wanted = [f"--{name}" for name in ("verify", "json") if getattr(options, name)]
    return _trainer_of("trainer.tokenizing", config, f"--part={options.part}", *wanted)


def config_of(options: argparse.Namespace) -> Config:
    """The configuration that a command line asks for. Raises ConfigError."""
    return compose(options.overrides, options.config_dir)


def print_config(config: Config) -> int:
    """Write it out as YAML."""
    print(yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True), end="")
    return exit_codes.DONE


def _trainer(module: str, *arguments: str) -> int:
    return subprocess.run([sys.executable, "-P", "-m", module, *arguments]).returncode


def _trainer_of(module: str, config: Config, *arguments: str) -> int:
    """`_trainer` with a file that holds a configuration."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(config.model_dump(), file, sort_keys=False, allow_unicode=True)
        file.flush()
        return _trainer(module, file.name, *arguments)
