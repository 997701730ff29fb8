"""What a published fact asks of the planner: a prediction, what was published, and how close is close."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from launcher.plan.published import Published, catalogue, published, published_in
from launcher.plan.setup import Checkpointing, Strategy
from launcher.plan.shape import Shape, gpt_like, llama_like

Row = dict[str, Any]
"""id, kind, inputs, formula, expected, unit, tol_rel; formula and id may say what inputs do not."""


@dataclass(frozen=True)
class Check:
    """One number, verdict or choice of the planner beside the published one."""

    predicted: Any
    expected: Any
    tolerance: float
    """Largest relative deviation of a number; texts must be equal."""

    @property
    def deviation(self) -> float:
        """|predicted / expected - 1|; for anything but numbers 0 when equal and infinite otherwise."""
        numbers = (int, float)
        if isinstance(self.expected, bool) or not isinstance(self.expected, numbers):
            return 0.0 if self.predicted == self.expected else float("inf")
        if not isinstance(self.predicted, numbers):
            return float("inf")
        if self.expected == 0:
            return 0.0 if self.predicted == 0 else float("inf")
        return abs(self.predicted / self.expected - 1)

    @property
    def within(self) -> bool:
        return self.deviation <= self.tolerance


Evaluator = Callable[[Row], list[Check]]


def compare(row: Row, predicted: Any) -> list[Check]:
    """The checks of a row with one expected value, or with a list of them."""
    tolerance = float(row["tol_rel"] or 0)
    if isinstance(row["expected"], list):
        assert len(predicted) == len(row["expected"]), f"{len(predicted)} numbers predicted: {predicted}"
        return [
            Check(value, expected, tolerance)
            for value, expected in zip(predicted, row["expected"], strict=True)
        ]
    return [Check(predicted, row["expected"], tolerance)]


TEXTS = ("id", "kind", "formula", "unit", "note", "source", "source_inconsistent")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def normalised(row: Row) -> Row:
    """The row with every key that an evaluator may ask for; numbers like 1e9 are texts in YAML 1.1."""
    filled = {"expected": None, "tol_rel": None} | row
    texts = {key: str(row[key]) if row.get(key) is not None else "" for key in TEXTS}
    inputs = {str(key): _number(value) for key, value in (row.get("inputs") or {}).items()}
    expected = filled["expected"]
    expected = [_number(value) for value in expected] if isinstance(expected, list) else _number(expected)
    return filled | texts | {"inputs": inputs, "expected": expected, "tol_rel": _number(filled["tol_rel"])}


def _number(value: Any) -> Any:
    if not isinstance(value, str) or NUMBER.fullmatch(value) is None:
        return value
    return int(value) if value.isdigit() else float(value)


def number_in(pattern: str, text: str, default: Any = None) -> Any:
    """The number that the first group that matched holds, whatever the case of words around it."""
    found = re.search(pattern, text, re.IGNORECASE)
    return _number(next(group for group in found.groups() if group)) if found else default


STAGES: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3")


def strategy_named(text: str) -> Strategy:
    """The strategy that words like ZeRO-2, z3, FSDP2, SHARD_GRAD_OP, "FSDP2 zero3" or HYBRID_SHARD mean."""
    words = re.sub(r"[^a-z0-9]", "", text.lower())
    stage: int | None = number_in(r"z(?:ero)?(?:stage)?([0-3])|stage([0-3])", words)
    fsdp = "fsdp" in words or "fullshard" in words
    if "hybrid" in words or "hsdp" in words:
        return "hsdp"
    if "gradop" in words or (fsdp and stage == 2):
        return "fsdp_grad_op"
    if fsdp:
        return "fsdp"
    if stage is not None:
        return STAGES[stage]
    if any(word in words for word in ("ddp", "noshard", "replicate", "allreduce", "dataparallel")):
        return "ddp"
    raise ValueError(f"strategy {text!r}: means none of {', '.join(STAGES)}, fsdp, fsdp_grad_op, hsdp")


def checkpointing_named(said: object) -> tuple[Checkpointing, int]:
    """What a block recomputes, and of how many blocks one does: 2 in torchtitan's "selective layer(2)"."""
    words = str(said).lower().replace("_", " ").strip()
    if words in ("none", "false", "no", "off", "no ac", ""):
        return "none", 1
    if words in ("full", "true", "yes", "on", "full ac"):
        return "full", 1
    if "layer" in words or re.fullmatch(r"selective ?\(?\d+\)?|\d+", words):
        return "full", number_in(r"(\d+)", words, 2)
    if words in ("op", "selective", "selective op", "sac", "selective(op)", "op sac"):
        return "selective", 1
    raise ValueError(f"activation checkpointing {said!r}: must be none, full, selective (op) or layer(k)")


def entry_of(row: Row) -> Published:
    """The published model that a row names, or has the parameters of to 3 %."""
    given = row["inputs"]
    if "model" in given:
        return published(given["model"])
    parameters = given.get("params")
    candidates = [nearest_published(parameters)] if parameters else []
    with suppress(KeyError):
        candidates.insert(0, published_in(row["id"]))
    for model in candidates:
        if parameters is None or abs(model.parameters / parameters - 1) <= 0.03:
            return model
    raise KeyError(f"{row['id']}: names no published model of {parameters} parameters")


def nearest_published(parameters: float) -> Published:
    return min(catalogue(), key=lambda model: abs(model.parameters - parameters))


SIZES = {
    "layers": ("layers", "n_layers", "L"),
    "hidden": ("hidden", "dim", "d", "d_model", "h"),
    "heads": ("heads", "n_heads", "a"),
    "kv_heads": ("kv_heads", "kv"),
    "head_dim": ("head_dim", "kq"),
    "ffn": ("ffn", "ffw", "intermediate"),
    "vocabulary": ("vocab", "vocabulary", "V"),
    "sequence_length": ("seq", "sequence_length", "s"),
}
"""Our names of sizes, and those of rows."""
UNSAID_VOCABULARY, UNSAID_SEQUENCE, UNSAID_HEAD_DIM = 50304, 2048, 128


def sizes_of(given: dict[str, Any]) -> dict[str, Any]:
    """The sizes of a row by our names, those that it has."""
    found: dict[str, Any] = {}
    for ours, theirs in SIZES.items():
        value = next((given[name] for name in theirs if given.get(name) is not None), None)
        if value is not None:
            found[ours] = int(value)
    return found


def shape_of_sizes(given: dict[str, Any]) -> Shape:
    """A model by the sizes in a row: of a plain GPT and a gated Llama the one with its parameters.

    Without a number of parameters, a feed-forward layer four times as wide as the model is taken for plain.
    """
    sizes = sizes_of(given)
    if not {"layers", "hidden"} <= sizes.keys():
        raise KeyError(f"neither a published model nor layers and hidden are in {given}")
    hidden = sizes["hidden"]
    sizes.setdefault("heads", max(1, hidden // UNSAID_HEAD_DIM))
    sizes.setdefault("vocabulary", UNSAID_VOCABULARY)
    sizes.setdefault("sequence_length", UNSAID_SEQUENCE)
    sizes.setdefault("ffn", 4 * hidden)
    plain = gpt_like(**sizes, tied=given.get("tied", True))
    gated = llama_like(**sizes, tied=given.get("tied", False))
    if given.get("params"):
        return min(plain, gated, key=lambda shape: abs(shape.parameters - given["params"]))
    return plain if sizes["ffn"] == 4 * hidden else gated
