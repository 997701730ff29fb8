"""Published memory: ZeRO's tables, activations per layer, traced and measured peaks, runs that fit or not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from truth import (
    STAGES,
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

from configs.schema import ConfigError
from launcher.plan.checkpoint_size import training_state_bytes
from launcher.plan.hardware import hardware_named
from launcher.plan.memory import GIB, memory
from launcher.plan.published import published, published_in
from launcher.plan.setup import Setup, Strategy
from launcher.plan.shape import Shape, gpt_like, llama_like
from launcher.plan.states import (
    FP32_STATES,
    MIXED,
    PerParameter,
    Stage,
    largest_model,
    layer_activation_bytes,
    selective_overhead,
    selective_saving,
    slide_rule_bytes,
    training_bytes,
    weight_bytes,
    zero_bytes,
)

UNITS = {"GiB": GIB, "TiB": 2**40, "MB": 1e6, "TB": 1e12, "bytes": 1.0}
GPUS_PER_NODE = 8


def unit_bytes(unit: str) -> float:
    """Bytes of a row's unit; GB where it is none of the others."""
    return next((size for name, size in UNITS.items() if name in unit), 1e9)


def stage_of(row: Row) -> Stage:
    """ZeRO's stage: an input, or the last word of the id, or the formula's form."""
    said = row["inputs"].get("stage", row["inputs"].get("zero", row["inputs"].get("strategy")))
    if isinstance(said, int):
        return said  # type: ignore[return-value]
    try:
        return STAGES.index(strategy_named(said or row["id"].rsplit(".", 1)[-1]))  # type: ignore[return-value]
    except ValueError:
        form = row["formula"].replace(" ", "").replace("P", "N").replace("*", "").split("=")[0]
        forms = {"16N": 0, "(4+K)N": 0, "4N+12N/d": 1, "2N+14N/d": 2, "16N/d": 3, "(4+K)N/d": 3}
        if form not in forms:
            raise ValueError(f"{row['id']}: names no stage of ZeRO") from None
        return forms[form]  # type: ignore[return-value]


def zero_table1(row: Row) -> list[Check]:
    given = row["inputs"]
    size = zero_bytes(given["params"], given["dp"], stage_of(row), given.get("K", MIXED.optimizer))
    return compare(row, size / unit_bytes(row["unit"]))


def zero_table2(row: Row) -> list[Check]:
    """The id ends in the strategy: ddp, z1, z2 or z3."""
    given = row["inputs"]
    most = largest_model(given["gpu_gb"] * 1e9, given.get("dp", 64), stage_of(row), given.get("mp", 1))
    return compare(row, most / 1e9)


def act_memory(row: Row) -> list[Check]:
    """The id ends in what is recomputed and split; where no sizes are given it names the model too."""
    given, variant = row["inputs"], row["id"].rsplit(".", 1)[-1]
    if "selective" in variant and ("flops" in variant or "saving" in variant):
        shape = shape_of_sizes(given) if "hidden" in given else published_in(row["id"]).shape()
        seq, h = shape.sequence_length, shape.hidden
        if variant.endswith("flops"):
            return compare(row, selective_overhead(seq, h))
        return compare(row, selective_saving(seq, h, shape.heads))
    sizes = sizes_of(given)
    if not {"hidden", "heads", "sequence_length"} <= sizes.keys():
        sizes = vars(published_in(row["id"]).shape()) | sizes
    words = variant.split("_")
    recompute = next((word for word in ("selective", "full") if word in words), "none")
    kept = layer_activation_bytes(
        sequence_length=sizes["sequence_length"],
        micro_batch=given.get("micro_batch", 1),
        hidden=sizes["hidden"],
        heads=sizes["heads"],
        tensor_parallel=given["tp"] if "tp" in words else 1,
        sequence_parallel="sp" in words,
        recompute=recompute,  # type: ignore[arg-type]
    )
    if recompute == "full" and "sp" in words and "/t" in row["formula"]:
        kept /= given["tp"]  # the paper's table keeps the input whole; its text splits it too
    return compare(row, kept / (unit_bytes(row["unit"]) if "B" in row["unit"] else 1))


def fake_trace(row: Row) -> list[Check]:
    """The traced module repeats keys and values, and frees embedding and head after forward."""
    given = row["inputs"]
    shape = llama_like(
        layers=given["layers"],
        hidden=given["dim"],
        heads=given["heads"],
        kv_heads=given["kv"],
        ffn=given["ffn"],
        vocabulary=given["vocab"],
        sequence_length=given["seq"],
    )
    copies = given["dp"] * given.get("rep", 1)
    checkpointing, every = checkpointing_named(given["ac"])
    setup = Setup(
        strategy="hsdp",
        world_size=copies,
        gpus_per_node=GPUS_PER_NODE,
        shard_degree=given["dp"],
        micro_batch=given["bs"],
        checkpointing=checkpointing,
        checkpointed_every=every,
        logits="fp32" if given.get("logits_fp32", True) else "bf16",
        foreach=given.get("foreach", False),
        reshard_after_forward=given.get("zero3", True),
        repeated_kv=True,
        root_resharded=True,
    )
    return compare(row, memory(shape, setup, hardware_named("H100-80GB")).active_gib)


def published_setup(given: dict[str, Any]) -> Setup:
    """A run of torchtitan, or of Megatron where there is a ZeRO stage.

    torchtitan splits the local batch of a pipeline into as many micro batches as there are stages, of which
    an interleaved schedule has two on a rank.
    """
    split = {name: given.get(name) or 1 for name in ("tp", "pp", "cp")}
    model_parallel = split["tp"] * split["pp"] * split["cp"]
    copies = given.get("fsdp") or given.get("dp") or (given.get("gpus") or 1) // model_parallel
    technique = str(given.get("technique") or "").lower()
    stages = split["pp"] * (2 if technique.startswith("interleaved") else 1)
    rows = given.get("local_batch", given.get("micro_batch", 1))
    strategy: Strategy = "fsdp"
    micro_batches, micro_batch = stages, max(1, rows // stages)
    if "zero" in given:
        strategy = STAGES[given["zero"]]
        micro_batches, micro_batch = split["pp"], rows
    elif given.get("strategy"):
        strategy = strategy_named(given["strategy"])
    checkpointing, every = checkpointing_named(given.get("ac", "none"))
    return Setup(
        strategy=strategy,
        world_size=copies * model_parallel,
        gpus_per_node=GPUS_PER_NODE,
        micro_batch=micro_batch,
        accumulation=micro_batches,
        tensor_parallel=split["tp"],
        pipeline_parallel=split["pp"],
        context_parallel=split["cp"],
        checkpointing=checkpointing,
        checkpointed_every=every,
        compute="fp8" if "fp8" in technique else "bf16",
        compile="fp8" in technique or "compile" in technique,
        logits="bf16" if "loss" in technique else "fp32",
        repeated_kv=True,
    )


def model_of(row: Row) -> Shape:
    """The published model that a row names, else one of its sizes, else ConfigError."""
    given = row["inputs"]
    try:
        return published(str(given.get("model"))).shape(given.get("seq"))
    except KeyError:
        pass
    try:
        return shape_of_sizes(given)
    except KeyError:
        raise ConfigError(
            f"{row['id']}: model={given.get('model')} is in no catalogue: give layers, hidden, heads, ffn"
        ) from None


def peak_memory(row: Row) -> list[Check]:
    """Reserved memory of the allocator where the formula says so, else what the device shows."""
    given = row["inputs"]
    planned = memory(model_of(row), published_setup(given), hardware_named(given.get("gpu", "H100-80GB")))
    said = row["formula"].lower()
    gib = planned.device_gib
    if "reserved" in said:
        gib = planned.reserved_gib
    elif "active" in said or "allocated" in said:
        gib = planned.active_gib
    return compare(row, gib * GIB / unit_bytes(row["unit"]))


def fits_oom(row: Row) -> list[Check]:
    """Ran is anything but "does not fit". The id names the GPUs, and the card, where inputs do not.

    A model without a name or sizes is the published one with the nearest number of parameters, on rows as
    long as published. DeepSpeed's and Llama's 405B runs recompute everything.
    """
    given, words = row["inputs"], str(row["inputs"].get("strategy") or "")
    if {"layers", "hidden"} <= sizes_of(given).keys() or "model" in given:
        shape = model_of(row)
    else:
        shape = nearest_published(given["params"]).shape(given.get("seq"))
    checkpointing, every = checkpointing_named(given.get("ac", "full"))
    setup = Setup(
        strategy=strategy_named(words) if words else STAGES[_stage_or_3(row)],
        world_size=given.get("gpus") or number_in(r"x(\d+)\.|\.(\d+)gpu", row["id"], 1),
        gpus_per_node=GPUS_PER_NODE,
        micro_batch=given.get("local_batch") or given.get("micro_batch") or 1,
        tensor_parallel=given.get("tp") or number_in(r"TP[ =_-]?(\d+)", words, 1),
        pipeline_parallel=given.get("pp") or number_in(r"PP[ =_-]?(\d+)", words, 1),
        checkpointing=checkpointing,
        checkpointed_every=every,
        fused_norm="fused_rmsnorm" in row["note"],
        repeated_kv=True,
    )
    hardware = hardware_named(given.get("gpu") or ("H100-96GB" if "H100" in row["id"] else "A100-80GB"))
    if limit_gib := number_in(r"fits (\d[\d.]*) GiB", row["formula"]):
        hardware = hardware.model_copy(update={"memory_gib": limit_gib})
    ran = memory(shape, setup, hardware).verdict != "does not fit"
    return compare(row, "fits" if ran else "OOM")


def _stage_or_3(row: Row) -> Stage:
    try:
        return stage_of(row)
    except ValueError:
        return 3


def seed_memory(row: Row) -> list[Check]:
    given, formula = row["inputs"], row["formula"].replace(" ", "")
    if "weights" in given:
        each = PerParameter(given["weights"], given["grads"], given["opt"], given.get("acts", 0))
        return compare(row, each.total)
    parameters, bits = given["params"], given.get("bits")
    if "gpu_bytes" in given:
        return compare(row, training_bytes(parameters, bits or 32) <= given["gpu_bytes"])
    if "dp" in given:
        size = zero_bytes(parameters, given["dp"], stage_of(row), given.get("K", MIXED.optimizer))
    elif (each := number_in(r"(\d+(?:\.\d+)?)\*?N", formula)) is not None:
        size = bytes_by_rule(each, bits) * parameters
    elif "20" in formula or "printed" in formula:
        size = slide_rule_bytes(parameters, bits or 32)
    elif "24" in formula:
        size = training_bytes(parameters, bits or 32)
    elif "bits/8" in formula:
        size = weight_bytes(parameters, bits or 32)
    else:
        raise ValueError(f"{row['id']}: no rule of bytes per parameter is in {formula!r}")
    return compare(row, size / unit_bytes(row["unit"]))


def bytes_by_rule(each: float, bits: int | None) -> float:
    """Bytes per parameter of the planner's rule that a formula's factor of N means."""
    rules = {FP32_STATES.total, MIXED.total, MIXED.optimizer, FP32_STATES.optimizer}
    rules |= {training_state_bytes(1, "bf16"), training_state_bytes(1, "fp32")}
    for size in {bits or 32, 32, 16, 8}:
        rules |= {rule(1, size) for rule in (weight_bytes, training_bytes, slide_rule_bytes)}
    if each not in rules:
        raise ValueError(
            f"{each:g} bytes per parameter are no rule: {', '.join(f'{r:g}' for r in sorted(rules))}"
        )
    return next(rule for rule in rules if rule == each)


EVALUATORS: dict[str, Evaluator] = {
    "zero_table1": zero_table1,
    "zero_table2": zero_table2,
    "act_memory": act_memory,
    "fake_trace": fake_trace,
    "peak_memory": peak_memory,
    "fits_oom": fits_oom,
    "seed_memory": seed_memory,
}


def foundry_fits(row: dict[str, Any], sizes: dict[str, Any]) -> list[tuple[str, Check]]:
    """Every row ran, so none may be refused.

    MPT: flash attention, GELU as one kernel, cross-entropy on bf16 logits. PURE sums gradients in bf16.
    """
    shape = gpt_like(
        layers=sizes["layers"],
        hidden=sizes["hidden"],
        heads=sizes["heads"],
        ffn=sizes["ffn"],
        vocabulary=sizes["vocab"],
        sequence_length=row["seq"],
    )
    setup = Setup(
        strategy=strategy_named(row["sharding"]),
        world_size=row["gpus"],
        gpus_per_node=GPUS_PER_NODE,
        micro_batch=row["micro_batch"],
        accumulation=row["grad_accum"],
        checkpointing="full" if row["act_ckpt"] else "none",
        compute="fp8" if "fp8" in row["precision"] else "bf16",
        reduce="bf16" if row["mp_mode"] == "PURE" else "fp32",
        logits="bf16",
    )
    planned = memory(replace(shape, family="mpt with flash"), setup, hardware_named(row["gpu"]))
    ran = "ran" if planned.verdict != "does not fit" else "refused"
    name = f"{row['model']}.s{row['seq']}.{row['gpu']}x{row['gpus']}.{row['precision']}"
    return [(name, Check(ran, "ran", 0))]
