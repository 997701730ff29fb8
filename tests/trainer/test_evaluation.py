"""Held-out perplexity: every token but the first is predicted once, however many ranks share the work."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support import VOCABULARY, Site, sentences

from configs.compose import compose
from trainer import objective
from trainer.data.tokenizer import DocumentTokenizer
from trainer.distributed import World
from trainer.evaluation import Rows, _shares, perplexities, validation_rows


def rows_of(texts: list[str], tokenizer: DocumentTokenizer, length: int = 16, most: int = 100_000) -> Rows:
    return validation_rows(texts, tokenizer, length, most)


def tokens_of(texts: list[str], tokenizer: DocumentTokenizer) -> list[int]:
    ids: list[int] = tokenizer.encode(texts).ids.tolist()
    return ids


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 90), length=st.integers(1, 300))
def test_every_token_but_the_first_is_a_target_once_and_in_order(
    tokenizer: DocumentTokenizer, count: int, length: int
) -> None:
    texts = sentences(count)
    rows = rows_of(texts, tokenizer, length)
    tokens = tokens_of(texts, tokenizer)
    targets = rows[:, 1:].ravel()
    assert targets[targets != objective.IGNORED].tolist() == tokens[1:]
    assert len(rows) == math.ceil((len(tokens) - 1) / length)
    inputs = rows[:, :-1].ravel()[: len(tokens) - 1]
    assert inputs.tolist() == tokens[:-1]


def test_only_the_end_of_the_last_row_is_filled_up(tokenizer: DocumentTokenizer) -> None:
    rows = rows_of(sentences(20), tokenizer)
    ignored = (rows == objective.IGNORED).ravel()
    assert 0 < ignored.sum() < 17
    assert ignored[-ignored.sum() :].all()


def test_a_corpus_shorter_than_a_row_is_one_row(tokenizer: DocumentTokenizer) -> None:
    rows = rows_of(["short"], tokenizer, length=64)
    tokens = tokens_of(["short"], tokenizer)
    assert rows.tolist() == [tokens + [objective.IGNORED] * (65 - len(tokens))]


def test_no_more_rows_than_asked_for_are_read(tokenizer: DocumentTokenizer) -> None:
    texts = sentences(300)
    rows = rows_of(texts, tokenizer, most=3)
    assert rows.shape == (3, 17)
    assert rows[:, 1:].ravel().tolist() == tokens_of(texts, tokenizer)[1 : 3 * 16 + 1]


def test_a_corpus_without_text_has_no_rows(tokenizer: DocumentTokenizer) -> None:
    assert rows_of(["", ""], tokenizer).shape == (0, 17)


def world_of(rank: int, size: int) -> World:
    return World(rank, size, torch.device("cpu"), dist.group.WORLD)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 40), micro_batch=st.integers(1, 5), size=st.integers(1, 9))
def test_ranks_share_rows_once_in_equally_many_forward_passes(
    count: int, micro_batch: int, size: int
) -> None:
    rows = np.arange(count * 3, dtype=np.int32).reshape(count, 3)
    shares = [list(_shares(rows, micro_batch, world_of(rank, size))) for rank in range(size)]
    assert {tuple(chunk.shape for chunk in share) for share in shares} == {
        ((micro_batch, 3),) * math.ceil(count / (micro_batch * size))
    }
    dealt = np.concatenate([chunk for share in shares for chunk in share])
    dealt = dealt[dealt[:, 0] != objective.IGNORED]
    assert np.array_equal(dealt[np.argsort(dealt[:, 0])], rows)


def bigram_logits(inputs: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """A fixed model, [rows, T] -> [rows, T, vocabulary]."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    return table[inputs]


def test_the_loss_does_not_depend_on_world_size_or_micro_batch(tokenizer: DocumentTokenizer) -> None:
    rows = rows_of(sentences(30), tokenizer)
    means = []
    for size, micro_batch in ((1, 1), (1, 4), (2, 3), (4, 2), (7, 5), (64, 2)):
        loss, count = torch.zeros((), dtype=torch.float64), 0
        for rank in range(size):
            for chunk in _shares(rows, micro_batch, world_of(rank, size)):
                tensor = torch.from_numpy(chunk).long()
                logits = bigram_logits(tensor[:, :-1].clamp(min=0))
                loss += objective.loss_sum(logits, tensor[:, 1:]).double()
                count += objective.target_tokens(chunk)
        means.append(float(loss) / count)
    assert means == pytest.approx([means[0]] * len(means), rel=1e-6)


@pytest.fixture
def world() -> Iterator[World]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"), dist.new_group(backend="gloo"))
    dist.destroy_process_group()


def test_perplexity_is_that_of_predicting_each_next_token(
    site: Site, tokenizer: DocumentTokenizer, world: World
) -> None:
    texts = sentences(30)
    rows = rows_of(texts, tokenizer)
    results = perplexities(bigram_logits, {"legal": rows}, compose(site.overrides()), world)
    tokens = torch.tensor(tokens_of(texts, tokenizer))
    log_p = bigram_logits(tokens[:-1]).double().log_softmax(-1)
    expected = -log_p[torch.arange(len(tokens) - 1), tokens[1:]].mean().item()
    assert results == {
        "eval/legal/loss": pytest.approx(expected, rel=1e-6),
        "eval/legal/perplexity": pytest.approx(math.exp(expected), rel=1e-5),
    }


def test_a_hopeless_loss_is_still_a_finite_perplexity(
    site: Site, tokenizer: DocumentTokenizer, world: World
) -> None:
    rows = rows_of(sentences(3), tokenizer)
    config = compose(site.overrides())
    results = perplexities(lambda inputs, _: 1e4 * bigram_logits(inputs), {"x": rows}, config, world)
    assert results["eval/x/loss"] > 700
    assert math.isfinite(results["eval/x/perplexity"])
