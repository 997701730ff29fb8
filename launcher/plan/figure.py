"""The plan as a picture: memory by strategy against the limit, and loss against compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.plan.published import catalogue
from launcher.plan.scaling import BESIROGLU

COLOURS = {"fits": "#2a9d5c", "tight": "#e0a526", "does not fit": "#c8423b"}
INK, FAINT, ACCENT = "#1f2933", "#c5ccd3", "#2458a6"


def draw(plan: dict[str, Any], file: Path) -> None:
    """Write the plan's two panels to a file; its suffix says the format, such as .png, .svg or .pdf.

    Raises ValueError for a suffix that matplotlib cannot write, OSError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained", dpi=150)
    memory, loss = figure.subplots(1, 2)
    _memory(memory, plan["memory"])
    _loss(loss, plan)
    model, world = plan["model"], plan["world"]
    figure.suptitle(
        f"{model['name']} on {world['nodes']} x {world['gpus_per_node']} {world['hardware']}",
        color=INK,
        parse_math=False,
    )
    figure.savefig(file)


def _memory(axes: Any, memory: dict[str, Any]) -> None:
    """Bars of what a device would show, with their interval, and the limit as a line."""
    names = list(memory["by_strategy"])
    peaks = list(memory["by_strategy"].values())
    sizes = [peak["device_gib"] for peak in peaks]
    low_high = [peak["device_interval_gib"] for peak in peaks]
    errors = [
        [size - low for size, (low, _) in zip(sizes, low_high, strict=True)],
        [high - size for size, (_, high) in zip(sizes, low_high, strict=True)],
    ]
    axes.bar(names, sizes, yerr=errors, color=[COLOURS[peak["verdict"]] for peak in peaks], ecolor=INK)
    axes.axhline(memory["limit_gib"], color=INK, linestyle="--", linewidth=1)
    if max(sizes) > 8 * memory["limit_gib"]:
        axes.set_yscale("log")
    axes.set_ylabel("peak per rank, GiB")
    axes.set_title(
        f"Memory by strategy, limit {memory['limit_gib']:.1f} GiB (dashed); chosen: {memory['strategy']}",
        loc="left",
        fontsize=10,
    )
    axes.tick_params(axis="x", rotation=20)
    axes.spines[["top", "right"]].set_visible(False)


def _loss(axes: Any, plan: dict[str, Any]) -> None:
    """The frontier of the best loss for a compute budget, published models and this run on it."""
    points = [
        (entry.parameters, entry.tokens)
        for entry in catalogue()
        if entry.tokens and entry.family not in ("t5", "bert", "roberta")
    ]
    spent = [6 * parameters * tokens for parameters, tokens in points]
    budget = plan["budget"]
    parameters, tokens = budget["parameters"], budget["effective_tokens"]
    own = 6 * parameters * budget["tokens"]
    low, high = min(own, *spent), max(own, *spent)
    steps = 60
    line = [low / 3 * (high * 9 / low) ** (step / steps) for step in range(steps + 1)]
    axes.plot(
        line,
        [BESIROGLU.loss(*BESIROGLU.optimum(flops)) for flops in line],
        color=ACCENT,
        label="best for the compute (Besiroglu et al. 2024)",
    )
    axes.scatter(
        spent,
        [BESIROGLU.loss(*point) for point in points],
        color=FAINT,
        s=18,
        label="published models, by the same law",
    )
    axes.scatter([own], [BESIROGLU.loss(parameters, tokens)], color=COLOURS["does not fit"], zorder=3)
    axes.annotate(
        f"this run: {budget['tokens_per_parameter']:.3g} tokens per parameter",
        (own, BESIROGLU.loss(parameters, tokens)),
        xytext=(6, 6),
        textcoords="offset points",
    )
    axes.set_xscale("log")
    axes.set_xlabel("training compute, FLOPs")
    axes.set_ylabel("expected loss, nats per token")
    axes.set_title("Loss against compute", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
