"""Scaling laws say what compute, parameters and tokens are worth, and agree with their publications."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.plan import budget
from launcher.plan.scaling import (
    BESIROGLU,
    HOFFMANN,
    HOFFMANN_APPROACH_1,
    HOFFMANN_APPROACH_2,
    HOFFMANN_ROUNDED,
    KAPLAN,
    LAWS,
    LLAMA_3,
    LOSSES,
    RULE,
    Law,
    Optimum,
    ParametricLaw,
    PowerLaw,
    continuing_cost,
    effective_tokens,
    kaplan_loss,
    kaplan_loss_of_compute,
    repetition_penalty,
    split_tokens,
    training_flops,
)

GOPHER_FLOPS = 5.76e23
computes = st.floats(1e15, 1e28)
sizes = st.floats(1e6, 1e13)
laws = st.sampled_from(list(LAWS.values()))
losses = st.sampled_from(list(LOSSES.values()))


def ratio(optimum: Optimum) -> float:
    return optimum.tokens / optimum.parameters


@given(laws, computes, st.sampled_from([6, 3]))
def test_the_optimum_spends_exactly_the_compute(law: Law, flops: float, factor: int) -> None:
    found = law.optimum(flops, factor)
    assert training_flops(found.parameters, found.tokens, factor) == pytest.approx(flops)


@given(laws, computes)
def test_optimal_tokens_lie_on_the_same_frontier_as_optimal_models(law: Law, flops: float) -> None:
    found = law.optimum(flops)
    assert law.optimal_tokens(found.parameters) == pytest.approx(found.tokens)


@given(laws, computes, st.floats(1.01, 1000))
def test_more_compute_wants_a_larger_model_and_more_tokens(law: Law, flops: float, times: float) -> None:
    before, after = law.optimum(flops), law.optimum(times * flops)
    assert after.parameters > before.parameters
    assert after.tokens > before.tokens


@given(losses, computes, st.floats(1.05, 20), st.booleans())
def test_any_other_split_of_the_compute_has_a_higher_loss(
    law: ParametricLaw, flops: float, away: float, larger: bool
) -> None:
    best = law.optimum(flops)
    parameters = best.parameters * (away if larger else 1 / away)
    assert law.loss(parameters, flops / 6 / parameters) > law.loss(*best)


@given(losses, sizes, sizes, st.floats(1.01, 1000))
def test_loss_falls_with_parameters_and_with_tokens(
    law: ParametricLaw, parameters: float, tokens: float, times: float
) -> None:
    loss = law.loss(parameters, tokens)
    assert law.irreducible < law.loss(times * parameters, tokens) < loss
    assert law.irreducible < law.loss(parameters, times * tokens) < loss


def test_the_rule_spends_gopher_s_compute_as_chinchilla_did() -> None:
    assert RULE.optimum(GOPHER_FLOPS).parameters == pytest.approx(70e9, rel=0.02)
    assert RULE.optimum(GOPHER_FLOPS).tokens == pytest.approx(1.4e12, rel=0.02)


@pytest.mark.parametrize(
    ("law", "tokens_per_parameter"), [(BESIROGLU, 18.4), (HOFFMANN, 59.1), (HOFFMANN_ROUNDED, 92.6)]
)
def test_digits_decide_what_a_parametric_law_wants_at_gopher_s_compute(
    law: ParametricLaw, tokens_per_parameter: float
) -> None:
    assert ratio(law.optimum(GOPHER_FLOPS)) == pytest.approx(tokens_per_parameter, abs=0.05)


def test_no_plan_is_made_with_hoffmann_s_rounded_third_approach() -> None:
    assert HOFFMANN_ROUNDED not in (*LAWS.values(), *LOSSES.values())
    planned = budget.optimal_models(GOPHER_FLOPS)
    assert all(ratio(optimum) < 60 for optimum in planned.values())


def test_exponents_of_the_third_approach_are_the_printed_ones() -> None:
    assert HOFFMANN.exponents == pytest.approx((0.46, 0.54), rel=0.01)
    assert sum(HOFFMANN.exponents) == pytest.approx(1)


@pytest.mark.parametrize(
    ("law", "flops", "parameters", "tokens"),
    [
        (HOFFMANN_APPROACH_1, 1.23e22, 10e9, 205.1e9),
        (HOFFMANN_APPROACH_1, 1.27e26, 1e12, 21.2e12),
        (HOFFMANN_APPROACH_1, 1.3e28, 10e12, 216.2e12),
        (HOFFMANN_APPROACH_2, 1.2e20, 1e9, 20e9),
        (HOFFMANN_APPROACH_2, 4.54e24, 175e9, 4.3e12),
        (HOFFMANN_APPROACH_2, 1.75e28, 10e12, 292e12),
    ],
)
def test_approaches_1_and_2_follow_their_published_tables(
    law: PowerLaw, flops: float, parameters: float, tokens: float
) -> None:
    assert law.optimum(flops).parameters == pytest.approx(parameters, rel=0.08)
    assert law.optimum(flops).tokens == pytest.approx(tokens, rel=0.08)


def test_ten_times_the_compute_makes_kaplan_s_model_five_times_larger_on_twice_the_tokens() -> None:
    assert KAPLAN.growth(10) == pytest.approx((5.37, 1.86), abs=0.01)


def test_llama_3_s_law_holds_its_published_optimum_not_its_rounded_constants() -> None:
    assert LLAMA_3.optimum(3.8e25) == Optimum(402e9, 16.55e12)
    assert pytest.approx(10.5e12, rel=0.01) == 0.29 * 3.8e25**0.53


@given(sizes, sizes)
def test_kaplan_s_model_with_little_data_is_worse_than_either_limit(parameters: float, tokens: float) -> None:
    both = kaplan_loss(parameters, tokens)
    assert both > kaplan_loss(parameters, 1e30)
    assert both > kaplan_loss(1e30, tokens)


def test_kaplan_s_losses_are_those_of_gpt2_s_size_and_gpt3_s_data() -> None:
    assert kaplan_loss(parameters=1.5e9) == pytest.approx(2.3036, abs=1e-4)
    assert kaplan_loss(tokens=300e9) == pytest.approx(1.6378, abs=1e-4)
    assert kaplan_loss_of_compute(3.1e8 * 8.64e19) == pytest.approx(1)
    with pytest.raises(ValueError, match="needs parameters, tokens or both"):
        kaplan_loss()


@given(sizes, st.floats(1, 200))
def test_repeats_are_worth_less_than_new_tokens_but_never_nothing(unique: float, epochs: float) -> None:
    worth = effective_tokens(epochs * unique, unique)
    assert unique * (1 - 1e-9) <= worth <= epochs * unique * (1 + 1e-9)
    assert worth <= effective_tokens(1.1 * epochs * unique, unique) < unique * (1 + 15.4)


@given(sizes, st.floats(0.01, 1))
def test_what_is_read_at_most_once_is_worth_all_of_it(unique: float, share: float) -> None:
    assert effective_tokens(share * unique, unique) == pytest.approx(share * unique)


@given(losses, sizes, sizes, st.floats(1, 4))
def test_up_to_four_epochs_cost_less_than_three_percent_of_loss(
    law: ParametricLaw, parameters: float, unique: float, epochs: float
) -> None:
    assert 0 <= repetition_penalty(law, parameters, epochs * unique, unique) + 1e-12 < 0.03


@given(st.integers(1, 10**14), st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_tokens_by_corpus_add_up_and_are_within_one_of_their_share(tokens: int, shares: list[float]) -> None:
    weights = {str(index): share for index, share in enumerate(shares)}
    split = split_tokens(tokens, weights)
    assert sum(split.values()) == tokens
    for name, weight in weights.items():
        assert split[name] == pytest.approx(tokens * weight / sum(shares), abs=1.5, rel=1e-9)


def test_one_percent_replay_of_meditron_is_half_a_billion_tokens() -> None:
    split = split_tokens(48_100_000_000, {"medical": 0.99, "replay": 0.01})
    assert split == {"medical": 47_619_000_000, "replay": 481_000_000}


def test_continuing_on_as_much_as_the_parent_saw_costs_half_of_training_anew() -> None:
    assert continuing_cost(tokens=300e9, parent_tokens=300e9) == 0.5
