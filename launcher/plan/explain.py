"""Where does each number come from? The formula and source of every quantity of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class Origin(NamedTuple):
    """How a number is made, and who says so."""

    formula: str
    source: str


CONFIG = "the configuration"
CARD = "configs/hardware, each preset names its data sheet"
KAPLAN = "Kaplan et al. 2020, arXiv:2001.08361"
HOFFMANN = "Hoffmann et al. 2022, arXiv:2203.15556"
BESIROGLU = "Besiroglu et al. 2024, arXiv:2404.10102"
MUENNIGHOFF = "Muennighoff et al. 2023, arXiv:2305.16264"
IBRAHIM = "Ibrahim et al. 2024, arXiv:2403.08763"
PALM = "Chowdhery et al. 2022, arXiv:2204.02311, appendix B"
ZERO = "Rajbhandari et al. 2020, arXiv:1910.02054"
TRACES = "closed forms, checked against traces of real modules: plan --verify"
SPEED = "fitted to 130 published steps of llm-foundry, or measured: plan --calibrate"
DALY = "Daly 2006, doi:10.1016/j.future.2004.11.016"
RSC = "Kokolis et al. 2024, arXiv:2410.21680"
LECTURES = "lecture notes; a rule of thumb"
MODULES = "equals the transformers modules"

ORIGINS: dict[str, Origin] = {
    path: Origin(formula, source)
    for path, formula, source in (
        ("model.*", "sizes of the architecture", "preset or config.json"),
        ("model.parameters", "sum over embeddings, blocks and head", MODULES),
        ("model.parameters_active", "those that one token passes through", MODULES),
        ("model.parameters_embedding", "rows that are looked up", MODULES),
        ("budget.tokens", "r N, C / 6N, rate x hours, or as given: budget.kind", HOFFMANN),
        ("budget.parameters", "N of the scaling laws", HOFFMANN),
        ("budget.tokens_per_parameter", "D / N", HOFFMANN),
        ("budget.steps", "D / (B T), rounded up", CONFIG),
        ("budget.global_batch_tokens", "B T", CONFIG),
        ("budget.epochs", "D / unique tokens", CONFIG),
        ("budget.optimal_tokens", "D that budget.law wants for N; rule: 20 N", HOFFMANN),
        ("budget.over_training", "D / 20 N", HOFFMANN),
        ("budget.effective_tokens", "U + U R (1 - exp(-(D/U - 1) / R)), R = 15.39", MUENNIGHOFF),
        ("budget.repetition_penalty", "L(N, D') / L(N, D) - 1", MUENNIGHOFF),
        ("budget.tokens_by_corpus.*", "D x weight / sum of weights", IBRAHIM),
        ("budget.loss_nats.besiroglu", "1.8172 + 482.01 / N^0.3478 + 2085.43 / D^0.3658", BESIROGLU),
        ("budget.loss_nats.hoffmann", "1.6934 + 406.4 / N^0.3392 + 410.7 / D^0.2849", HOFFMANN),
        ("budget.optimum.rule.*", "N = sqrt(C / 120), D = 20 N", HOFFMANN),
        ("budget.optimum.*", "least L(N, D) with 6 N D = C", BESIROGLU),
        ("budget.continuation.*", "D, and D / (parent's tokens + D)", IBRAHIM),
        ("compute.flops", "FLOPs per token x D", PALM),
        ("compute.flops_per_token", "6 N + 12 L H Q T, N without looked-up rows", PALM),
        (
            "compute.recomputed_flops_per_token",
            "what checkpointing repeats; in HFU, not in MFU",
            "module shapes",
        ),
        ("compute.flops_per_token_6n", "6 N, all active parameters", KAPLAN),
        ("compute.flops_per_token_hoffmann", "3 x forward by component, blocks only", HOFFMANN),
        ("compute.flops_per_token_hoffmann_with_tables", "the same with embeddings and logits", HOFFMANN),
        ("compute.petaflop_s_days", "C / 8.64e19", "definition"),
        ("memory.components_gib.*", "the fullest moment of a step, by component", TRACES),
        ("memory.active_gib", "sum of the components", TRACES),
        ("memory.active_interval_gib.*", "+-5 % traced strategies, +-10 % DeepSpeed", TRACES),
        (
            "memory.reserved_gib",
            "1.2 x active eager, 1.12 compiled",
            "published reserved over traced active bytes",
        ),
        (
            "memory.reserved_interval_gib.*",
            "1.03 to 1.25 x active",
            "published reserved over traced active bytes",
        ),
        ("memory.device_gib", "reserved + CUDA context and NCCL, 2 GiB", "what nvidia-smi shows"),
        ("memory.device_interval_gib.*", "reserved + 1.5 to 2.5 GiB", "what nvidia-smi shows"),
        ("memory.limit_gib", "memory a program can use", CARD),
        ("memory.host_gib", "workers' runtime, offloaded states, a copy of what they save; per node", TRACES),
        ("memory.host_limit_gib", "hardware.host_memory_gib", CONFIG),
        ("memory.by_strategy.*", "the same formulas under each strategy", TRACES),
        ("memory.rules_gb.*", "2 + 2 + 12 bytes per parameter, split over d ranks by stage", ZERO),
        (
            "memory.rules_gb.fp32_24_bytes",
            "4 + 4 + 8 + 8 N: weights, gradients, AdamW, activations",
            LECTURES,
        ),
        ("memory.rules_gb.slide_rule_80_bytes", "20 x 4 N, which takes 20 bytes for a factor", LECTURES),
        ("time.step_seconds", "sum of time.parts_seconds", SPEED),
        ("time.step_seconds_low", "-15 %, calibrated -5 %", SPEED),
        ("time.step_seconds_high", "+15 %, calibrated +5 %", SPEED),
        ("time.tokens_per_second", "B T / step seconds", SPEED),
        ("time.mfu", "FLOPs per token x tokens per second / peaks", PALM),
        ("time.hfu", "the same with recomputed FLOPs", PALM),
        ("time.seconds", "steps x step seconds / (productive share x goodput)", SPEED),
        ("time.days", "seconds / 86400", "definition"),
        ("time.parts_seconds.compute", "FLOPs / (peak x share reached)", SPEED),
        ("time.parts_seconds.memory", "bytes moved / (0.8 x bandwidth)", SPEED),
        ("time.parts_seconds.network", "2 Psi or 3 Psi over links, less what is hidden", ZERO),
        ("time.parts_seconds.host", "offloaded states over the host's link", CARD),
        ("time.parts_seconds.data", "what a loader slower than the step adds", CONFIG),
        ("cost.gpu_hours", "days x 24 x ranks", "definition"),
        ("cost.usd", "GPU-hours x hardware.usd_per_hour", CARD),
        ("cost.kwh", "GPU-hours x hardware.watts x plan.overhead_power", CARD),
        ("cost.kg_co2", "kWh x plan.kg_co2_per_kwh", CONFIG),
        ("cost.checkpoint_storage_gib", "size x (checkpoint.keep_last + 1)", CONFIG),
        ("checkpoint.size_gib", "12 N bytes: fp32 weights and two moments", "docs/decisions/0009"),
        ("checkpoint.save_seconds", "size / (nodes x plan.storage_gb_s), training waits", CONFIG),
        ("checkpoint.interval_minutes", "Daly's interval", DALY),
        ("checkpoint.hours_between_failures", "1000 days / (rate x nodes)", RSC),
        ("checkpoint.expected_goodput", "I / (I + C) / (1 + lost / MTBF)", DALY),
        ("advice.*", "the same formulas, searched over ways to run", "launcher/plan/advice.py"),
        ("prices.*", "speed without the constraint over speed with it, less 1", "launcher/plan/advice.py"),
        ("world.*", "as configured", CONFIG),
    )
}


def rows(plan: dict[str, Any]) -> Iterator[tuple[str, float, Origin]]:
    """Dotted path, value and origin of every number of a plan."""
    for path, value in numbers(plan):
        yield path, value, origin(path)


def numbers(node: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested JSON values, with its dotted path."""
    if isinstance(node, (dict, list)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from numbers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        yield path, node


def origin(path: str) -> Origin:
    """The origin of a path: its own, or that of the longest beginning that ends in `.*`.

    Raises KeyError for a number that nothing explains.
    """
    if path in ORIGINS:
        return ORIGINS[path]
    beginning = path
    while "." in beginning:
        beginning = beginning.rpartition(".")[0]
        if f"{beginning}.*" in ORIGINS:
            return ORIGINS[f"{beginning}.*"]
    raise KeyError(path)
