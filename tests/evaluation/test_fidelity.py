"""KL divergence and agreement: from their definitions, hand-made logits, percentiles, batches, special values."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from microscale.errors import ShapeError, TextError
from microscale.evaluation.fidelity import divergence, fidelity
from microscale.evaluation.perplexity import perplexity
from microscale.families.batch import Batch

INF, NAN = math.inf, math.nan


def table_model(table: Tensor) -> Callable[[Batch], Tensor]:
    """A model whose logits depend on the last token alone: a row of a table."""
    return lambda batch: table[batch.token_ids]


def test_a_divergence_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): KL = 1/2 ln 2 - 1/4 ln 2."""
    p = torch.tensor([0.5, 0.25, 0.25]).log()
    q = torch.tensor([0.25, 0.5, 0.25]).log()
    assert float(divergence(p, q)) == pytest.approx(0.25 * math.log(2), rel=1e-6)
    assert divergence(p + 3.0, q - 11.0).item() == pytest.approx(0.25 * math.log(2), rel=1e-5)  # softmax takes no shift


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**31))
def test_divergence_against_numpy(rows: int, vocabulary: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one = 4 * torch.randn(rows, vocabulary, generator=generator)
    other = one + torch.randn(rows, vocabulary, generator=generator)

    def softmax(values: Tensor) -> np.ndarray:
        exponentials = np.exp(values.double().numpy())
        return exponentials / exponentials.sum(-1, keepdims=True)

    p, q = softmax(one), softmax(other)
    expected = (p * np.log(p / q)).sum(-1)
    found = divergence(one, other)
    assert found.dtype == torch.float64 and found.shape == (rows,)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12, rtol=1e-9)
    assert float(found.min()) >= 0.0
    assert float(divergence(one, one).abs().max()) == 0.0


def test_pieces_do_not_change_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = torch.randn(3, 7, 5), torch.randn(3, 7, 5)
    whole = divergence(one, other)
    monkeypatch.setattr(sys.modules[divergence.__module__], "_PIECE_VALUES", 11)
    assert whole.shape == (3, 7)
    torch.testing.assert_close(divergence(one, other), whole, rtol=1e-12, atol=1e-14)
    assert divergence(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0,)


@pytest.mark.parametrize(
    ("reference", "model", "expected"),
    [
        ([0.0, 0.0, -INF], [0.0, 0.0, -INF], 0.0),
        ([0.0, 0.0, -INF], [0.0, 0.0, 0.0], math.log(1.5)),
        ([0.0, 0.0, 0.0], [0.0, 0.0, -INF], INF),
        ([0.0, NAN, 0.0], [0.0, 0.0, 0.0], NAN),
        ([0.0, 0.0, 0.0], [0.0, NAN, 0.0], NAN),
        ([0.0, INF, 0.0], [0.0, 0.0, 0.0], NAN),
    ],
)
def test_special_values(reference: list[float], model: list[float], expected: float) -> None:
    found = float(divergence(torch.tensor(reference), torch.tensor(model)))
    assert found == pytest.approx(expected, nan_ok=True)


def test_both_perplexities_agreement_and_percentile() -> None:
    generator = torch.Generator().manual_seed(3)
    table = 2 * torch.randn(50, 50, generator=generator)
    moved = table + torch.randn(50, 50, generator=generator)
    windows = [torch.randint(0, 50, (length,), generator=generator) for length in (9, 9, 9, 4)]
    found = fidelity(table_model(moved), table_model(table), windows, batch=2)
    givens = torch.cat([window[:-1] for window in windows])
    rows = divergence(table[givens], moved[givens]).numpy()
    assert found.kl_mean == pytest.approx(rows.mean(), rel=1e-12)
    assert found.kl_max == rows.max()
    assert found.kl_p99 == sorted(rows)[math.ceil(0.99 * len(rows)) - 1]
    equal = (table[givens].argmax(-1) == moved[givens].argmax(-1)).sum()
    assert found.agreement == int(equal) / len(rows) and 0 < found.agreement < 1
    assert found.perplexity == perplexity(table_model(moved), windows, batch=2).perplexity
    assert found.reference_perplexity == perplexity(table_model(table), windows, batch=2).perplexity
    assert (found.tokens, found.windows) == (8 * 3 + 3, 4)
    again = fidelity(table_model(moved), table_model(table), windows, batch=1)
    assert again.kl_mean == pytest.approx(found.kl_mean, rel=1e-12) and again.kl_p99 == found.kl_p99


def test_a_model_beside_itself() -> None:
    table = torch.randn(20, 20)
    found = fidelity(table_model(table), table_model(table), [torch.arange(20)])
    assert (found.kl_mean, found.kl_p99, found.kl_max, found.agreement) == (0.0, 0.0, 0.0, 1.0)
    assert found.perplexity == found.reference_perplexity


def test_a_broken_model_is_a_number_that_is_none() -> None:
    table = torch.randn(20, 20)
    broken = table.clone()
    broken[7] = NAN
    found = fidelity(table_model(broken), table_model(table), [torch.arange(20)])
    assert math.isnan(found.kl_mean) and math.isnan(found.kl_p99) and math.isnan(found.perplexity)
    assert math.isfinite(found.reference_perplexity)


def test_progress_and_wrong_requests() -> None:
    table = torch.randn(20, 20)
    seen: list[tuple[int, int]] = []
    windows = [torch.arange(5)] * 3
    fidelity(table_model(table), table_model(table), windows, batch=2, progress=lambda *step: seen.append(step))
    assert seen == [(2, 3), (3, 3)]
    with pytest.raises(TextError, match="no window"):
        fidelity(table_model(table), table_model(table), [])
    with pytest.raises(ShapeError, match="one vocabulary"):
        fidelity(table_model(table), table_model(table[:, :19]), windows)
