"""What candidates make of one layer, and the classes of tensors, by hand and against the definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from microscale.kernels import fake_quantize
from microscale.planning.candidates import parse_candidates
from microscale.planning.layer_facts import (
    CLASS_ROWS,
    LayerAnalysis,
    Side,
    TensorClasses,
    candidate_errors,
    gradient_qsnr,
)
from microscale.planning.recommendation import recommend
from microscale.planning.tensor_facts import weight_facts

CANDIDATES = parse_candidates("mxfp4,mxfp8/none,mxfp4/mxfp8,none")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decibels(values: Tensor, rounded: Tensor) -> float:
    exact, error = values.double(), rounded.double() - values.double()
    return 10 * math.log10(float(exact.square().sum() / error.square().sum()))


def test_errors_are_those_of_the_definitions() -> None:
    weight, inputs = normal(16, 64), normal(24, 64, seed=1)
    found = candidate_errors(weight, inputs, CANDIDATES)
    assert list(found) == ["mxfp4", "mxfp8/none", "mxfp4/mxfp8", "none"]
    wanted = inputs.double() @ weight.double().T
    for text, of_weight, of_inputs in (
        ("mxfp4", "mxfp4", "mxfp4"),
        ("mxfp8/none", "mxfp8", None),
        ("mxfp4/mxfp8", "mxfp4", "mxfp8"),
    ):
        rounded = fake_quantize(weight, of_weight)
        seen = inputs if of_inputs is None else fake_quantize(inputs, of_inputs)
        error = (seen.double() @ rounded.double().T - wanted).square().sum() / wanted.square().sum()
        assert found[text].weight_qsnr_db == pytest.approx(decibels(weight, rounded), abs=1e-4)
        assert found[text].output_error == pytest.approx(float(error), rel=1e-3)
        if of_inputs is None:
            assert found[text].input_qsnr_db is None
        else:
            assert found[text].input_qsnr_db == pytest.approx(decibels(inputs, seen), abs=1e-4)
    kept = found["none"]
    assert (kept.weight_qsnr_db, kept.input_qsnr_db, kept.output_error) == (math.inf, None, 0.0)


@pytest.mark.parametrize("inputs", [None, torch.zeros(0, 64)])
def test_a_layer_without_inputs_has_no_error_of_outputs(inputs: Tensor | None) -> None:
    for error in candidate_errors(normal(4, 64), inputs, CANDIDATES).values():
        assert error.input_qsnr_db is None and error.output_error is None and error.weight_qsnr_db > 15


def test_outputs_of_zero_have_no_error() -> None:
    found = candidate_errors(torch.zeros(4, 32), normal(3, 32), CANDIDATES[:1])["mxfp4"]
    assert (found.weight_qsnr_db, found.output_error) == (0.0, 0.0)


def test_exact_numbers_lose_nothing() -> None:
    """One token of one channel: 6 and -6 are in the grid of E2M1."""
    found = candidate_errors(torch.tensor([[6.0], [-6.0]]), torch.tensor([[1.5]]), CANDIDATES[:1])["mxfp4"]
    assert (found.weight_qsnr_db, found.input_qsnr_db, found.output_error) == (math.inf, math.inf, 0.0)


def test_gradients_are_rounded_as_inputs_are() -> None:
    gradients = normal(8, 64)
    found = gradient_qsnr(gradients, CANDIDATES)
    assert list(found) == ["mxfp4", "mxfp4/mxfp8"]  # none for those that leave inputs alone
    assert found["mxfp4"] == pytest.approx(decibels(gradients, fake_quantize(gradients, "mxfp4")), abs=1e-4)
    assert found["mxfp4/mxfp8"] == pytest.approx(decibels(gradients, fake_quantize(gradients, "mxfp8")), abs=1e-4)


def test_only_sides_that_were_measured_are_told() -> None:
    one, other = weight_facts(normal(4, 32), "w"), weight_facts(normal(4, 32, seed=1), "g")
    layer = LayerAnalysis(name="l", role="r", shape=(4, 32), weight=one, inputs=None, errors={}, weight_gradients=other)
    assert layer.tensors() == {Side.WEIGHTS: one, Side.WEIGHT_GRADIENTS: other}


def test_classes_take_a_few_rows_of_each_tensor() -> None:
    """Rows 0, 4, 8 … of 50, twelve at most; what comes later does not change what was taken."""
    rows = torch.arange(50.0)[:, None].repeat(1, 32) + 1
    classes = TensorClasses()
    classes.add("mlp.up", Side.INPUTS, rows, weight_facts(rows, "a"))
    expected = recommend(
        [rows[0:48:4].clone()],
        role="mlp.up",
        side="inputs",
        crest=1.0,
        kurtosis=weight_facts(rows, "a").kurtosis,
        outliers=0,
    )
    rows.zero_()
    found = classes.recommendation("mlp.up", Side.INPUTS, 20.0)
    assert CLASS_ROWS == 12 and found == expected


def test_classes_of_zeros_and_of_two_widths() -> None:
    classes, narrow, wide = TensorClasses(), normal(3, 32), normal(5, 64, seed=1)
    zeros = torch.zeros(2, 32)
    classes.add("z", Side.WEIGHTS, zeros, weight_facts(zeros, "z"))
    for rows in (narrow, wide):
        classes.add("r", Side.WEIGHTS, rows, weight_facts(rows, "w"))
    assert classes.names() == [("z", Side.WEIGHTS), ("r", Side.WEIGHTS)]
    assert classes.recommendation("z", Side.WEIGHTS, 20.0) is None
    facts = [weight_facts(rows, "w") for rows in (narrow, wide)]
    assert classes.recommendation("r", Side.WEIGHTS, 20.0) == recommend(
        [wide],
        role="r",
        side="weights",
        crest=sum(one.crest_mean for one in facts) / 2,
        kurtosis=sum(one.kurtosis for one in facts) / 2,
        outliers=0,
    )
    shares = classes.histogram("r", Side.WEIGHTS).shares
    assert shares == pytest.approx([(a + b) / 2 for a, b in zip(*(one.histogram for one in facts), strict=True)])
