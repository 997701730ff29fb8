"""How rows about scaling laws and budgets are asked of the planner."""

from __future__ import annotations

import re

from truth import Check, Evaluator, Row, compare

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
}
"""Laws by the word that rows name them with."""
KNOWN = {
    (law.irreducible, law.a, law.b, law.alpha, law.beta): law
    for law in (scaling.BESIROGLU, scaling.HOFFMANN, scaling.HOFFMANN_ROUNDED)
}
ROUNDING_OF_NOTES = 0.01
"""Notes give ratios with two digits."""


def published(row: Row) -> ParametricLaw | PowerLaw:
    return next(law for word, law in PUBLISHED.items() if word in row["id"].lower())


def hoffmann(row: Row) -> list[Check]:
    return compare(row, scaling.training_flops(row["inputs"]["params"], row["inputs"]["tokens"]))


def parametric(row: Row) -> list[Check]:
    given = row["inputs"]
    constants = tuple(given[key] for key in "EABab")
    law = KNOWN.get(constants) or ParametricLaw(*constants)
    if "C" not in given:
        return compare(row, law.loss(given["N"], given["D"]))
    optimum = law.optimum(given["C"])
    return compare(row, optimum.tokens if row["unit"] == "tokens" else optimum.parameters)


def exponents(row: Row) -> list[Check]:
    law, times = published(row), re.search(r"([\d.]+)x", row["id"])
    if times is None:
        return compare(row, law.exponents)
    assert isinstance(law, PowerLaw)
    return compare(row, law.growth(float(times[1])))


def kaplan(row: Row) -> list[Check]:
    given = row["inputs"]
    if row["unit"] in ("tokens", "params"):
        optimum = published(row).optimum(given["C"])
        return compare(row, optimum.tokens if row["unit"] == "tokens" else optimum.parameters)
    if "C" in given:
        return compare(row, scaling.kaplan_loss_of_compute(given["C"]))
    return compare(row, scaling.kaplan_loss(given.get("N_nonembedding", given.get("N")), given.get("D")))


def data_constrained(row: Row) -> list[Check]:
    return compare(row, scaling.effective_tokens(row["inputs"]["total"], row["inputs"]["unique"]))


def continual(row: Row) -> list[Check]:
    given = row["inputs"]
    if "old" in given:
        return compare(row, scaling.continuing_cost(given["new"], given["old"]))
    weights = {"new": 1 - given["replay"], "replay": given["replay"]}
    return compare(row, list(scaling.split_tokens(round(given["tokens"]), weights).values()))


def seed_tokens(row: Row) -> list[Check]:
    given = row["inputs"]
    checks = compare(row, scaling.RULE.optimal_tokens(given["params"]))
    return checks + noted_verdict(row, given.get("actual_tokens", given.get("tokens")))


def seed_ratio(row: Row) -> list[Check]:
    given = row["inputs"]
    parameters, tokens = given["params"], given.get("tokens", given.get("trained"))
    if row["unit"] == "tokens/param":
        checks = compare(row, tokens / parameters)
    else:
        checks = compare(row, scaling.RULE.optimal_tokens(parameters))
    for of, ratio in re.findall(r"(\w+)/optimum ([\d.]+)", row.get("note", "")):
        checks.append(Check(over_training(given[of], parameters), float(ratio), ROUNDING_OF_NOTES))
    return checks + noted_verdict(row, tokens)


def noted_verdict(row: Row, tokens: float | None) -> list[Check]:
    noted = re.search(r"verdict:? (under|over|balanced)", row.get("note", ""))
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
