"""How rows about time, cost, strategies and failures are asked of the planner."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from truth import (
    Check,
    Evaluator,
    Row,
    checkpointing_named,
    compare,
    nearest_published,
    number_in,
    shape_of_sizes,
    sizes_of,
    strategy_named,
)

from configs.schema import ConfigError, Hardware, PlanOptions
from launcher.plan import communication, cost, recompute, reliability, time
from launcher.plan.advice import Choice, best, choices
from launcher.plan.checkpoint_size import training_state_bytes
from launcher.plan.hardware import hardware_named
from launcher.plan.published import catalogue, published_in
from launcher.plan.scaling import training_flops
from launcher.plan.setup import Setup, Strategy
from launcher.plan.shape import Shape, gpt_like

SECONDS_PER_HOUR = 3600
UNKNOWN_GPUS = 512
"""Ranks of a run whose size was not published; they hardly matter to its GPU-hours."""
UNKNOWN_EFFICIENCY = 0.35
"""Whole-run 6 N D over the peak for runs whose sizes are not in the row."""
UNKNOWN_BATCH_TOKENS = 4e6
"""Tokens of a step of a run whose batch was not published; at least a row per rank."""
TIE = 0.1
"""Relative difference in step time below which two strategies are equally fast: the plan cannot tell."""
NODE_OF = {"64": 4}
"""Accelerators of a node where they are not eight: the 64 GB boards of Leonardo and MareNostrum 5."""
RECOMPUTE_UNSAID: dict[str, Any] = {"rows": 4, "tensor_parallel": 8}
"""Of Korthikanti et al. 2022, table 3: how the 22B model of table 4 was split."""
ZERO_NAMES: dict[Strategy, str] = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


def numbers(text: str) -> list[float]:
    """Numbers of a formula, like 7200, 5.2e3 and 180K; not those inside names."""
    found = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?(?:e\d+)?)(K?)(?![\w.])", text)
    return [float(number) * (1000 if thousand else 1) for number, thousand in found]


def run_gpuhours(row: Row) -> list[Check]:
    """Hours at the published utilisation, and hours as planned; a machine that no preset describes is
    planned by its peak."""
    given, expected = row["inputs"], row["expected"]
    if rate := re.search(r"(\d+)K .*?-h per T tokens", row["formula"]):
        return compare(row, cost.gpu_hours_of_rate(given["tokens"], 1000 * float(rate[1])))
    flops = training_flops(given.get("active") or given["params"], given["tokens"])
    try:
        hardware = hardware_named(given["gpu"])
    except ConfigError:
        if not given.get("peak"):
            raise
        hardware = None
    peak: Any = given.get("peak") or (hardware and time.peak_flops_per_second(hardware, "bf16"))
    checks = []
    if (mfu := given.get("whole_run_mfu_6ND")) is not None:
        checks.append(Check(cost.gpu_hours(flops, peak, mfu), expected, 0.01))
    if row["tol_rel"] is not None:
        known = {"layers", "hidden", "heads"} <= sizes_of(given).keys() and "active" not in given
        if known and hardware is not None:
            hours = planned_gpu_hours(given, hardware)
        else:
            hours = cost.gpu_hours(flops, peak, UNKNOWN_EFFICIENCY)
        factor = max(hours / expected, expected / hours)
        checks.append(Check(factor, 1.0, float(row["tol_rel"])))
    return checks


def planned_gpu_hours(given: dict[str, Any], hardware: Hardware) -> float:
    """What the plan says when it knows the model, its tokens and the machine, but not how it was trained."""
    shape = shape_of_sizes(given)
    gpus = given.get("gpus") or UNKNOWN_GPUS
    options = PlanOptions()
    chosen = way_to_train(shape, gpus, hardware)
    size_bytes = training_state_bytes(shape.parameters, "fp32")
    broken = reliability.reliability(size_bytes, max(1, gpus // 8), options)
    setup = chosen.setup
    tokens = setup.data_parallel * setup.micro_batch * setup.accumulation * shape.sequence_length
    run = time.run_time(
        chosen.time, round(given["tokens"] / tokens), options.productive_share, broken.expected_goodput
    )
    assert run.seconds is not None
    return run.seconds * gpus / SECONDS_PER_HOUR


def way_to_train(shape: Shape, gpus: int, hardware: Hardware) -> Choice:
    """The best advice for the machine, with matrices whole or split over a node."""
    advised: list[Choice] = []
    for tensor_parallel in (1, 8):
        base = Setup("fsdp", gpus, 8, 1, tensor_parallel=tensor_parallel)
        rows = max(1, round(UNKNOWN_BATCH_TOKENS / shape.sequence_length / base.data_parallel))
        advised += best(choices(shape, base, rows * base.data_parallel, hardware))[:1]
    return max(advised, key=lambda choice: choice.time.tokens_per_second or 0)


def money(row: Row) -> list[Check]:
    """Kinds cost and seed_cost."""
    given, unit = row["inputs"], row["unit"].lower()
    hours = given.get("gpu_hours")
    if hours is None and {"gpus", "days"} <= given.keys():
        hours = cost.gpu_hours_of_days(given["days"], given["gpus"])
    if hours is not None:
        if re.search(r"(/|per) ?(gpu|h)", unit):
            return compare(row, given["usd"] / hours)
        if "watts" in given:
            return compare(row, energy(row["unit"], hours, given))
        price = given.get("usd", given.get("usd_per_gpu_hour", given.get("usd_per_hour")))
        return compare(row, hours if price is None else cost.price_usd(hours, price))
    if "usd" in given:
        return compare(row, cost.usd_per_million_parameters(given["usd"], given["params"]))
    if {"n", "m"} <= given.keys():
        flops, others = (
            training_flops(given[run], given.get(f"{run}_tokens", given.get("tokens", 1.0))) for run in "nm"
        )
        return compare(row, cost.relative_cost(flops, others))
    return compare(row, cost.price_usd(*numbers(row["formula"])))


def energy(unit: str, hours: float, given: dict[str, Any]) -> float:
    kwh = cost.energy_kwh(hours, given["watts"], given.get("pue", 1.0))
    if "CO2" not in unit:
        if "usd_per_kwh" in given:
            return cost.price_usd(kwh, given["usd_per_kwh"])
        return kwh / (1e6 if "GWh" in unit else 1000 if "MWh" in unit else 1)
    factor = given.get("kg_per_kwh", given.get("kg_co2_per_kwh", PlanOptions().kg_co2_per_kwh))
    return cost.emissions_kg_co2(kwh, factor) / (1 if unit.startswith("kg") else 1000)


DAYS_OF_FLOPS = (("P", "params", "N"), ("T", "tokens", "D"), ("n", "gpus"), ("X", "tflops"))
"""Names of parameters, tokens, accelerators and the rate of one."""


def days(row: Row) -> list[Check]:
    given, formula = row["inputs"], row["formula"]
    if row["unit"] == "tokens":
        stages = [prod(numbers(stage)) for stage in formula.split("+")]
        return compare(row, sum(stages))
    asked: list[Any] = [
        next((given[name] for name in names if name in given), None) for names in DAYS_OF_FLOPS
    ]
    if None not in asked:
        parameters, tokens, gpus, flops_per_second = asked
        rate = flops_per_second * (1e12 if "tflops" in given else 1)
        factor = number_in(r"(\d+) ?\*? ?[TN]", formula, 8)
        flops = training_flops(parameters, tokens, factor)
        return compare(row, time.days_of_flops(flops, gpus, rate))
    if "tok_s_gpu" in given:
        return compare(row, time.days_of_tokens(given["tokens"], given["tok_s_gpu"] * given["gpus"]))
    if "tok_s" in given:
        return compare(row, time.days_of_tokens(given["tokens"], given["tok_s"]))
    if "gpu_hours" in given:
        return compare(row, time.days_of_gpu_hours(given["gpu_hours"], given["gpus"]))
    hours, gpus, *_ = numbers(formula)
    return compare(row, time.days_of_gpu_hours(hours, int(gpus)))


def strategy_days(row: Row) -> list[Check]:
    given = row["inputs"]
    flops_per_second = given["tflops"] * 1e12
    return compare(
        row, days_with_recompute(given["params"], given["tokens"], given["gpus"], flops_per_second)
    )


def days_with_recompute(parameters: float, tokens: float, gpus: int, flops_per_second: float) -> float:
    return time.days_of_flops(training_flops(parameters, tokens) * 4 / 3, gpus, flops_per_second)


def comm_volume(row: Row) -> list[Check]:
    given = row["inputs"]
    if "W" in given:
        return compare(row, cross_host(row))
    name = given["strategy"]
    if "zero++" in name.lower():
        return compare(row, communication.zero_plus_plus_elements(*re.findall(r"qwZ|hpZ|qgZ", name)))
    moved = partial(communication.elements_moved, strategy_named(name))
    if "k" not in str(row["expected"]):
        return compare(row, moved())
    per_pass = moved(2) - moved(1)
    once = moved(1) - per_pass
    passes = f"{per_pass}k" if per_pass > 1 else "k"
    return compare(
        row | {"expected": row["expected"].replace(" ", "")}, f"{passes}+{once}" if once else passes
    )


def cross_host(row: Row) -> float:
    given = row["inputs"]
    size, world_size = given["M"], given["W"]
    name = row["id"] + str(row["inputs"].get("strategy", ""))
    if "hybrid" in name:
        return communication.hybrid_cross_host(size, given["G"], world_size)
    if "full" in name:
        return communication.full_shard_cross_host(size, world_size)
    return communication.replicated_cross_host(size, world_size)


def strategy(row: Row) -> list[Check]:
    given, hardware = row["inputs"], hardware_named(row["inputs"]["gpu"])
    if "mfu_hybrid" in given:
        shape, setup = modalities(row)
        return compare(row, faster_sharding(shape, setup, hardware))
    if "replicas" in str(row["expected"]):
        return compare(row, hybrid(row))
    shape = shape_of_sizes(given) if "layers" in given else gpt_of(given["params"], given.get("seq", 2048))
    rows = given.get("local_batch", given.get("micro_batch", 1))
    base = Setup("ddp", given["gpus"], 8, rows)
    found = choices(shape, base, given["gpus"] * rows, hardware)
    asked = (rows, checkpointing_named(given.get("ac", "none"))[0], "none")
    known = [c for c in found if c.setup.strategy in ZERO_NAMES and form(c.setup) == asked]
    ranked = best(known)
    assert ranked, f"{row['id']}: no strategy fits"
    chosen = ZERO_NAMES[ranked[0].setup.strategy]
    # A row that leaves the choice open is met by either.
    return compare(row, row["expected"] if chosen in re.split(r" or |/", row["expected"]) else chosen)


def form(setup: Setup) -> tuple[int, str, str]:
    return setup.micro_batch, setup.checkpointing, setup.offload


def faster_sharding(shape: Shape, setup: Setup, hardware: Hardware) -> str:
    """Whether to split the states over a node or over all ranks, in FSDP's words."""
    hybrid, full = (
        time.step_time(shape, replace(setup, strategy=strategy), hardware).step_seconds or 0
        for strategy in ("hsdp", "fsdp")
    )
    if abs(full - hybrid) < TIE * min(full, hybrid):
        return "tie"
    return "HYBRID_SHARD" if hybrid < full else "FULL_SHARD"


def modalities(row: Row) -> tuple[Shape, Setup]:
    """The benchmark of inputs, or of formula and note: "2.7B, mbs 2, seq 4096, no AC", "2.7B = 32x2560"."""
    given, said = row["inputs"], row["formula"] + row["note"]
    micro_batch = given.get("micro_batch") or number_in(r"mbs (\d+)", said, 1)
    sequence_length = given.get("seq") or number_in(r"seq (\d+)", said, 2048)
    if sizes := re.search(r"= (\d+)x(\d+)", said):
        layers, hidden = map(int, sizes.groups())
    else:
        like = shape_of_sizes(given) if "layers" in given else nearest_published(given["params"])
        layers, hidden = like.layers, like.hidden
    shape = gpt_like(
        layers=layers, hidden=hidden, heads=32, vocabulary=50304, sequence_length=sequence_length
    )
    memory_gb = re.search(r"(\d+)GB", row["inputs"]["gpu"])
    per_node = NODE_OF.get(memory_gb[1] if memory_gb else "", 8)
    checkpointing, _ = checkpointing_named(given.get("ac", "none" if "no AC" in said else "full"))
    setup = Setup("hsdp", row["inputs"]["gpus"], per_node, micro_batch, checkpointing=checkpointing)
    return shape, setup


def hybrid(row: Row) -> str:
    """The shard group for a published model whose global batch is reached without accumulation."""
    given, team = row["inputs"], row["id"].split(".")[0]
    theirs = [model for model in catalogue() if model.name.lower().startswith(team)]
    model = min(theirs, key=lambda model: abs(model.parameters - given["params"]))
    assert model.global_batch is not None
    base = Setup("fsdp", given["gpus"], 8, 1)
    found = best(choices(model.shape(), base, model.global_batch, hardware_named(given["gpu"])))[0].setup
    assert found.strategy == "hsdp", found
    replicas = found.state_ranks // found.shards
    return f"ZeRO-3 over {found.shards} GPUs x {replicas} replicas (hybrid) + {found.checkpointing} AC"


def gpt_of(parameters: float, sequence_length: int) -> Shape:
    """A GPT of about so many parameters, in the proportions of GPT-3's: 12 L h^2, h = 128 heads' width."""
    hidden = max(128, round((parameters / 12 * 85) ** (1 / 3) / 128) * 128)
    layers = max(1, round((parameters - 50304 * hidden) / (12 * hidden**2)))
    return gpt_like(
        layers=layers,
        hidden=hidden,
        heads=hidden // 128,
        vocabulary=50304,
        sequence_length=sequence_length,
    )


def ckpt_interval(row: Row) -> list[Check]:
    """Daly's rule corrects Young's square root; where the formula has neither the id names the rule."""
    formula = row["formula"].lower().replace(" ", "")
    corrected = "/3" in formula or "/9" in formula or "daly" in formula
    if not corrected and "sqrt(2" not in formula:
        corrected = "daly" in row["id"].lower()
    rule = reliability.daly_seconds if corrected else reliability.young_seconds
    seconds = rule(row["inputs"]["ckpt_s"], row["inputs"]["mtbf_s"])
    return compare(
        row, seconds / {"min": 60, "h": 3600}.get(row["unit"].split()[0] if row["unit"] else "s", 1)
    )


def failures(row: Row) -> list[Check]:
    given = row["inputs"]
    if "interruptions" in given:
        seconds = reliability.mtbf_of_interruptions(given["interruptions"], given["days"])
    elif "rate_per_1000_node_days" in given:
        gpus = given.get("gpus") or number_in(r"\.(\d+)(?:\.|$)", row["id"])
        nodes = given.get("nodes") or (gpus and gpus // 8) or number_in(r"\((\d+)\*", row["formula"])
        assert nodes, f"{row['id']}: says neither gpus nor nodes"
        seconds = reliability.mtbf_of_rate(nodes, given["rate_per_1000_node_days"])
    else:
        hours = given.get("interval_h") or number_in(r"every (\d+(?:\.\d+)?) h", row["formula"])
        assert hours is not None, f"{row['id']}: says neither failures nor an interval"
        seconds = reliability.lost_work_seconds(hours * SECONDS_PER_HOUR)
    unit = row["unit"].lower()
    return compare(row, seconds / (60 if "min" in unit else 86400 if "day" in unit else SECONDS_PER_HOUR))


def recompute_overhead(row: Row) -> list[Check]:
    given = row["inputs"]
    if "baseline_ms" not in given:
        named = re.search(r"t_(\w+) ?/ ?t_(\w+)", row["formula"])
        slow, fast = (given[f"{name}_s"] for name in named.groups()) if named else given.values()
        return compare(row, recompute.step_ratio(slow, fast))
    shape = published_in(row["id"].replace("layer", "")).shape(2048)
    ranks = RECOMPUTE_UNSAID["tensor_parallel"]
    forward = recompute.block_forward(shape, RECOMPUTE_UNSAID["rows"], ranks, hardware_named("A100-80GB"))
    words = re.findall(r"[a-z]+", row["id"].rsplit(".", 1)[-1])
    return compare(
        row,
        recompute.recompute_overhead(
            forward,
            given["baseline_ms"] / 1000,
            next((kind for kind in ("selective", "full") if kind in words), "none"),
            ranks,
            sequence_parallel=bool({"sp", "sequence"} & set(words)),
        ),
    )


EVALUATORS: dict[str, Evaluator] = {
    "run_gpuhours": run_gpuhours,
    "cost": money,
    "seed_cost": money,
    "days": days,
    "strategy": strategy,
    "strategy_days": strategy_days,
    "comm_volume": comm_volume,
    "ckpt_interval": ckpt_interval,
    "failures": failures,
    "recompute_overhead": recompute_overhead,
}
