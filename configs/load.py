"""Plain values to a checked `Config`, and one line for each mistake."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from configs.schema import Config, ConfigError


def load(path: Path) -> Config:
    """Read a resolved configuration, as written to RUN/config.yaml.

    Raises ConfigError when the file is missing, is not YAML or does not match the schema.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; a run directory holds config.yaml") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no configuration")
    return parse(values)


def parse(values: Any) -> Config:
    """Check plain nested values against the schema. Raises ConfigError, one line."""
    if missing := next(_missing(values), None):
        raise ConfigError(f"{missing}: required, give {missing}=VALUE")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error.errors()[0])) from None


def check_key(dotted: str) -> Any:
    """Type of a key in the schema. Raises ConfigError with the nearest valid key if it has none."""
    annotation: Any = Config
    done: list[str] = []
    for part in dotted.split("."):
        sections, open_mapping = _children(annotation)
        if open_mapping is not None:
            annotation = open_mapping
        elif part in sections:
            annotation = sections[part]
        else:
            raise ConfigError(unknown(dotted, part, sections, ".".join(done)))
        done.append(part)
    return annotation


def is_text(annotation: Any) -> bool:
    """Whether a key of this type holds text, or a list of texts."""
    return annotation is str or any(is_text(inner) for inner in typing.get_args(annotation))


def unknown(shown: str, part: str, valid: Iterable[str], parent: str = "") -> str:
    """One line for a name that does not exist: nearest match, or all that do exist."""
    valid = sorted(valid)
    near = difflib.get_close_matches(part, valid, n=1, cutoff=0.6)
    leaves = {} if near or parent else _leaves(Config)
    if nested := difflib.get_close_matches(part, list(leaves), n=1, cutoff=0.75):
        return f"{shown}: no such key; did you mean {leaves[nested[0]]}?"
    if near:
        return f"{shown}: no such key; did you mean {'.'.join(filter(None, [parent, near[0]]))}?"
    where = f"allowed under {parent}" if parent else "allowed"
    return f"{shown}: no such key; {where}: {', '.join(valid) or 'nothing'}"


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's text, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def reason(error: OSError) -> str:
    """What the operating system refused, in one line that begins with the file if it is known."""
    text = error.strerror or first_line(error)
    return f"{error.filename}: {text}" if error.filename else text


def _leaves(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Last part of each key -> dotted key."""
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        sections, _ = _children(field.annotation)
        if sections and isinstance(field.annotation, type):
            found |= _leaves(field.annotation, f"{prefix}{name}.")
        else:
            found[name] = prefix + name
    return found


def _children(annotation: Any) -> tuple[dict[str, Any], Any]:
    """Keys below a type: named ones, or the value type of an open mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {name: field.annotation for name, field in annotation.model_fields.items()}, None
    origin = typing.get_origin(annotation)
    if origin is dict:
        return {}, typing.get_args(annotation)[1]
    if origin in (types.UnionType, typing.Union):
        for choice in typing.get_args(annotation):
            sections, open_mapping = _children(choice)
            if sections or open_mapping is not None:
                return sections, open_mapping
    return {}, None


def _missing(values: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _missing(value, f"{prefix}.{key}" if prefix else str(key))
    elif values == "???":
        yield prefix


def _explain(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    if error["type"] == "value_error" and isinstance(context.get("error"), ValueError):
        return str(context["error"])
    location = [str(part) for part in error["loc"]]
    key, value = ".".join(location), error["input"]
    if error["type"] == "extra_forbidden":
        annotation: Any = Config
        for part in location[:-1]:
            sections, open_mapping = _children(annotation)
            annotation = open_mapping if open_mapping is not None else sections.get(part)
        return unknown(key, location[-1], _children(annotation)[0], ".".join(location[:-1]))
    if error["type"] == "missing":
        return f"{key}: required, give {key}=VALUE"
    bounds = {
        "greater_than": "must be greater than {gt}",
        "greater_than_equal": "must be at least {ge}",
        "less_than": "must be less than {lt}",
        "less_than_equal": "must be at most {le}",
        "literal_error": "allowed: {expected}",
        "too_short": "needs at least {min_length}",
        "string_too_short": "must not be empty",
        "finite_number": "must be a finite number",
        "string_pattern_mismatch": "allowed are letters, digits, '.', '_' and '-'",
    }
    kinds = {
        "int": "must be a whole number",
        "float": "must be a number",
        "bool": "must be true or false",
        "string": "must be text",
        "model": f"a section, give {key}.KEY=VALUE",
    }
    allowed = (
        bounds[error["type"]].format(**context)
        if error["type"] in bounds
        else kinds.get(error["type"].split("_")[0], error["msg"].lower())
    )
    return f"{key}={value}: {allowed}"
