"""What every section of the configuration is made of: its base class, its types, its error."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class ConfigError(ValueError):
    """A mistake in the user's input. Its text is one printable line: key, value, what is allowed."""

    def __str__(self) -> str:
        return printable(" ".join(super().__str__().splitlines()))  # a value may hold line ends


def printable(text: str) -> str:
    """Text in which nothing can drive a terminal or reorder a line: other characters are escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
    )


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Fraction = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[int, Field(gt=0, lt=2**31)]
Tokens = Annotated[int, Field(gt=0, le=10**18)]
Quantity = Annotated[float, Field(ge=1e-3, le=1e7)]
"""Of what machines have, in the units of its key; what is computed from it stays finite."""
Text = Annotated[str, Field(min_length=1)]
Paths = Annotated[Annotated[list[Text], Field(min_length=1)] | None, BeforeValidator(_as_list)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)]
