"""Which corpus and lane a row comes from is arithmetic: exact proportions, no state, the same everywhere."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import Mixture, Order

weight = st.one_of(st.integers(1, 100).map(float), st.floats(1e-3, 1e3))
some_weights = st.sampled_from([1, 2, 3, 5]).flatmap(lambda n: st.lists(weight, min_size=n, max_size=n))


def named(weights: list[float]) -> dict[str, float]:
    return {f"corpus{number}": weight for number, weight in enumerate(weights)}


@settings(max_examples=200, deadline=None)
@given(weights=some_weights, first=st.integers(0, 10**13), count=st.integers(1, 2000))
def test_any_stretch_of_rows_keeps_the_proportions(weights: list[float], first: int, count: int) -> None:
    mixture = Mixture(named(weights))
    shares = np.array(sorted(weights, reverse=True)) / sum(weights)
    dealt = np.bincount(mixture.corpus(first, count), minlength=len(weights))
    bounds = np.arange(1, len(weights) + 1)
    assert np.all(np.abs(dealt - count * shares) <= bounds + 1e-6)


@pytest.mark.parametrize(
    ("weights", "corpora"),
    [
        ([1.0], "aaaa"),
        ([0.5, 0.5], "bababa"),
        ([0.25, 0.75], "abbb"[::-1]),
    ],
)
def test_small_mixtures_are_what_one_expects(weights: list[float], corpora: str) -> None:
    mixture = Mixture(dict(zip("ab", weights, strict=False)))
    dealt = [mixture.corpora[corpus] for corpus in mixture.corpus(0, 1000)]
    pattern = "".join(dealt[: len(corpora)])
    assert sorted(pattern) == sorted(corpora)
    assert "".join(dealt[: 100 * len(corpora)]) == pattern * 100


def test_weights_are_relative() -> None:
    small, large = Mixture({"a": 0.3, "b": 0.7}), Mixture({"a": 3, "b": 7})
    assert np.array_equal(small.corpus(5, 500), large.corpus(5, 500))


def test_the_order_of_corpora_in_the_configuration_does_not_matter() -> None:
    one, other = Mixture({"a": 0.5, "b": 0.2, "c": 0.3}), Mixture({"c": 0.3, "b": 0.2, "a": 0.5})
    assert one.corpora == other.corpora
    assert np.array_equal(one.corpus(0, 500), other.corpus(0, 500))


@settings(max_examples=50, deadline=None)
@given(
    weights=some_weights,
    lanes=st.integers(1, 20),
    first=st.integers(0, 10**12),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
)
def test_a_row_has_the_same_source_however_rows_are_cut_into_batches(
    weights: list[float], lanes: int, first: int, cuts: list[int]
) -> None:
    order = Order(named(weights), lanes, seed=1)
    corpora, lane_numbers = order.sources(first, sum(cuts))
    start = 0
    for count in cuts:
        some_corpora, some_lanes = order.sources(first + start, count)
        assert np.array_equal(some_corpora, corpora[start : start + count])
        assert np.array_equal(some_lanes, lane_numbers[start : start + count])
        start += count


@pytest.mark.parametrize("lanes", [1, 3, 16])
def test_with_one_corpus_rows_go_round_the_lanes(lanes: int) -> None:
    corpora, numbers = Order({"a": 1.0}, lanes, seed=0).sources(5, 100)
    assert corpora.tolist() == [0] * 100
    assert numbers.tolist() == [row % lanes for row in range(5, 105)]


@pytest.mark.parametrize("lanes", [2, 4, 10, 16])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.3), (0.25, 0.75)])
def test_every_lane_meets_every_corpus(weights: tuple[float, float], lanes: int) -> None:
    corpora, numbers = Order(named(list(weights)), lanes, seed=0).sources(0, 100 * lanes)
    met = set(zip(corpora.tolist(), numbers.tolist(), strict=True))
    assert met == {(corpus, lane) for corpus in range(2) for lane in range(lanes)}


@pytest.mark.parametrize("corpora", [1, 2])
def test_every_lane_gives_one_row_in_a_stretch_of_as_many_rows(corpora: int) -> None:
    _, numbers = Order(named([1.0] * corpora), 10, seed=0).sources(0, 500)
    assert all(sorted(stripe) == list(range(10)) for stripe in numbers.reshape(50, 10).tolist())


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
    order = Order(named(weights), lanes, seed=2)
    shares = [order.rows_of_rank(first, 24, rank, world_size).tolist() for rank in range(world_size)]
    assert {len(share) for share in shares} == {24 // world_size}
    assert all(share == sorted(share) for share in shares)
    assert sorted(row for share in shares for row in share) == list(range(first, first + 24))


@pytest.mark.parametrize(("lanes", "batch"), [(16, 16), (16, 48), (16, 8), (8, 64), (24, 16)])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_rank_keeps_its_lanes_where_lanes_and_batch_are_multiples_of_the_ranks(
    lanes: int, batch: int, world_size: int
) -> None:
    order = Order({"a": 0.6, "b": 0.4}, lanes, seed=0)
    owners: dict[int, set[int]] = {}
    for first in range(0, 50 * batch, batch):
        _, numbers = order.sources(first, batch)
        for rank in range(world_size):
            for row in order.rows_of_rank(first, batch, rank, world_size):
                owners.setdefault(int(numbers[row - first]), set()).add(rank)
    assert len(owners) == lanes
    assert {len(ranks) for ranks in owners.values()} == {1}


def test_a_large_batch_is_dealt_in_less_than_five_milliseconds() -> None:
    order = Order(named([0.23, 0.17, 0.13, 0.11, 0.1, 0.08, 0.07, 0.05, 0.04, 0.02]), 512, seed=0)
    seconds = []
    for step in range(10):
        began = time.perf_counter()
        order.rows_of_rank(step * 4096, 4096, 3, 64)
        order.sources(step * 4096, 4096)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.005
