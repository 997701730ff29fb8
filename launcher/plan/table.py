"""The plan as a table for people."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

VERDICT_STYLES = {
    "fits": "green",
    "balanced": "green",
    "continued": "green",
    "tight": "yellow",
    "under-trained": "yellow",
    "over-trained": "yellow",
    "does not fit": "bold red",
}


def render(plan: dict[str, Any]) -> Group:
    """A rich renderable: print it with rich.console.Console().print."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in _rows(plan):
        table.add_row(name, value)
    notes = [Text(f"{name}: {sentence}", style="dim") for name, sentence in plan["assumptions"].items()]
    return Group(table, *notes)


def _rows(plan: dict[str, Any]) -> list[tuple[str, Text]]:
    model, budget, memory = plan["model"], plan["budget"], plan["memory"]
    compute, time, world = plan["compute"], plan["time"], plan["world"]
    return [
        (
            "model",
            Text(
                f"{model['name']}, {count(model['parameters'])} parameters, {model['layers']} x "
                f"{model['hidden']}, {model['heads']} heads, {model['sequence_length']} tokens per row"
            ),
        ),
        (
            "budget",
            _judged(
                f"{count(budget['tokens'])} tokens, {budget['tokens_per_parameter']:.3g} per parameter, "
                f"{budget['steps']:,} steps of {count(budget['global_batch_tokens'])} tokens",
                budget["verdict"],
            ),
        ),
        (
            "compute",
            Text(f"{compute['flops']:.2g} FLOPs, {compute['petaflop_s_days']:.3g} petaFLOP/s-days"),
        ),
        (
            "world",
            Text(
                f"{world['nodes']} x {world['gpus_per_node']} {world['hardware']}, {world['sharding']}, "
                f"{world['precision']}, global batch {world['global_batch']} = {world['world_size']} ranks x "
                f"{world['micro_batch']} x {world['accumulation']}"
            ),
        ),
        (
            "memory",
            _judged(
                f"{memory['device_gib']:.1f} of {memory['limit_gib']:.1f} GiB per rank", memory["verdict"]
            ),
        ),
        ("", Text(_parts(memory["components_gib"]), style="dim")),
        (
            "strategies",
            Text("; ").join(
                _judged(f"{name} {peak['device_gib']:.1f} GiB", peak["verdict"])
                for name, peak in memory["by_strategy"].items()
            ),
        ),
        ("time", Text(_pace(time))),
        ("checkpoint", Text(f"{plan['checkpoint']['size_gib']:.3g} GiB")),
    ]


def count(number: float) -> str:
    """134768312320 -> 134.8 B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 10 else 1}f} {unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """5400 -> 1.5 hours."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} seconds"


def _judged(text: str, verdict: str) -> Text:
    return Text.assemble(text, ", ", (verdict, VERDICT_STYLES[verdict]))


def _parts(components_gib: dict[str, float]) -> str:
    return ", ".join(f"{name} {gib:.3g}" for name, gib in components_gib.items() if gib)


def _pace(time: dict[str, Any]) -> str:
    if time["seconds"] is None:
        return "unknown"
    utilization = f", {time['mfu']:.0%} MFU" if time["mfu"] is not None else ""
    return (
        f"{duration(time['seconds'])}: {duration(time['step_seconds'])} per step, "
        f"{count(time['tokens_per_second'])} tokens per second{utilization}"
    )
