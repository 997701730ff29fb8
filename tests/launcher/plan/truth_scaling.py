"""How rows about scaling laws and budgets are asked of the planner."""

from __future__ import annotations

import re

from truth import Check, Evaluator, Row, compare, number_in

from launcher.plan import scaling
from launcher.plan.budget import over_training, verdict_of
from launcher.plan.scaling import ParametricLaw, PowerLaw

PUBLISHED: dict[str, ParametricLaw | PowerLaw] = {
    "approach1": scaling.HOFFMANN_APPROACH_1,
    "approach2": scaling.HOFFMANN_APPROACH_2,
    "approach3": scaling.HOFFMANN,
    "besiroglu": scaling.BESIROGLU,
    "kaplan": scaling.KAPLAN,
    "llama3": scaling.LLAMA_3,
    "chinchilla": scaling.HOFFMANN_APPROACH_1,
    "hoffmann": scaling.HOFFMANN_APPROACH_1,
}
"""Laws by the word that rows name them with; the first that is in it."""
KNOWN = {
    (law.irreducible, law.a, law.b, law.alpha, law.beta): law
    for law in (scaling.BESIROGLU, scaling.HOFFMANN, scaling.HOFFMANN_ROUNDED)
}
ROUNDING_OF_NOTES = 0.01
"""Notes give ratios with two digits."""


def published(row: Row) -> ParametricLaw | PowerLaw:
    given, name = row["inputs"], re.sub(r"[^a-z0-9]", "", row["id"].lower())
    name += f"approach{given['approach']}" if "approach" in given else ""
    for word, law in PUBLISHED.items():
        if word in name:
            return law
    raise KeyError(f"{row['id']}: names none of the laws {', '.join(PUBLISHED)}")


def hoffmann(row: Row) -> list[Check]:
    return compare(row, scaling.training_flops(row["inputs"]["params"], row["inputs"]["tokens"]))


def parametric(row: Row) -> list[Check]:
    given = row["inputs"]
    constants = tuple(given[key] for key in "EABab")
    law = KNOWN.get(constants) or ParametricLaw(*constants)
    if "C" not in given:
        return compare(row, law.loss(given["N"], given["D"]))
    optimum = law.optimum(given["C"])
    if "nats" in row["unit"]:
        return compare(row, law.loss(*optimum))
    return compare(row, of_optimum(optimum, row["unit"]))


def of_optimum(optimum: scaling.Optimum, unit: str) -> float:
    """Tokens, parameters, or tokens per parameter."""
    if "/param" in unit or "per param" in unit:
        return optimum.tokens / optimum.parameters
    return optimum.tokens if "tokens" in unit else optimum.parameters


def exponents(row: Row) -> list[Check]:
    law = published(row)
    times = number_in(r"([\d.]+)x", row["id"]) or number_in(r"([\d.]+)x", row["unit"])
    if times is None:
        return compare(row, law.exponents)
    return compare(row, [times**exponent for exponent in law.exponents])


PF_DAYS_BELOW = 1e15
"""Kaplan's compute is in PF/s-days; no published budget is so small in FLOPs."""


def kaplan(row: Row) -> list[Check]:
    given, unit = row["inputs"], row["unit"]
    if "C" in given:
        flops = given["C"] * (scaling.PETAFLOP_S_DAY if given["C"] < PF_DAYS_BELOW else 1)
        if "tokens" in unit or "params" in unit:
            return compare(row, of_optimum(published(row).optimum(flops), unit))
        return compare(row, scaling.kaplan_loss_of_compute(flops))
    parameters = given.get("N_nonembedding", given.get("N", given.get("params")))
    return compare(row, scaling.kaplan_loss(parameters, given.get("D", given.get("tokens"))))


def data_constrained(row: Row) -> list[Check]:
    given = row["inputs"]
    unique = given.get("unique", given.get("U"))
    total = given.get("total", given.get("D"))
    total = unique * given["epochs"] if total is None else total
    worth = scaling.effective_tokens(total, unique)
    return compare(row, worth / total if row["unit"] in ("fraction", "ratio", "share") else worth)


def continual(row: Row) -> list[Check]:
    given = row["inputs"]
    if "old" in given:
        ratio = scaling.continuing_cost(given["new"], given["old"])
        return compare(row, 1 - ratio if row["formula"].replace(" ", "").startswith("1-") else ratio)
    tokens, replay = (
        given[long] if long in given else given[short] for long, short in (("tokens", "T"), ("replay", "r"))
    )
    parts = scaling.split_tokens(round(tokens), {"new": 1 - replay, "replay": replay})
    if isinstance(row["expected"], list):
        return compare(row, list(parts.values()))
    return compare(row, parts["replay" if "replay" in row["unit"] + row["id"] else "new"])


def rule(row: Row) -> scaling.FixedRatio:
    """Chinchilla's 20 tokens per parameter, or as many as the formula says."""
    ratio = number_in(r"^(\d+(?:\.\d+)?) ?\*? ?N", row["formula"])
    return scaling.RULE if ratio is None else scaling.FixedRatio(ratio)


def seed_tokens(row: Row) -> list[Check]:
    given = row["inputs"]
    checks = compare(row, rule(row).optimal_tokens(given["params"]))
    return checks + noted_verdict(row, given.get("actual_tokens", given.get("tokens")))


def seed_ratio(row: Row) -> list[Check]:
    given = row["inputs"]
    parameters, tokens = given["params"], given.get("tokens", given.get("trained"))
    if "/param" in row["unit"]:
        checks = compare(row, tokens / parameters)
    elif "optimum" in row["unit"] or row["unit"] in ("ratio", "x"):
        checks = compare(row, over_training(tokens, parameters))
    else:
        checks = compare(row, scaling.RULE.optimal_tokens(parameters))
    for of, ratio in re.findall(r"(\w+)/optimum ([\d.]+)", row["note"]):
        checks.append(Check(over_training(given[of], parameters), float(ratio), ROUNDING_OF_NOTES))
    return checks + noted_verdict(row, tokens)


def noted_verdict(row: Row, tokens: float | None) -> list[Check]:
    noted = re.search(r"verdict:? (under|over|balanced)", row["note"])
    if noted is None or tokens is None:
        return []
    expected = noted[1] if noted[1] == "balanced" else f"{noted[1]}-trained"
    return [Check(verdict_of(row["inputs"]["params"], tokens), expected, 0)]


EVALUATORS: dict[str, Evaluator] = {
    "scaling_hoffmann": hoffmann,
    "scaling_parametric": parametric,
    "scaling_exponents": exponents,
    "scaling_kaplan": kaplan,
    "data_constrained": data_constrained,
    "continual": continual,
    "seed_tokens": seed_tokens,
    "seed_ratio": seed_ratio,
}
