"""How rows about parameters, FLOPs and utilisation are asked of the planner."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import log, prod
from typing import Any

from truth import Check, Evaluator, Row, compare, entry_of, number_in, sizes_of

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
from launcher.plan.parameters import Architecture, Experts, count
from launcher.plan.published import published_in
from launcher.plan.scaling import PETAFLOP_S_DAY, training_flops
from launcher.plan.shape import Shape, gpt_like
from launcher.plan.states import FP32_STATES

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "kB": 1e3, "KB": 1e3}
UNITS |= {"MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15, "bytes": 1, "B": 1}
CHECKPOINTS: dict[int, Callable[[float], float]] = {
    1: lambda n: weights_bytes(n, "fp8"),
    2: lambda n: weights_bytes(n, "bf16"),
    4: lambda n: weights_bytes(n, "fp32"),
    8: lambda n: FP32_STATES.optimizer * n,
    12: lambda n: training_state_bytes(n, "fp32"),
    14: lambda n: training_state_bytes(n, "bf16"),
    16: lambda n: FP32_STATES.total * n,
}
"""Bytes per parameter of a row's formula -> what is stored."""


def any_gpt(given: dict[str, Any], **known: Any) -> Shape:
    """A GPT of the sizes in a row; heads and head size do not change its parameters."""
    sizes = known | sizes_of(given)
    hidden = sizes["hidden"]
    heads = sizes.get("heads", 1)
    return gpt_like(
        layers=sizes["layers"],
        hidden=hidden,
        heads=heads,
        head_dim=None if hidden % heads == 0 else 1,
        ffn=sizes.get("ffn"),
        vocabulary=sizes.get("vocabulary", 1),
        sequence_length=sizes.get("sequence_length", 1),
        tied=given.get("tied", known.get("tied", True)),
        learned_positions="sequence_length" in sizes,
    )


def param_count(row: Row) -> list[Check]:
    """Gated models without biases, or plain ones with, as inputs and the formula's words say."""
    given, formula = row["inputs"], row["formula"]
    tied = given.get("tied", re.search(r"2 ?\*? ?V ?\*? ?h", formula) is None)
    if given.get("gated", "kv_heads" in given or "gated" in formula or "experts" in given):
        counted = count(gated_architecture(row, tied))
        return compare(row, counted.active if "active" in row["unit"] + row["id"] else counted.total)
    shape = any_gpt(given, tied=tied)
    outside = shape.parameters_root if "non-embedding" in row["unit"] else 0
    return compare(row, shape.parameters - outside)


def gated_architecture(row: Row, tied: bool) -> Architecture:
    """A Llama of a row's sizes, with what the formula adds: "qkv bias", "qk norm", "4 norms", experts."""
    given, words = row["inputs"], row["formula"].lower().replace("-", " ")
    sizes = sizes_of(given)
    hidden, heads = sizes["hidden"], sizes["heads"]
    head_dim = sizes.get("head_dim", hidden // heads)
    expert_ffn = given.get("moe_ffn", given.get("expert_ffn", sizes["ffn"]))
    experts = Experts(
        number=given.get("experts", 0),
        per_token=given.get("top_k", given.get("experts_per_token", 0)),
        ffn=expert_ffn,
        blocks=given.get("moe_layers", sizes["layers"]),
        shared_ffn=given.get("shared_ffn", given.get("shared_experts", 0) * expert_ffn),
        other=given.get("experts", 0) * hidden,
    )
    return Architecture(
        layers=sizes["layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=sizes.get("kv_heads", heads),
        head_dim=head_dim,
        ffn=sizes["ffn"],
        vocabulary=sizes["vocabulary"],
        gated=given.get("gated", True),
        tied=tied,
        norm=2 if "layernorm" in words else 1,
        norms=number_in(r"(\d+) norms", words, 2),
        qkv_bias=given.get("qkv_bias", "bias" in words),
        output_bias=given.get("output_bias", "bias" in words and "qkv bias" not in words),
        query_key_norm=2 * head_dim if given.get("qk_norm", re.search(r"q ?/?k norm", words)) else 0,
        experts=experts if experts.number else None,
    )


def factor(row: Row) -> float:
    """FLOPs per parameter and token: an input, or the numbers before N D in the formula."""
    written = re.search(r"(\d+(?:\s*\*\s*\d+)*)\s*\*?\s*N", row["formula"])
    numbers = written[1].split("*") if written else [6]
    return float(row["inputs"].get("flops_per_param_token") or prod(map(float, numbers)))


def total_flops(row: Row) -> float:
    """Of the active parameters."""
    given = row["inputs"]
    parameters = given.get("active", given.get("params", given.get("N")))
    return training_flops(parameters, given.get("tokens", given.get("D")), factor(row))


def flops_total(row: Row) -> list[Check]:
    return compare(row, total_flops(row))


def flops_pfdays(row: Row) -> list[Check]:
    return compare(row, petaflop_s_days(total_flops(row)))


def flops_hoffmann(row: Row) -> list[Check]:
    """Without embeddings and logits against the printed ratio, and with both against the row's remark."""
    given = row["inputs"]
    shape = gpt_like(**sizes_of(given))
    counted = hoffmann_flops(shape)
    simple = training_flops(given["params"], shape.sequence_length)
    checks = compare(row, counted.blocks / simple)
    if remark := re.search(r"would print ([\d.]+)", row["source_inconsistent"]):
        checks.append(Check(counted.all / simple, float(remark[1]), 0.01))
    return checks


def per_token(row: Row) -> float:
    """6 N, and 12 L H Q T where the row's formula has it; sizes from the row, else by the name in its id."""
    given = row["inputs"]
    flops = training_flops(given["params"], 1)
    if "12" not in row["formula"]:
        return flops
    sizes = sizes_of(given)
    if not {"layers", "sequence_length"} <= sizes.keys() or not {"hidden", "heads"} & sizes.keys():
        sizes = vars(entry_of(row).shape()) | sizes
    width = sizes["heads"] * sizes["head_dim"] if "head_dim" in sizes else sizes["hidden"]
    return flops + attention_flops_per_token(
        layers=sizes["layers"], width=width, sequence_length=sizes["sequence_length"]
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
        known = {"vocabulary": entry.vocabulary, "sequence_length": entry.sequence_length}
        shape = any_gpt(given, **known) if "layers" in given else entry.shape()
        recompute = "full" if "96" in row["formula"] else "attention" if "s/3h" in row["formula"] else "none"
        flops = megatron_flops(shape, given.get("batch") or entry.global_batch or 0, recompute)
    else:
        flops = given["batch"] * given["seq"] * per_token(row)
    return compare(row, utilisation(flops, seconds, given["gpus"], peak(row)))


def seed_model_facts(row: Row) -> list[Check]:
    """Tokens, parameters, or a size of that name; "B" and "T" for 1e9 and 1e12."""
    if "layers" in row["inputs"]:
        return compare(row, any_gpt(row["inputs"]).parameters)
    entry, unit = published_in(row["id"].split(".", 1)[-1]), row["unit"]
    if unit in ("layers", "hidden", "heads"):
        return compare(row, getattr(entry, unit))
    scale = {"B": 1e9, "T": 1e12}.get(unit[:1], 1.0)
    return compare(row, ((entry.tokens or 0) if "tokens" in unit else entry.parameters) / scale)


def seed_adapters(row: Row) -> list[Check]:
    given = row["inputs"]
    if "layers" in given:
        return compare(row, lora_parameters(any_gpt(given), given["r"]))
    if "d_in" in given:
        inputs, rank, outputs = given["d_in"], given["r"], given["d_out"]
    else:
        sizes = re.search(r"(\d+)\*(\d+)\+\2\*(\d+)", row["formula"])
        assert sizes is not None, f"{row['id']}: no ranks in {row['formula']!r}"
        inputs, rank, outputs = map(int, sizes.groups())
    if row["unit"] == "params":
        return compare(row, low_rank_parameters(inputs, outputs, rank))
    return compare(row, low_rank_saving(inputs, outputs, rank))


def loss_of(given: dict[str, Any]) -> float:
    """Nats per token, from whichever measure is given."""
    for key, value in given.items():
        if "perplexity" in key or key == "ppl":
            return log(value)
        if key in ("nll", "loss") or "nats" in key:
            return float(value)
    raise KeyError(f"neither a loss nor a perplexity in {given}")


def evaluation(row: Row) -> list[Check]:
    given, unit = row["inputs"], row["unit"].lower()
    loss = loss_of(given)
    if "ppl" in unit or "perplexity" in unit:
        return compare(row, perplexity(loss))
    if "byte" in unit or "bpb" in unit:
        return compare(row, bits_per_byte(loss, given["bytes_per_token"]))
    return compare(row, loss if "nat" in unit else bits_per_token(loss))


def ckpt_size(row: Row) -> list[Check]:
    """Bytes per parameter are the sum of the factors of N: 14*N, 2*N+12*N or (2+4+4+4)*N."""
    factors = re.findall(r"\(([\d+ ]+)\) ?\*? ?N|(\d+) ?\*? ?N", row["formula"])
    each = sum(int(number) for pair in factors for number in re.findall(r"\d+", "".join(pair)))
    if each not in CHECKPOINTS:
        raise ValueError(f"{row['id']}: nothing of {each} bytes per parameter is stored")
    return compare(row, CHECKPOINTS[each](row["inputs"]["params"]) / UNITS[row["unit"].split()[0]])


def seed_units(row: Row) -> list[Check]:
    if "FLOP" in row["unit"]:
        return compare(row, PETAFLOP_S_DAY / (3600 if "hour" in row["unit"] else 1))
    named = re.search(r"peak\((\w+)", row["formula"])
    return compare(row, 1e15 / (tflops(named[1] if named else row["id"].split("_")[-1]) * 1e12))


def seed_days(row: Row) -> list[Check]:
    """The implied rate of each system, and whether the row's remark calls it impossible."""
    given = row["inputs"]
    limit = re.search(r"peak \(([\d.e]+)\)", row["note"])
    rate = implied_rate(
        total_flops(row), given["days"], given["systems"], float(limit[1]) if limit else float("inf")
    )
    exceeded = "exceeds its" in row["source_inconsistent"]
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


def foundry_checks(row: dict[str, Any], sizes: dict[str, Any]) -> list[tuple[str, Check]]:
    """Parameters, MFU and HFU of a row of llm-foundry's table, from its sizes and speed."""
    shape = any_gpt({**sizes, "seq": row["seq"]})
    dtype = "fp8" if "fp8" in row["precision"] else "bf16"
    peak_tflops = getattr(hardware_named(row["gpu"]).peak_tflops, dtype)
    attention = attention_flops_per_token(
        layers=shape.layers, width=shape.hidden, sequence_length=shape.sequence_length
    )
    model_flops = training_flops(shape.parameters, 1) + attention
    recomputed = model_flops / 3 if row["act_ckpt"] else 0
    percent = 100 * utilisation(row["tok_s_gpu"] * model_flops, 1, 1, peak_tflops * 1e12)
    hfu_percent = hardware_utilisation(percent, model_flops, recomputed)
    name = f"{row['model']}.{row['seq']}.{row['gpus']}x{row['gpu']}.{row['precision']}"
    return [
        (f"{name}.params", Check(shape.parameters, row["params"], 1e-6)),
        (f"{name}.mfu", Check(percent, row["mfu_pct"], FOUNDRY_ROUNDING)),
        (f"{name}.hfu", Check(hfu_percent, row["hfu_pct"], FOUNDRY_ROUNDING)),
    ]
