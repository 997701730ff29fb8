"""What did others train? A catalogue of published models with their sizes and tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from launcher.plan.pretrained import ConfigFile
from launcher.plan.shape import Shape, shape_from_config

CATALOGUE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True, kw_only=True)
class Published:
    """One entry of published.yaml, which explains the fields."""

    name: str
    layers: int
    """Of the encoder, and as many of the decoder, in T5."""
    hidden: int
    heads: int
    vocabulary: int
    sequence_length: int
    family: str
    source: str
    parameters_printed: float | None = None
    """As the source prints them; none where nothing but the sizes was printed."""
    tokens: float | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn: int | None = None
    global_batch: int | None = None
    hardware: str | None = None
    tflops: dict[int, float] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> float:
        """As printed, else counted from the sizes."""
        return self.parameters_printed or self.shape().parameters

    def shape(self, sequence_length: int | None = None) -> Shape:
        """The shape of the sizes; rows as long as published unless told."""
        sizes = {
            "model_type": self.family,
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "d_kv" if self.family == "t5" else "head_dim": self.head_dim,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.sequence_length,
        }
        config = ConfigFile(self.name, sizes | self.config)
        return shape_from_config(self.name, config, sequence_length or self.sequence_length)


def published(name: str) -> Published:
    """The entry of that name or alias, whatever its case and punctuation. Raises KeyError."""
    return _by_spelling()[_spelling(name)]


def published_in(text: str) -> Published:
    """The entry whose name or alias is the longest that the text contains. Raises KeyError."""
    spelled = _spelling(text)
    found = [name for name in _by_spelling() if name in spelled]
    if not found:
        raise KeyError(text)
    return _by_spelling()[max(found, key=len)]


@cache
def catalogue() -> tuple[Published, ...]:
    """All entries, in the order of published.yaml."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where libyaml was compiled in
    rows: dict[str, dict[str, Any]] = yaml.load(CATALOGUE.read_text(), loader)
    return tuple(_entry(name, dict(row)) for name, row in rows.items())


def _entry(name: str, row: dict[str, Any]) -> Published:
    # YAML 1.1 takes 15e12 for a text.
    printed, tokens = row.pop("parameters", None), row.pop("tokens", None)
    return Published(
        name=name,
        parameters_printed=None if printed is None else float(printed),
        tokens=None if tokens is None else float(tokens),
        aliases=tuple(row.pop("aliases", ())),
        **row,
    )


@cache
def _by_spelling() -> dict[str, Published]:
    return {_spelling(name): entry for entry in catalogue() for name in (entry.name, *entry.aliases)}


def _spelling(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
