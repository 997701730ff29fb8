"""The loss of a row: a sum over the tokens that are to be predicted, and over no others."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.objective import IGNORED, causal, loss_sum, target_tokens


def test_every_token_is_predicted_from_those_before_it() -> None:
    rows = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    inputs, targets, positions = causal(rows)
    assert inputs.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert targets.tolist() == [[2, 3, 4], [6, 7, 8]]
    assert positions is None


def test_padding_is_a_token_that_is_no_target() -> None:
    inputs, targets, _ = causal(torch.tensor([[1, 2, IGNORED, IGNORED]]))
    assert inputs.tolist() == [[1, 2, 0]]
    assert targets.tolist() == [[2, IGNORED, IGNORED]]


END = 9


def test_masked_documents_count_from_zero_and_do_not_predict_the_next_document() -> None:
    rows = torch.tensor(
        [[1, 2, END, 3, 4, 5, END, 6], [END, END, 7, 8, 1, 2, 3, END], [1, END, *[IGNORED] * 6]]
    )
    inputs, targets, positions = causal(rows, END)
    assert inputs.tolist() == [[1, 2, END, 3, 4, 5, END], [END, END, 7, 8, 1, 2, 3], [1, END, *[0] * 5]]
    assert positions is not None
    assert positions.tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 0, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4]]
    none = IGNORED
    assert targets.tolist() == [
        [2, END, none, 4, 5, END, none],
        [none, none, 8, 1, 2, 3, END],
        [END, *[none] * 6],
    ]


@given(
    st.lists(st.lists(st.sampled_from([END, 1, 2, IGNORED]), min_size=9, max_size=9), min_size=1, max_size=4)
)
def test_the_host_counts_the_targets_that_the_device_computes(tokens: list[list[int]]) -> None:
    rows = np.array(tokens, dtype=np.int32)
    for end_of_document in (None, END):
        _, targets, _ = causal(torch.from_numpy(rows).long(), end_of_document)
        assert target_tokens(rows, end_of_document) == int((targets != IGNORED).sum())


def test_the_loss_is_the_sum_of_negative_log_probabilities() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0]]])  # p = (1/4, 3/4) and (1/2, 1/2)
    loss = loss_sum(logits, torch.tensor([[1, 0]]))
    assert loss.item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 2))


def test_ignored_targets_add_neither_loss_nor_gradient() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([[1, IGNORED, 2], [IGNORED, IGNORED, 4]])
    loss = loss_sum(logits, targets)
    loss.backward()
    log_p = logits.detach().log_softmax(-1)
    assert loss.item() == pytest.approx(-(log_p[0, 0, 1] + log_p[0, 2, 2] + log_p[1, 2, 4]).item())
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(-1) > 0, targets != IGNORED)


def test_rows_without_any_target_have_loss_zero() -> None:
    assert loss_sum(torch.randn(2, 3, 5), torch.full((2, 3), IGNORED)).item() == 0


def test_target_tokens_are_all_of_a_row_but_the_first_and_the_ignored() -> None:
    rows = np.array([[7, 1, 2, IGNORED], [7, IGNORED, IGNORED, IGNORED], [1, 2, 3, 4]], dtype=np.int32)
    assert target_tokens(rows) == 5


def test_the_sum_does_not_depend_on_how_rows_are_split() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 16, 50, generator=generator)
    targets = torch.randint(50, (8, 16), generator=generator)
    parts = sum(loss_sum(logits[rows], targets[rows]).item() for rows in (slice(0, 3), slice(3, 8)))
    assert parts == pytest.approx(loss_sum(logits, targets).item(), rel=1e-6)


def test_low_precision_logits_are_summed_in_fp32() -> None:
    logits = torch.zeros(4, 1024, 8, dtype=torch.bfloat16)
    loss = loss_sum(logits, torch.zeros(4, 1024, dtype=torch.long))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(4096 * math.log(8), rel=1e-5)


def test_bf16_losses_round_each_token_but_not_their_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 128, 50, generator=generator).bfloat16()
    targets = torch.randint(50, (64, 128), generator=generator)
    rounded, exact = loss_sum(logits, targets, upcast=False), loss_sum(logits, targets)
    assert rounded.dtype == torch.float32
    assert rounded.item() != exact.item()
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-4)
