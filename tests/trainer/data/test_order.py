"""Which corpus and lane a row comes from is arithmetic: exact proportions, no state, the same everywhere."""

from __future__ import annotations

import time
from fractions import Fraction
from math import ceil, gcd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from configs.schema import ConfigError, Data
from trainer.data.order import PARTS, Mixture, Order, shares

LENGTH = 128
weight = st.one_of(st.integers(1, 100).map(float), st.floats(1e-2, 1e2))
some_weights = st.sampled_from([1, 2, 3, 5, 9]).flatmap(lambda n: st.lists(weight, min_size=n, max_size=n))


def named(weights: list[float]) -> dict[str, float]:
    return {f"corpus{number}": weight for number, weight in enumerate(weights)}


def data(weights: dict[str, float], lanes: int = 16, **more: object) -> Data:
    corpora = {name: {"train": "x.jsonl", "weight": weight} for name, weight in weights.items()}
    return Data.model_validate({"corpora": corpora, "lanes": lanes} | more)


def order(weights: dict[str, float], lanes: int = 16, seed: int = 0, **more: object) -> Order:
    return Order(data(weights, lanes, **more), LENGTH, seed)


def mixture(weights: list[float]) -> Mixture:
    return Mixture(shares(weights, 1.0, [""] * len(weights)))


def excess(mixture: Mixture, rows: int) -> NDArray[np.int64]:
    """D (s - n a / D) of every corpus after n = 0 .. rows rows, exact: [rows + 1, corpora]."""
    dealt = np.eye(len(mixture.counts), dtype=np.int64)[mixture.corpus(0, rows)]
    sums = np.concatenate([np.zeros((1, len(mixture.counts)), np.int64), dealt.cumsum(0)])
    due: NDArray[np.int64] = np.arange(rows + 1)[:, None] * np.array(mixture.counts)
    return sums * mixture.period - due


@settings(max_examples=25, deadline=None)
@given(weights=some_weights)
def test_every_first_part_of_the_run_keeps_the_proportions_within_less_than_a_row(
    weights: list[float],
) -> None:
    dealt = mixture(weights)
    off = np.abs(excess(dealt, dealt.period + 100)).max()
    slots = max(2, 2 * len(weights) - 2)
    assert slots * off <= (slots - 1) * dealt.period


@settings(max_examples=25, deadline=None)
@given(weights=some_weights)
def test_any_stretch_of_rows_keeps_the_proportions_within_two_rows_or_one_of_two_corpora(
    weights: list[float],
) -> None:
    dealt = mixture(weights)
    off = excess(dealt, 2 * dealt.period)
    assert np.ptp(off, axis=0).max() <= (1 if len(weights) <= 2 else 2) * dealt.period


@settings(max_examples=25, deadline=None)
@given(weights=some_weights, first=st.integers(0, 10**13))
def test_every_period_has_each_corpus_exactly_as_often_as_its_share_says(
    weights: list[float], first: int
) -> None:
    dealt = mixture(weights)
    counted = np.bincount(dealt.corpus(first, dealt.period), minlength=len(weights))
    assert counted.tolist() == list(dealt.counts)


@settings(max_examples=200, deadline=None)
@given(weights=some_weights)
def test_shares_are_those_of_the_weights_to_one_part(weights: list[float]) -> None:
    counts = shares(weights, 1.0, [""] * len(weights))
    assert sum(counts) <= PARTS
    exact = [Fraction(str(weight)) / sum(Fraction(str(weight)) for weight in weights) for weight in weights]
    off = [abs(Fraction(own, sum(counts)) - share) for own, share in zip(counts, exact, strict=True)]
    assert max(off) < Fraction(1, PARTS)
    if all(PARTS % share.denominator == 0 for share in exact):
        assert max(off) == 0


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([0.7, 0.3], (7, 3)),
        ([3, 7], (3, 7)),
        ([5.0, 5.0, 5.0], (1, 1, 1)),
        ([0.23, 0.17, 0.6], (23, 17, 60)),
        ([0.0, 2.0], (0, 1)),
    ],
)
def test_weights_with_a_small_common_denominator_are_met_exactly(
    weights: list[float], counts: tuple[int, ...]
) -> None:
    assert shares(weights, 1.0, [""] * len(weights)) == counts


@pytest.mark.parametrize(
    ("weights", "corpora"), [([1.0], "aaaa"), ([1.0, 1.0], "abab"), ([1.0, 3.0], "babb"), ([2, 1, 1], "abac")]
)
def test_small_mixtures_are_what_one_expects(weights: list[float], corpora: str) -> None:
    dealt = "".join("abc"[corpus] for corpus in mixture(weights).corpus(0, 400))
    assert dealt == corpora * 100


def test_the_order_of_corpora_in_the_configuration_does_not_matter() -> None:
    one, other = order({"a": 0.5, "b": 0.2, "c": 0.3}), order({"c": 0.3, "b": 0.2, "a": 0.5})
    assert one.corpora == other.corpora == ["a", "b", "c"]
    assert np.array_equal(one.sources(0, 500), other.sources(0, 500))


def test_corpora_without_train_shards_take_no_part() -> None:
    with_held_out = data({"a": 0.5, "b": 0.5}).model_dump()
    with_held_out["corpora"]["0"] = {"validation": "x.jsonl", "weight": 9}
    held_out = Order(Data.model_validate(with_held_out), LENGTH, 0)
    assert held_out.corpora == ["a", "b"]
    assert np.array_equal(held_out.sources(0, 500), order({"a": 0.5, "b": 0.5}).sources(0, 500))


def test_a_weight_that_no_row_could_stand_for_is_refused_by_its_key() -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.corpora\.b\.weight=1e-05: is 1e-05 of the rows, must be at least 1/65536$"
    ):
        order({"a": 1.0, "b": 1e-5})
    with pytest.raises(ConfigError, match=r"^data\.stages\[1\]\.weights\.a=1e-05: "):
        order(
            {"a": 1.0, "b": 1.0},
            stages=[{"until_tokens": 999, "weights": {"a": 1}}, {"weights": {"a": 1e-5, "b": 1}}],
        )


@pytest.mark.parametrize(
    ("temperature", "counts"), [(2.0, (10, 1)), (0.5, (10_000, 1)), (1e300, (1, 1)), (1.0, (100, 1))]
)
def test_temperature_takes_the_root_of_every_weight(temperature: float, counts: tuple[int, int]) -> None:
    assert shares([100.0, 1.0], temperature, ["", ""]) == counts


def test_a_temperature_that_makes_a_share_vanish_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.corpora\.b\.weight=1: is 1e-10 of the rows"):
        order({"a": 10.0, "b": 1.0}, temperature=0.1)


STAGES = [
    {"until_tokens": 100 * LENGTH - 5, "weights": {"a": 0.5, "b": 0.5}},
    {"until_tokens": 250 * LENGTH, "weights": {"c": 1.0}},
    {"weights": {"b": 1, "a": 2, "c": 1}},
]


def test_every_stage_has_its_own_mixture_and_begins_it_anew() -> None:
    corpora, _ = order({"a": 1.0, "b": 1.0, "c": 1.0}, stages=STAGES).sources(0, 450)
    dealt = "".join("abc"[corpus] for corpus in corpora)
    assert dealt == "ab" * 50 + "c" * 150 + "abac" * 50


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(0, 1000))
def test_rows_of_counts_what_is_dealt(rows: int) -> None:
    staged = order({"a": 1.0, "b": 1.0, "c": 1.0, "rests": 1.0}, stages=STAGES)
    corpora, _ = staged.sources(0, rows)
    counted = np.bincount(corpora, minlength=4).tolist()
    assert staged.rows_of(rows) == dict(zip(staged.corpora, counted, strict=True))


def test_rows_of_a_long_run_are_exact() -> None:
    assert order({"a": 0.7, "b": 0.3}).rows_of(10**15) == {"a": 7 * 10**14, "b": 3 * 10**14}


@settings(max_examples=50, deadline=None)
@given(
    weights=some_weights,
    lanes=st.integers(1, 20),
    staged=st.booleans(),
    first=st.integers(0, 10**12),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
)
def test_a_row_has_the_same_source_however_rows_are_cut_into_batches(
    weights: list[float], lanes: int, staged: bool, first: int, cuts: list[int]
) -> None:
    until = (first + 20) * LENGTH
    stages = [{"until_tokens": until, "weights": named(weights)}, {"weights": {"corpus0": 1}}]
    dealt = order(named(weights), lanes, seed=1, stages=stages if staged else [])
    corpora, lane_numbers = dealt.sources(first, sum(cuts))
    start = 0
    for count in cuts:
        some_corpora, some_lanes = dealt.sources(first + start, count)
        assert np.array_equal(some_corpora, corpora[start : start + count])
        assert np.array_equal(some_lanes, lane_numbers[start : start + count])
        start += count


@pytest.mark.parametrize("lanes", [1, 3, 16])
def test_with_one_corpus_rows_go_round_the_lanes(lanes: int) -> None:
    corpora, numbers = order({"a": 1.0}, lanes).sources(5, 100)
    assert corpora.tolist() == [0] * 100
    assert numbers.tolist() == [row % lanes for row in range(5, 105)]


@pytest.mark.parametrize("lanes", [2, 4, 10, 16])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.3), (0.25, 0.75)])
def test_every_lane_meets_every_corpus(weights: tuple[float, float], lanes: int) -> None:
    corpora, numbers = order(named(list(weights)), lanes).sources(0, 100 * lanes)
    met = set(zip(corpora.tolist(), numbers.tolist(), strict=True))
    assert met == {(corpus, lane) for corpus in range(2) for lane in range(lanes)}


@pytest.mark.parametrize("corpora", [1, 2])
def test_every_lane_gives_one_row_in_a_stretch_of_as_many_rows(corpora: int) -> None:
    _, numbers = order(named([1.0] * corpora), 10).sources(0, 500)
    assert all(sorted(stripe) == list(range(10)) for stripe in numbers.reshape(50, 10).tolist())


def test_turns_are_spread_evenly_and_differ_by_seed() -> None:
    starts = [order({"a": 1.0, "b": 1.0}, 10, seed).sources(0, 100_000)[1][::10] for seed in (0, 1)]
    assert not np.array_equal(starts[0], starts[1])
    for turns in starts:
        assert np.abs(np.bincount(turns) - 1000).max() < 150  # five standard deviations


def test_the_order_of_a_seed_is_fixed_for_ever() -> None:
    corpora, lanes = order({"legal": 0.7, "general": 0.3}, lanes=4).sources(0, 8)
    assert corpora.tolist() == [1, 0, 1, 1, 0, 1, 1, 1]
    assert lanes.tolist() == [3, 0, 1, 2, 2, 3, 0, 1]


@settings(max_examples=50, deadline=None)
@given(
    weights=some_weights,
    lanes=st.integers(1, 40),
    world_size=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]),
    first=st.integers(0, 10**9),
)
def test_ranks_share_a_batch_equally_and_completely(
    weights: list[float], lanes: int, world_size: int, first: int
) -> None:
    dealt = order(named(weights), lanes, seed=2)
    parts = [dealt.rows_of_rank(first, 24, rank, world_size).tolist() for rank in range(world_size)]
    assert {len(part) for part in parts} == {24 // world_size}
    assert all(part == sorted(part) for part in parts)
    assert sorted(row for part in parts for row in part) == list(range(first, first + 24))


def lanes_by_rank(dealt: Order, batch: int, world_size: int) -> list[set[int]]:
    """The lanes that each rank has rows of in fifty batches."""
    read: list[set[int]] = [set() for _ in range(world_size)]
    for first in range(0, 50 * batch, batch):
        _, numbers = dealt.sources(first, batch)
        for rank, own in enumerate(read):
            own.update(numbers[dealt.rows_of_rank(first, batch, rank, world_size) - first].tolist())
    return read


@pytest.mark.parametrize(("lanes", "batch"), [(16, 16), (16, 48), (16, 8), (8, 64), (24, 16)])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_rank_keeps_its_lanes_where_lanes_and_batch_are_multiples_of_the_ranks(
    lanes: int, batch: int, world_size: int
) -> None:
    read = lanes_by_rank(order({"a": 0.6, "b": 0.4}, lanes), batch, world_size)
    assert sum(map(len, read)) == lanes
    assert set().union(*read) == set(range(lanes))


@pytest.mark.parametrize(
    ("lanes", "batch", "world_size"),
    [(16, 48, 24), (40, 24, 24), (16, 48, 3), (16, 96, 12), (6, 16, 4), (7, 63, 3)],
)
def test_a_rank_reads_no_more_lanes_than_the_stated_bound(lanes: int, batch: int, world_size: int) -> None:
    most = lanes // gcd(lanes, world_size)
    if batch % lanes == 0:
        most = min(most, ceil(lanes / world_size) + 1)
    read = lanes_by_rank(order({"a": 0.6, "b": 0.4}, lanes), batch, world_size)
    assert max(map(len, read)) <= most


def test_a_million_rows_are_dealt_in_less_than_fifty_milliseconds_and_a_batch_in_less_than_one() -> None:
    ten = named([0.23, 0.17, 0.13, 0.11, 0.1, 0.08, 0.07, 0.05, 0.04, 0.02])
    began = time.perf_counter()
    dealt = order(ten, 512, temperature=3.3)
    seconds = {"made": time.perf_counter() - began}
    for count in (4096, 10**6):
        took = []
        for step in range(10):
            began = time.perf_counter()
            dealt.sources(step * count, count)
            if count == 4096:
                dealt.rows_of_rank(step * count, count, 3, 64)
            took.append(time.perf_counter() - began)
        seconds[str(count)] = min(took)
    assert seconds["made"] < 0.2
    assert seconds["4096"] < 0.001
    assert seconds["1000000"] < 0.05
