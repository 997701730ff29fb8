"""Published memory: ZeRO's tables, activations per layer, traced and measured peaks, runs that fit or not."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from truth import Check, Evaluator, Row, compare

from launcher.plan.hardware import hardware_named
from launcher.plan.memory import GIB, memory
from launcher.plan.published import Published, catalogue, published, published_in
from launcher.plan.setup import Checkpointing, Setup, Strategy
from launcher.plan.shape import gpt_like, llama_like
from launcher.plan.states import (
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

CHECKPOINTING: dict[str, Checkpointing] = {
    "none": "none",
    "op": "selective",
    "selective op": "selective",
    "selective": "selective",
    "full": "full",
}
STAGES: dict[str, Stage] = {"ddp": 0, "z1": 1, "z2": 2, "z3": 3, "zero1": 1, "zero2": 2, "zero3": 3}
ZERO: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3")
GPUS_PER_NODE = 8


def zero_table1(row: Row) -> list[Check]:
    given = row["inputs"]
    return compare(row, zero_bytes(given["params"], given["dp"], given["stage"], given["K"]) / 1e9)


def zero_table2(row: Row) -> list[Check]:
    """The id ends in the strategy: ddp, z1, z2 or z3."""
    given = row["inputs"]
    stage = STAGES[row["id"].rsplit(".", 1)[1]]
    return compare(row, largest_model(given["gpu_gb"] * 1e9, given["dp"], stage, given["mp"]) / 1e9)


def act_memory(row: Row) -> list[Check]:
    """The id ends in what is recomputed and split; where no sizes are given it names the model too."""
    given, variant = row["inputs"], row["id"].rsplit(".", 1)[1]
    if not given:
        shape = published_in(row["id"]).shape()
        seq, h = shape.sequence_length, shape.hidden
        if variant.endswith("flops"):
            return compare(row, selective_overhead(seq, h))
        return compare(row, selective_saving(seq, h, shape.heads))
    words = variant.split("_")
    return compare(
        row,
        layer_activation_bytes(
            sequence_length=given["seq"],
            micro_batch=given["micro_batch"],
            hidden=given["hidden"],
            heads=given["heads"],
            tensor_parallel=given["tp"] if "tp" in words else 1,
            sequence_parallel="sp" in words,
            recompute=next((word for word in ("selective", "full") if word in words), "none"),
        ),
    )


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
    setup = Setup(
        strategy="hsdp" if given["zero3"] else "fsdp_grad_op",
        world_size=given["dp"] * given["rep"],
        gpus_per_node=GPUS_PER_NODE,
        shard_degree=given["dp"],
        micro_batch=given["bs"],
        checkpointing=CHECKPOINTING[given["ac"]],
        logits="fp32" if given["logits_fp32"] else "bf16",
        foreach=given["foreach"],
        repeated_kv=True,
        root_resharded=True,
    )
    return compare(row, memory(shape, setup, hardware_named("H100-80GB")).active_gib)


def published_setup(given: dict[str, Any]) -> Setup:
    """A run of torchtitan, or of Megatron where there is a ZeRO stage.

    torchtitan splits the local batch of a pipeline into as many micro batches as there are stages, of which
    an interleaved schedule has two on a rank.
    """
    split = {name: given.get(name, 1) for name in ("tp", "pp", "cp")}
    copies = given.get("fsdp") or given.get("dp") or 1
    technique = given.get("technique", "")
    stages = split["pp"] * (2 if technique.startswith("interleaved") else 1)
    rows = given.get("local_batch", given.get("micro_batch", 1))
    strategy: Strategy = "fsdp"
    micro_batches, micro_batch = stages, max(1, rows // stages)
    if "zero" in given:
        strategy = ZERO[given["zero"]]
        micro_batches, micro_batch = split["pp"], rows
    return Setup(
        strategy=strategy,
        world_size=copies * split["tp"] * split["pp"] * split["cp"],
        gpus_per_node=GPUS_PER_NODE,
        micro_batch=micro_batch,
        accumulation=micro_batches,
        tensor_parallel=split["tp"],
        pipeline_parallel=split["pp"],
        context_parallel=split["cp"],
        checkpointing=CHECKPOINTING[given.get("ac", "none")],
        compute="fp8" if "fp8" in technique else "bf16",
        compile="fp8" in technique or "compile" in technique,
        logits="bf16" if "loss" in technique else "fp32",
        repeated_kv=True,
    )


def peak_memory(row: Row) -> list[Check]:
    """Reserved memory of the allocator where the formula says so, else what the device shows."""
    given = row["inputs"]
    shape = published(given["model"]).shape(given["seq"])
    planned = memory(shape, published_setup(given), hardware_named(given["gpu"]))
    gib = planned.reserved_gib if "reserved" in row["formula"].lower() else planned.device_gib
    return compare(row, gib if row["unit"] == "GiB" else gib * GIB / 1e9)


def fits_oom(row: Row) -> list[Check]:
    """Ran is anything but "does not fit". The id names the GPUs, and the card, where inputs do not.

    A model without a name is the published one with the nearest number of parameters, on rows as long as
    published. DeepSpeed's and Llama's 405B runs recompute everything.
    """
    given, strategy = row["inputs"], row["inputs"].get("strategy", "")
    model = published(given["model"]) if "model" in given else _nearest(given["params"])
    shape = model.shape(given.get("seq"))
    setup = Setup(
        strategy="fsdp" if "FSDP" in strategy else "zero3",
        world_size=given.get("gpus") or _number(r"x(\d+)\.|\.(\d+)gpu", row["id"], 1),
        gpus_per_node=GPUS_PER_NODE,
        micro_batch=given.get("local_batch") or given["micro_batch"],
        tensor_parallel=_number(r"TP (\d+)", strategy, 1),
        checkpointing=CHECKPOINTING[given.get("ac", "full")],
        fused_norm="fused_rmsnorm" in row.get("note", ""),
        repeated_kv=True,
    )
    hardware = hardware_named(given.get("gpu") or ("H100-96GB" if "H100" in row["id"] else "A100-80GB"))
    limit_gib = _number(r"fits (\d[\d.]*) GiB", row["formula"], 0)
    if limit_gib:
        hardware = hardware.model_copy(update={"memory_gib": limit_gib})
    ran = memory(shape, setup, hardware).verdict != "does not fit"
    return compare(row, "fits" if ran else "OOM")


def _nearest(parameters: float) -> Published:
    return min(catalogue(), key=lambda model: abs(model.parameters - parameters))


def _number(pattern: str, text: str, default: float) -> Any:
    """The number that the first matching group holds."""
    found = re.search(pattern, text)
    digits = next((group for group in found.groups() if group), "") if found else ""
    return (float(digits) if "." in digits else int(digits)) if digits else default


def seed_memory(row: Row) -> list[Check]:
    given, formula = row["inputs"], row["formula"]
    if "weights" in given:
        return compare(row, PerParameter(given["weights"], given["grads"], given["opt"]).total)
    parameters = given["params"]
    if "gpu_bytes" in given:
        return compare(row, training_bytes(parameters) <= given["gpu_bytes"])
    if "dp" in given:
        stage = STAGES[row["id"].rsplit(".", 1)[1]]
        return compare(row, zero_bytes(parameters, given["dp"], stage, given["K"]))
    bits = given.get("bits", 32)
    if "printed" in formula:
        return compare(row, slide_rule_bytes(parameters, bits))
    bytes_each = _number(r"(\d+)\*N", formula.replace(" ", ""), 0)
    return compare(row, (weight_bytes if bytes_each <= 4 else training_bytes)(parameters, bits))


EVALUATORS: dict[str, Evaluator] = {
    "zero_table1": zero_table1,
    "zero_table2": zero_table2,
    "act_memory": act_memory,
    "fake_trace": fake_trace,
    "peak_memory": peak_memory,
    "fits_oom": fits_oom,
    "seed_memory": seed_memory,
}


def foundry_fits(table: dict[str, Any]) -> list[tuple[str, Check]]:
    """Every row ran, so none may be refused.

    MPT: flash attention, GELU as one kernel, cross-entropy on bf16 logits. PURE sums gradients in bf16.
    """
    checks = []
    for values in table["rows"]:
        row = dict(zip(table["columns"], values, strict=True))
        sizes = table["shapes"][row["model"]]
        shape = gpt_like(
            layers=sizes["layers"],
            hidden=sizes["hidden"],
            heads=sizes["heads"],
            ffn=sizes["ffn"],
            vocabulary=sizes["vocab"],
            sequence_length=row["seq"],
        )
        setup = Setup(
            strategy="fsdp" if row["sharding"] == "FULL_SHARD" else "fsdp_grad_op",
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
        checks.append((name, Check(ran, "ran", 0)))
    return checks
