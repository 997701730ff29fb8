"""How rows about parameters, FLOPs and utilisation are asked of the planner."""

from __future__ import annotations

import re
from typing import Any

from truth import Check, Evaluator, Row, compare

from configs.schema import ConfigError
from launcher.plan.adapters import lora_parameters, low_rank_parameters, low_rank_saving
from launcher.plan.checkpoint_size import training_state_bytes, weights_bytes
from launcher.plan.flops import (
    attention_flops_per_token,
    hardware_utilisation,
    hoffmann_flops,
    implied_rate,
    megatron_flops,
    petaflop_s_days,
    utilisation,
)
from launcher.plan.hardware import hardware_named
from launcher.plan.loss import bits_per_byte, bits_per_token, perplexity
from launcher.plan.published import published_in
from launcher.plan.scaling import PETAFLOP_S_DAY, training_flops
from launcher.plan.shape import Shape, gpt_like, llama_like

UNITS = {"GiB": 2**30, "TiB": 2**40, "GB": 1e9, "TB": 1e12}
CHECKPOINTS = {
    2: lambda n: weights_bytes(n, "bf16"),
    4: lambda n: weights_bytes(n, "fp32"),
    12: lambda n: training_state_bytes(n, "fp32"),
    14: lambda n: training_state_bytes(n, "bf16"),
}
"""Bytes per parameter of a row's formula -> what is stored."""


def any_gpt(given: dict[str, Any], **known: Any) -> Shape:
    """A GPT of the sizes in a row; heads and head size do not change its parameters."""
    hidden = int(given["hidden"])
    heads = given.get("heads") or given.get("a") or 1
    return gpt_like(
        layers=given["layers"],
        hidden=hidden,
        heads=heads,
        head_dim=None if hidden % heads == 0 else 1,
        ffn=given.get("ffn"),
        vocabulary=given.get("vocab") or known.get("vocabulary") or 1,
        sequence_length=given.get("seq") or known.get("sequence_length") or 1,
        tied=given.get("tied", True),
    )


def param_count(row: Row) -> list[Check]:
    given = row["inputs"]
    if "kv_heads" in given:
        shape = llama_like(
            layers=given["layers"],
            hidden=given["hidden"],
            heads=given["heads"],
            kv_heads=given["kv_heads"],
            head_dim=given["head_dim"],
            ffn=given["ffn"],
            vocabulary=given["vocab"],
            sequence_length=given.get("seq", 1),
            tied=given.get("tied", "2Vh" not in row["formula"]),
        )
        return compare(row, shape.parameters)
    shape = any_gpt(given)
    outside = shape.parameters_root if "non-embedding" in row["unit"] else 0
    return compare(row, shape.parameters - outside)


def factor(row: Row) -> float:
    """FLOPs per parameter and token: an input, or the number before N D in the formula."""
    written = re.match(r"\s*(\d+)\s*\*\s*N", row["formula"])
    return float(row["inputs"].get("flops_per_param_token") or (written[1] if written else 6))


def total_flops(row: Row) -> float:
    given = row["inputs"]
    return training_flops(given.get("active", given.get("params")), given["tokens"], factor(row))


def flops_total(row: Row) -> list[Check]:
    return compare(row, total_flops(row))


def flops_pfdays(row: Row) -> list[Check]:
    return compare(row, petaflop_s_days(total_flops(row)))


def flops_hoffmann(row: Row) -> list[Check]:
    """Without embeddings and logits against the printed ratio, and with both against the row's remark."""
    given = row["inputs"]
    shape = gpt_like(
        layers=given["layers"],
        hidden=given["d"],
        heads=given["heads"],
        head_dim=given["kq"],
        ffn=given["ffw"],
        vocabulary=given["vocab"],
        sequence_length=given["seq"],
    )
    counted = hoffmann_flops(shape)
    simple = training_flops(given["params"], given["seq"])
    checks = compare(row, counted.blocks / simple)
    if remark := re.search(r"would print ([\d.]+)", row.get("source_inconsistent", "")):
        checks.append(Check(counted.all / simple, float(remark[1]), 0.01))
    return checks


def per_token(row: Row) -> float:
    """6 N, and 12 L H Q T where the row's formula has it; sizes from the row, else by the name in its id."""
    given = row["inputs"]
    flops = training_flops(given["params"], 1)
    if "12" not in row["formula"]:
        return flops
    known = vars(published_in(row["id"]).shape()) if "layers" not in given else {}
    sizes = known | given
    heads = (sizes["heads"], sizes["head_dim"]) if "head_dim" in sizes else (1, sizes["hidden"])
    return flops + attention_flops_per_token(
        layers=sizes["layers"],
        width=heads[0] * heads[1],
        sequence_length=sizes.get("seq", sizes.get("sequence_length")),
    )


def flops_per_token(row: Row) -> list[Check]:
    return compare(row, per_token(row))


def peak(row: Row) -> float:
    """FLOP/s: an input, the formula's own, or that of the hardware named in inputs, id or catalogue."""
    if "peak" in row["inputs"]:
        return float(row["inputs"]["peak"])
    if written := re.search(r"(?<=/)(\d{3,4})\b|(\d+)e12", row["formula"]):
        return float(written[1] or written[2]) * 1e12
    named = row["inputs"].get("gpu") or re.search(r"[AHV]\d00", row["id"])
    return tflops(named if isinstance(named, str) else named[0] if named else catalogued(row)) * 1e12


def catalogued(row: Row) -> str:
    return published_in(row["id"]).hardware or ""


def tflops(accelerator: str) -> float:
    peaks = hardware_named(accelerator).peak_tflops
    found = peaks.bf16 or peaks.fp16
    if found is None:
        raise ConfigError(f"hardware={accelerator}: no peak is known")
    return found


def mfu(row: Row) -> list[Check]:
    given = row["inputs"]
    rate = given.get("tflops_per_gpu", given.get("tflops"))
    if rate is not None:
        return compare(row, utilisation(rate * 1e12, 1, 1, peak(row)))
    if "tok_s_gpu" in given:
        return compare(row, utilisation(given["tok_s_gpu"] * per_token(row), 1, 1, peak(row)))
    if "tok_s" in given:
        accelerators = given.get("chips", given.get("gpus"))
        return compare(row, utilisation(given["tok_s"] * per_token(row), 1, accelerators, peak(row)))
    seconds = given.get("iter_s", given.get("step_s"))
    if seconds is None:
        printed = published_in(row["id"]).tflops[given["batch"]]
        return compare(row, utilisation(printed * 1e12, 1, 1, peak(row)))
    if "BLs" in row["formula"]:
        entry = published_in(row["id"])
        shape = any_gpt(given, vocabulary=entry.vocabulary) if "layers" in given else entry.shape()
        if "layers" in given and "seq" not in given:
            shape = any_gpt({**given, "seq": entry.sequence_length}, vocabulary=entry.vocabulary)
        recompute = "full" if "96" in row["formula"] else "attention" if "s/3h" in row["formula"] else "none"
        flops = megatron_flops(shape, given.get("batch") or entry.global_batch or 0, recompute)
    else:
        flops = given["batch"] * given["seq"] * per_token(row)
    return compare(row, utilisation(flops, seconds, given["gpus"], peak(row)))


def seed_model_facts(row: Row) -> list[Check]:
    if "layers" in row["inputs"]:
        return compare(row, any_gpt(row["inputs"]).parameters)
    entry = published_in(row["id"].split(".", 1)[1])
    return compare(row, entry.tokens if row["unit"] == "tokens" else entry.parameters)


def seed_adapters(row: Row) -> list[Check]:
    given = row["inputs"]
    if "layers" in given:
        return compare(row, lora_parameters(any_gpt(given), given["r"]))
    sizes = re.search(r"(\d+)\*(\d+)\+\2\*(\d+)", row["formula"])
    assert sizes is not None
    inputs, rank, outputs = map(int, sizes.groups())
    if row["unit"] == "params":
        return compare(row, low_rank_parameters(inputs, outputs, rank))
    return compare(row, low_rank_saving(inputs, outputs, rank))


def evaluation(row: Row) -> list[Check]:
    given = row["inputs"]
    loss = next(value for key, value in given.items() if key in ("nll", "loss") or key.endswith("nats"))
    match row["unit"]:
        case "ppl":
            return compare(row, perplexity(loss))
        case "bits/byte":
            return compare(row, bits_per_byte(loss, given["bytes_per_token"]))
        case _:
            return compare(row, bits_per_token(loss))


def ckpt_size(row: Row) -> list[Check]:
    per_parameter = sum(map(int, re.findall(r"(\d+)\*N", row["formula"])))
    size = CHECKPOINTS[per_parameter](row["inputs"]["params"])
    return compare(row, size / UNITS[row["unit"].split()[0]])


def seed_units(row: Row) -> list[Check]:
    if row["unit"] == "FLOPs":
        return compare(row, PETAFLOP_S_DAY)
    return compare(row, 1e15 / (tflops(row["id"].split("_")[-1]) * 1e12))


def seed_days(row: Row) -> list[Check]:
    """The implied rate of each system, and whether the row's remark calls it impossible."""
    given = row["inputs"]
    limit = re.search(r"peak \(([\d.e]+)\)", row.get("note", ""))
    rate = implied_rate(
        total_flops(row), given["days"], given["systems"], float(limit[1]) if limit else float("inf")
    )
    exceeded = "exceeds its" in row.get("source_inconsistent", "")
    return [*compare(row, rate.flops_per_second / 1e15), Check(rate.possible, not exceeded, 0)]


EVALUATORS: dict[str, Evaluator] = {
    "param_count": param_count,
    "flops_pfdays": flops_pfdays,
    "flops_total": flops_total,
    "flops_moe": flops_total,
    "flops_hoffmann_F": flops_hoffmann,
    "flops_per_token": flops_per_token,
    "mfu": mfu,
    "seed_model_facts": seed_model_facts,
    "seed_adapters": seed_adapters,
    "eval": evaluation,
    "ckpt_size": ckpt_size,
    "seed_units": seed_units,
    "seed_days": seed_days,
}

FOUNDRY_ROUNDING = 0.002
"""Tokens per second are printed with four digits, and one A100 row with three."""


def foundry_checks(table: dict[str, Any]) -> list[tuple[str, Check]]:
    """Parameters, MFU and HFU of every llm-foundry row, from its sizes and speed."""
    checks: list[tuple[str, Check]] = []
    for values in table["rows"]:
        row = dict(zip(table["columns"], values, strict=True))
        sizes = table["shapes"][row["model"]]
        shape = any_gpt({**sizes, "seq": row["seq"]})
        dtype = "fp8" if "fp8" in row["precision"] else "bf16"
        peak_tflops = getattr(hardware_named(row["gpu"]).peak_tflops, dtype)
        attention = attention_flops_per_token(
            layers=shape.layers, width=shape.hidden, sequence_length=shape.sequence_length
        )
        model_flops = training_flops(shape.parameters, 1) + attention
        recomputed = model_flops / 3 if row["act_ckpt"] else 0
        percent = 100 * utilisation(row["tok_s_gpu"] * model_flops, 1, 1, peak_tflops * 1e12)
        name = f"{row['model']}.{row['seq']}.{row['gpus']}x{row['gpu']}.{row['precision']}"
        checks += [
            (f"{name}.params", Check(shape.parameters, row["params"], 1e-6)),
            (f"{name}.mfu", Check(percent, row["mfu_pct"], FOUNDRY_ROUNDING)),
            (
                f"{name}.hfu",
                Check(
                    hardware_utilisation(percent, model_flops, recomputed), row["hfu_pct"], FOUNDRY_ROUNDING
                ),
            ),
        ]
    return checks
