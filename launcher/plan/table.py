"""The plan as tables for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from launcher.plan.budget import verdict_of
from launcher.plan.explain import rows as explained
from launcher.plan.loss import perplexity
from launcher.plan.published import catalogue
from launcher.words import UNKNOWN, duration, percent, short

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
    """What a run will take: print it with rich.console.Console().print."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in (*_sizes(plan), *_needs(plan)):
        table.add_row(name, value)
    notes = [Text(f"{name}: {sentence}", style="dim") for name, sentence in plan["assumptions"].items()]
    said = [Text(sentence) for sentence in plan["budget"]["advice"]]
    return Group(table, _advice(plan), *said, *notes)


def render_explained(plan: dict[str, Any]) -> Group:
    """Every number of the plan with formula and source, and published models with their verdict."""
    numbers = Table("quantity", "value", "formula", "source", box=box.SIMPLE_HEAD, pad_edge=False)
    for path, value, origin in explained(plan):
        if not path.startswith(("advice.", "memory.by_strategy.")):
            numbers.add_row(path, f"{value:.6g}", origin.formula, origin.source)
    return Group(numbers, _published(plan))


def render_values(answer: dict[str, Any]) -> Table:
    """One value a line."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    for name, value in answer.items():
        table.add_row(name, Text(f"{value:.4g}" if isinstance(value, float) else str(value)))
    return table


def render_verified(answer: dict[str, Any]) -> Group:
    """Closed form against trace."""
    table = Table("", "closed form", "traced", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_row("peak, GiB", f"{answer['closed_form_gib']:.3f}", f"{answer['traced_gib']:.3f}")
    table.add_row("at", answer["closed_form_regime"], answer["traced_moment"])
    parts = answer["closed_form_by_component_gib"], answer["traced_by_category_gib"]
    for name in dict.fromkeys((*parts[0], *parts[1])):
        table.add_row(name, *(f"{part[name]:.3f}" if name in part else "" for part in parts))
    return Group(table, Text(f"closed form / traced: {answer['ratio']:.4f}, {answer['seconds']:.0f} s"))


def _sizes(plan: dict[str, Any]) -> Iterator[tuple[str, Text]]:
    model, budget, compute, world = plan["model"], plan["budget"], plan["compute"], plan["world"]
    active = model["parameters_active"]
    of_which = f" ({short(active)} active)" if active != model["parameters"] else ""
    yield (
        "model",
        Text(
            f"{_printable(model['name'])}, {short(model['parameters'])} parameters{of_which}, "
            f"{model['layers']} x {model['hidden']}, {model['heads']} heads, "
            f"{model['sequence_length']} tokens per row"
        ),
    )
    yield (
        "budget",
        _judged(
            f"{short(budget['tokens'])} tokens, {budget['tokens_per_parameter']:.3g} per parameter, "
            f"{budget['steps']:,} steps of {short(budget['global_batch_tokens'])} tokens",
            budget["verdict"],
        ),
    )
    if len(budget["tokens_by_corpus"]) > 1:
        split = (f"{name} {short(tokens, 3)}" for name, tokens in budget["tokens_by_corpus"].items())
        yield "", Text(", ".join(split), style="dim")
    if budget["continuation"]:
        anew = budget["continuation"]["cost_of_training_anew"]
        yield "", Text(f"{percent(anew)} of the compute of training anew on the parent's and this text")
    yield (
        "compute",
        Text(f"{compute['flops']:.3g} FLOPs, {short(compute['petaflop_s_days'], 3)} petaFLOP/s-days"),
    )
    loss = budget["loss_nats"]["besiroglu"]
    best = budget["optimum"][budget["law"]]
    yield (
        "",
        Text(
            f"best spent on {short(best['parameters'], 3)} parameters and {short(best['tokens'], 3)} tokens; "
            f"expected loss {loss:.2f} nats per token, {_meaning(loss, plan['model']['vocabulary'])}",
            style="dim",
        ),
    )
    yield (
        "world",
        Text(
            f"{world['nodes']} x {world['gpus_per_node']} {world['hardware']}, {world['sharding']}, "
            f"{world['precision']}, {world['activation_checkpointing']} checkpointing, global batch "
            f"{world['global_batch']} = {world['data_parallel']} ranks x {world['micro_batch']} x "
            f"{world['accumulation']}"
        ),
    )


def _needs(plan: dict[str, Any]) -> Iterator[tuple[str, Text]]:
    memory, time, price, checkpoint = plan["memory"], plan["time"], plan["cost"], plan["checkpoint"]
    low, high = memory["device_interval_gib"]
    yield (
        "memory",
        _judged(
            f"{memory['device_gib']:.1f} ({low:.1f} to {high:.1f}) of {memory['limit_gib']:.1f} GiB per "
            f"rank; active {memory['active_gib']:.1f}, reserved {memory['reserved_gib']:.1f}",
            memory["verdict"],
        ),
    )
    parts = (f"{name} {gib:.3g}" for name, gib in memory["components_gib"].items() if gib)
    yield "", Text(f"fullest at {memory['regime']}: {', '.join(parts)}", style="dim")
    if memory["offloaded"]:
        there = memory["host_limit_gib"]
        of = f" of {there:.0f}" if there else ", of an unknown size (hardware.host_memory_gib)"
        yield "", Text(f"host memory {memory['host_gib']:.0f}{of} GiB per node")
    yield (
        "strategies",
        Text("; ").join(
            _judged(f"{name} {peak['device_gib']:.1f} GiB", peak["verdict"])
            for name, peak in memory["by_strategy"].items()
        ),
    )
    yield "time", Text(_pace(time))
    if time["parts_seconds"]:
        shares = ((name, part / time["step_seconds"]) for name, part in time["parts_seconds"].items())
        of_step = ", ".join(f"{name} {percent(share)}" for name, share in shares if share >= 0.005)
        yield "", Text(f"bound by {time['bound_by']}: {of_step}", style="dim")
    if price["gpu_hours"] is not None:
        money = f", ${price['usd']:,.0f}" if price["usd"] is not None else ""
        power = (
            f", {price['kwh']:,.0f} kWh, {price['kg_co2']:,.0f} kg CO2" if price["kwh"] is not None else ""
        )
        yield "cost", Text(f"{price['gpu_hours']:,.0f} GPU-hours{money}{power}")
    yield (
        "checkpoint",
        Text(
            f"{checkpoint['size_gib']:.3g} GiB, every {duration(60 * checkpoint['interval_minutes'])}; a "
            f"failure every {duration(3600 * checkpoint['hours_between_failures'])}, goodput "
            f"{percent(checkpoint['expected_goodput'])}"
        ),
    )


def _advice(plan: dict[str, Any]) -> Table | Text:
    if not plan["advice"]:
        return Text("Nothing fits on these machines: add nodes, or take a smaller model.", style="bold red")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("best that fit", no_wrap=True)
    for column in ("GiB", "step", "MFU", "why"):
        table.add_column(column)
    for choice in plan["advice"]:
        name = "\n".join(choice["overrides"]) + ("" if choice["native"] else "\n(needs DeepSpeed)")
        table.add_row(
            Text(name),
            Text(f"{choice['device_gib']:.1f}", style=VERDICT_STYLES[choice["verdict"]]),
            duration(choice["step_seconds"]),
            percent(choice["mfu"]),
            Text(choice["reason"]),
        )
    said = {
        "your_choice": "the best is faster than yours by",
        "memory_limit": "more memory would gain",
        "without_recomputing": "recomputation gains",
        "micro_batch_of_one": "micro batches above one gain",
    }
    prices = (f"{said[name]} {percent(gain)}" for name, gain in plan["prices"].items() if gain)
    table.caption = "; ".join(prices) or None
    table.caption_justify = "left"
    return table


def _published(plan: dict[str, Any]) -> Table:
    """Parameters and tokens of published models, with the verdict of 20 tokens per parameter."""
    table = Table("model", "parameters", "tokens", "per parameter", "verdict", box=box.SIMPLE_HEAD)
    budget = plan["budget"]
    own = (f"{_printable(plan['model']['name'])} (this run)", budget["parameters"], budget["tokens"])
    for name, parameters, tokens in (
        own,
        *((entry.name, entry.parameters, entry.tokens) for entry in catalogue() if entry.tokens),
    ):
        verdict = verdict_of(parameters, tokens)
        table.add_row(
            Text(name),
            short(parameters),
            short(tokens),
            f"{tokens / parameters:.3g}",
            Text(verdict, style=VERDICT_STYLES[verdict]),
        )
    return table


def _printable(name: str) -> str:
    """Without what would speak to the terminal: a directory may have any name."""
    return "".join(letter for letter in name if letter.isprintable())


def _meaning(loss_nats: float, vocabulary: int) -> str:
    """What a loss amounts to; laws promise tiny runs losses above that of a guess, e to which overflows."""
    if loss_nats > math.log(vocabulary):
        return "no better than guessing"
    return f"perplexity {perplexity(loss_nats):.1f}"


def _judged(text: str, verdict: str) -> Text:
    return Text.assemble(text, ", ", (verdict, VERDICT_STYLES[verdict]))


def _pace(time: dict[str, Any]) -> str:
    if time["seconds"] is None:
        return UNKNOWN
    utilisation = ""
    if time["mfu"] is not None:
        utilisation = f", MFU {percent(time['mfu'])}"
        if time["hfu"] > 1.005 * time["mfu"]:
            utilisation += f" (HFU {percent(time['hfu'])})"
    low, high = time["step_seconds_low"], time["step_seconds_high"]
    return (
        f"{duration(time['seconds'])}: {duration(time['step_seconds'])} per step "
        f"({duration(low)} to {duration(high)}), {short(time['tokens_per_second'], 3)} tokens per second"
        f"{utilisation}"
    )
