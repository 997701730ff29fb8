"""Writes the reference pages from what the programs themselves read: schema, presets, parser."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from configs.compose import ROOT, groups
from configs.schema import Config
from launcher.cli import VERBS, _parser

Schema = dict[str, Any]
WIDTH = 96

CONFIGURATION = """\
# Configuration

Every key of a run, from `configs/schema.py`. A key is set on the command line as `KEY=VALUE`; a group's
preset is chosen by its name, as in `model=llama-7b`, and its keys are then set one by one, as in
`model.sequence_length=4096`. Where a text says none, give `null`. A default is the schema's; a key that has
none there takes the value in the preset that is named. `trainyard plan --cfg job ...` prints what a command
line comes to.

"The whole run" has the keys that stand alone. A folder of your own presets, laid out as `configs/` is, is
added with `--config-dir DIR`.
"""

COMMANDS = """\
# Commands

Printed by `trainyard VERB --help`. What `sample` and `export` take after the run, they print themselves:
`trainyard sample RUN --help`, `trainyard export RUN --help`. Exit codes are listed in
[](../howto/stop-and-resume.md#exit-codes).
"""


def write(directory: Path) -> None:
    """Write configuration.md and commands.md to `directory`, unless they are the same already."""
    for name, text in (("configuration.md", configuration()), ("commands.md", commands())):
        path = directory / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def commands() -> str:
    """Help of each verb."""
    os.environ["COLUMNS"] = str(WIDTH)
    parser = _parser()
    verbs = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    parts = [COMMANDS, _block(parser.format_help())]
    for verb in VERBS:
        parts += [f"## {verb}\n", _block(verbs[verb].format_help())]
        nested = [action.choices for action in verbs[verb]._actions if isinstance(action.choices, dict)]
        parts += [_block(inner.format_help()) for choices in nested for inner in choices.values()]
    return "\n".join(parts)


def configuration() -> str:
    """One section per section of the schema: its keys, then its presets."""
    schema = Config.model_json_schema()
    root = yaml.safe_load((ROOT / "config.yaml").read_text())
    chosen: dict[str, str] = {}
    for entry in root.pop("defaults"):
        chosen |= entry if isinstance(entry, dict) else {}
    keys = {name: value for name, value in schema["properties"].items() if "$ref" not in value}
    parts = [CONFIGURATION, "## The whole run\n"]
    parts += [_key(name, value, _yaml(root.get(name))) for name, value in keys.items()]
    for name, value in schema["properties"].items():
        if name not in keys:
            section = _target(schema, value)
            preset = chosen.get(name)
            values = _preset(name, preset) if preset else {}
            parts += [f"## {name}\n", section["description"] + "\n"]
            for dotted, leaf in _keys(schema, section, name):
                there = f"{_yaml(values.get(dotted.removeprefix(f'{name}.')))} in preset {preset}"
                parts.append(_key(dotted, leaf, there))
            parts.append(_presets(name, preset))
    about = "Chooses presets of the other groups and sets keys anywhere. None is chosen by default."
    parts += ["## experiment\n", about + "\n", _presets("experiment", None)]
    return "\n".join(parts)


def _keys(schema: Schema, section: Schema, prefix: str) -> Iterator[tuple[str, Schema]]:
    """Dotted key and schema of each leaf of a section."""
    for name, value in section["properties"].items():
        key = f"{prefix}.{name}"
        if "$ref" in value:
            yield from _keys(schema, _target(schema, value), key)
        elif "patternProperties" in value:
            (entry,) = value["patternProperties"].values()
            yield from _keys(schema, _target(schema, entry), f"{key}.NAME")
        else:
            yield key, value


def _target(schema: Schema, reference: Schema) -> Schema:
    found: Schema = schema["$defs"][reference["$ref"].rsplit("/", 1)[1]]
    return found


def _key(dotted: str, schema: Schema, without_default: str) -> str:
    default = _yaml(schema["default"]) if "default" in schema else without_default
    meaning = " ".join(schema["description"].split())
    return f"`{dotted}`\n: {meaning}\\\n  {_allowed(schema)}. Default: {default}.\n"


def _allowed(schema: Schema) -> str:
    if "anyOf" in schema:
        choices = [choice for choice in schema["anyOf"] if choice.get("type") != "null"]
        return " or ".join([*map(_allowed, choices), "`null`"])
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    match schema["type"]:
        case "boolean":
            return "`true` or `false`"
        case "integer" | "number":
            return ("Whole number" if schema["type"] == "integer" else "Number") + _range(schema)
        case "array":
            return "Text or a list of texts"
        case _ if "pattern" in schema:
            return "Letters, digits, `.`, `_` and `-`"
        case _:
            return "Text"


def _range(schema: Schema) -> str:
    bounds = [
        f"{words} {schema[key]}"
        for key, words in (
            ("exclusiveMinimum", "above"),
            ("minimum", "from"),
            ("maximum", "to"),
            ("exclusiveMaximum", "to below"),
        )
        if key in schema
    ]
    return f" {' '.join(bounds)}" if bounds else ""


def _presets(group: str, default: str | None) -> str:
    names = groups().get(group, [])
    if not names:
        return ""
    rows = ["| Preset | What it is |", "| --- | --- |"]
    for name in names:
        lines = (ROOT / group / f"{name}.yaml").read_text().splitlines()
        about = " ".join(
            line[1:].strip() for line in lines if line.startswith("#") and "@package" not in line
        )
        values = [f"{key} {_yaml(value)}" for key, value in _preset(group, name).items() if key != "defaults"]
        mark = " (default)" if name == default else ""
        rows.append(f"| `{name}`{mark} | {about}{' ' * bool(about)}Sets {', '.join(values)}. |")
    return "\n".join(rows) + "\n"


def _preset(group: str, name: str) -> dict[str, Any]:
    """Dotted key -> value of a preset."""
    return dict(_flat(yaml.safe_load((ROOT / group / f"{name}.yaml").read_text()) or {}))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _yaml(value: Any) -> str:
    if value in ("", "???"):
        return "empty" if value == "" else "to be given"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"
