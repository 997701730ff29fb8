"""What is a model of N parameters worth after D tokens? Published scaling laws, losses in nats per token.

C training FLOPs, N parameters (the active ones of a mixture of experts), D tokens. C = 6 N D, or 3 N D
in an encoder-decoder, where a token passes through one half of the model: the factor is `flops_factor`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

FLOPS_FACTOR = 6
"""FLOPs per parameter and token: 2 forward, 4 backward (Kaplan et al. 2020, section 2.1)."""


@dataclass(frozen=True)
class Optimum:
    """The model and the tokens that a law wants a compute to be spent on."""

    parameters: float
    tokens: float

    def __iter__(self) -> Iterator[float]:
        """N and D, as ParametricLaw.loss takes them."""
        return iter((self.parameters, self.tokens))


class Law(Protocol):
    """What compute-optimal means."""

    def optimum(self, flops: float, flops_factor: float = FLOPS_FACTOR) -> Optimum:
        """The compute-optimal model and its tokens."""

    def optimal_tokens(self, parameters: float) -> float:
        """Tokens for which a model of this size is compute-optimal."""


def training_flops(parameters: float, tokens: float, flops_factor: float = FLOPS_FACTOR) -> float:
    """C = 6 N D."""
    return flops_factor * parameters * tokens


@dataclass(frozen=True)
class FixedRatio:
    """The same tokens per parameter at every size."""

    tokens_per_parameter: float

    def optimum(self, flops: float, flops_factor: float = FLOPS_FACTOR) -> Optimum:
        """N = sqrt(C / (6 r)) and D = r N; with 20 tokens per parameter N = sqrt(C / 120)."""
        parameters = math.sqrt(flops / flops_factor / self.tokens_per_parameter)
        return Optimum(parameters, self.tokens_per_parameter * parameters)

    def optimal_tokens(self, parameters: float) -> float:
        """D = r N."""
        return self.tokens_per_parameter * parameters


@dataclass(frozen=True)
class ParametricLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, equation 2)."""

    irreducible: float
    """E, the entropy of text."""
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token after one pass over these tokens."""
        return float(self.irreducible + self.a / parameters**self.alpha + self.b / tokens**self.beta)

    @property
    def exponents(self) -> tuple[float, float]:
        """Of C, in the optimal N and D: beta / (alpha + beta) and alpha / (alpha + beta)."""
        both = self.alpha + self.beta
        return self.beta / both, self.alpha / both

    def optimum(self, flops: float, flops_factor: float = FLOPS_FACTOR) -> Optimum:
        """The least loss for C = 6 N D (Hoffmann et al. 2022, equation 4).

        N = G (C/6)^(beta / (alpha + beta)), D = C / (6 N), G = (alpha A / (beta B))^(1 / (alpha + beta)).
        """
        product = flops / flops_factor
        balance = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        parameters = balance * product ** self.exponents[0]
        return Optimum(parameters, product / parameters)

    def optimal_tokens(self, parameters: float) -> float:
        """D = (beta B / (alpha A))^(1 / beta) N^(alpha / beta): where N dL/dN equals D dL/dD."""
        balance = self.beta * self.b / (self.alpha * self.a)
        return float((balance * parameters**self.alpha) ** (1 / self.beta))


RULE = FixedRatio(20.0)
"""Hoffmann et al. 2022: about 20 tokens per parameter, which Chinchilla's 70B and 1.4T are."""
BESIROGLU = ParametricLaw(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
"""Besiroglu et al. 2024 (arXiv:2404.10102): Hoffmann's third approach fitted again to the same runs;
agrees with the first two. 18 tokens per parameter at Gopher's compute."""
HOFFMANN = ParametricLaw(1.6934, 406.4, 410.7, 0.3392, 0.2849)
"""Hoffmann et al. 2022, third approach, digits of the paper's TeX source. 59 tokens per parameter at
Gopher's compute, three times what the paper's other approaches say."""
HOFFMANN_ROUNDED = ParametricLaw(1.69, 406.4, 410.7, 0.34, 0.28)
"""The same as printed in the paper. Two digits less turn 59 tokens per parameter into 93, so no plan is
made with it; it is here to reproduce what others computed."""

LAWS: dict[str, Law] = {"rule": RULE, "besiroglu": BESIROGLU, "hoffmann": HOFFMANN}
"""What budget.law may be."""
LOSSES: dict[str, ParametricLaw] = {"besiroglu": BESIROGLU, "hoffmann": HOFFMANN}
"""Laws that estimate a loss."""


@dataclass(frozen=True)
class PowerLaw:
    """A published optimum, continued by published exponents: N and D grow as powers of C.

    Its N and D keep the publication's own count of FLOPs, so 6 N D may miss C by some percent.
    """

    flops: float
    parameters: float
    tokens: float
    exponents: tuple[float, float]
    """Of C, in the optimal N and D."""

    def optimum(self, flops: float) -> Optimum:
        """N0 (C / C0)^a and D0 (C / C0)^b."""
        for_parameters, for_tokens = self.growth(flops / self.flops)
        return Optimum(self.parameters * for_parameters, self.tokens * for_tokens)

    def growth(self, times_compute: float) -> tuple[float, float]:
        """How many times larger N and D become when C does: x^a and x^b."""
        return times_compute ** self.exponents[0], times_compute ** self.exponents[1]


PETAFLOP_S_DAY = 1e15 * 86400
HOFFMANN_APPROACH_1 = PowerLaw(5.76e23, 67e9, 1.5e12, (0.50, 0.50))
"""Envelope of training curves (Hoffmann et al. 2022, tables 2 and 3), from Gopher's compute."""
HOFFMANN_APPROACH_2 = PowerLaw(6.88e23, 67e9, 1.7e12, (0.49, 0.51))
"""IsoFLOP profiles (Hoffmann et al. 2022, tables 2 and A3)."""
KAPLAN = PowerLaw(PETAFLOP_S_DAY, 1.3e9, 2e10, (0.73, 0.27))
"""Kaplan et al. 2020 (arXiv:2001.08361), table 6; N without embeddings. Its learning rates were not fitted
to the length of each run, so it wants models too large and trained too briefly."""
LLAMA_3 = PowerLaw(3.8e25, 402e9, 16.55e12, (0.47, 0.53))
"""Llama Team 2024 (arXiv:2407.21783), section 3.2.1: the published optimum and exponent. The printed
D = 0.29 C^0.53 is rounded so far that it gives 10.5T tokens here."""


def kaplan_loss(parameters: float | None = None, tokens: float | None = None) -> float:
    """Loss of a model limited by its size, by its data, or by both (Kaplan et al. 2020).

    parameters, without embeddings: L(N) = (8.8e13 / N)^0.076; tokens: L(D) = (5.4e13 / D)^0.095
    (equations 1.1, 1.2); both: L(N, D) = ((6.4e13 / N)^(0.076 / 0.103) + 1.8e13 / D)^0.103 (table 2).
    """
    if parameters is not None and tokens is not None:
        return float(((6.4e13 / parameters) ** (0.076 / 0.103) + 1.8e13 / tokens) ** 0.103)
    if parameters is not None:
        return float((8.8e13 / parameters) ** 0.076)
    if tokens is not None:
        return float((5.4e13 / tokens) ** 0.095)
    raise ValueError("kaplan_loss needs parameters, tokens or both")


def kaplan_loss_of_compute(flops: float) -> float:
    """L(C) = (3.1e8 PF-days / C)^0.050, the compute spent optimally (Kaplan et al. 2020, equation 1.3)."""
    return float((3.1e8 * PETAFLOP_S_DAY / flops) ** 0.050)


REPETITIONS_HALF_LIFE = 15.387756
"""R*, by which repeated tokens have lost 1 - 1/e of their worth (Muennighoff et al. 2023, appendix A)."""
SAFE_EPOCHS = 4
"""Passes up to which repeats are almost as good as new text (Muennighoff et al. 2023): the loss is less
than 3 % higher for any N and D, since the worth of all tokens is at least 93 % of theirs."""
USEFUL_EPOCHS = 16
"""Passes beyond which repeats are worth next to nothing (Muennighoff et al. 2023)."""


def effective_tokens(tokens: float, unique_tokens: float) -> float:
    """D' new tokens that D tokens are worth when only U of them are different.

    D' = U + U R* (1 - exp(-(D / U - 1) / R*)) for D above U (Muennighoff et al. 2023, arXiv:2305.16264).
    """
    if tokens <= unique_tokens:
        return tokens
    repetitions = tokens / unique_tokens - 1
    worth = REPETITIONS_HALF_LIFE * -math.expm1(-repetitions / REPETITIONS_HALF_LIFE)
    return unique_tokens * (1 + worth)


def repetition_penalty(law: ParametricLaw, parameters: float, tokens: float, unique_tokens: float) -> float:
    """By how much of itself the loss is higher than with new text only: L(N, D') / L(N, D) - 1."""
    repeated = law.loss(parameters, effective_tokens(tokens, unique_tokens))
    return repeated / law.loss(parameters, tokens) - 1


def split_tokens(tokens: int, weights: dict[str, float]) -> dict[str, int]:
    """Tokens by corpus, in proportion to the weights; whole numbers that add up.

    Of a continued model T (1 - r) are new and T r are replayed (Ibrahim et al. 2024, arXiv:2403.08763).
    """
    total = sum(weights.values())
    split, seen, given = {}, 0.0, 0
    for name, weight in weights.items():
        seen += weight
        until = round(tokens * (seen / total))
        split[name], given = until - given, until
    return split


def continuing_cost(tokens: float, parent_tokens: float) -> float:
    """Compute of continuing on T tokens over that of training anew on the union: T / (P + T)."""
    return tokens / (parent_tokens + tokens)


CONTINUE_ADVICE = (
    "Warm the learning rate up to its peak again and decay it again (cosine); how long the warm-up takes "
    "hardly matters (Gupta et al. 2023, arXiv:2308.04014; Ibrahim et al. 2024, arXiv:2403.08763).",
    "Replay the parent's text against forgetting: 1 to 5 % where new text is of its kind, 25 % and more "
    "where language or domain changes (Ibrahim et al. 2024; Chen et al. 2023, arXiv:2311.16079).",
)
"""How to continue a pre-trained model."""
