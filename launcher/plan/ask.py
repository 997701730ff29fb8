"""Questions that only torch can answer, asked of a process of its own: this one never imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

import yaml

from configs.schema import Config, ConfigError


def ask(module: str, config: Config) -> dict[str, Any]:
    """The JSON object that a program of the trainer prints about a configuration.

    Raises ConfigError with the program's last line when it ends otherwise.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(config.model_dump(), file, allow_unicode=True)
        file.flush()
        command = [sys.executable, "-P", "-m", module, file.name]
        outcome = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if outcome.returncode:
        lines = outcome.stderr.strip().splitlines()
        said = lines[-1].removeprefix("trainyard: ") if lines else f"exit code {outcome.returncode}"
        raise ConfigError(
            said if outcome.returncode > 0 else f"{module}: ended by signal {-outcome.returncode}"
        )
    answer: dict[str, Any] = json.loads(outcome.stdout.splitlines()[-1])
    return answer
