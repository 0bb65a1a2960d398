"""The error that searches minimize: by hand, and what it makes of special values."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from method_problems import COLS, group_problem, input_rows, layer_problem, random
from microscale.algorithms.contract import FoldStep, GroupProblem
from microscale.algorithms.objective import group_error, rounded_inputs
from microscale.algorithms.pipeline import parse_method
from microscale.formats import parse_activation
from microscale.kernels import fake_quantize
from microscale.transforms import scale_transform


def by_hand(inputs: Tensor, activations: str | None = None, count: int = 1) -> GroupProblem:
    """Return layers of one row, (6, 0.7, 0, ...): the block scale of MXFP4 is 1, and 0.7 becomes 0.5."""
    weight = torch.zeros(1, 32)
    weight[0, :2] = torch.tensor([6.0, 0.7])
    rows = torch.nn.functional.pad(inputs, (0, 32 - inputs.shape[1]))
    layers = [layer_problem("mxfp4", activations, rows=1, cols=32, inputs=rows, name=f"{i}") for i in range(count)]
    return group_problem(*(dataclasses.replace(layer, weight=weight) for layer in layers))


def scaled(*factors: float) -> Tensor:
    return torch.tensor([*factors, *[1.0] * (32 - len(factors))])


@pytest.mark.parametrize(
    ("scale", "error"),
    [
        (scaled(), 4.0),  # 10 (0.7 - 0.5), squared
        (scaled(1.0, 2.0), 0.25),  # 5 (1.4 - 1.5), squared
        (scaled(1.0, 5.0), 1.0),  # 2 (3.5 - 4), squared: the middle goes to the even code
        (scaled(2.0, 2.0), 4.0),  # a power of two for all changes nothing
    ],
)
def test_one_token_by_hand(scale: Tensor, error: float) -> None:
    tokens = torch.tensor([[1.0, 10.0]])
    assert group_error(by_hand(tokens), scale) == pytest.approx(error, rel=1e-5)
    assert group_error(by_hand(tokens.repeat(3, 1)), scale) == pytest.approx(3 * error, rel=1e-5)
    assert group_error(by_hand(tokens, count=2), scale) == pytest.approx(2 * error, rel=1e-5), "all layers count"


def test_inputs_are_rounded_too() -> None:
    """(0, 0.7) as MXFP8 is (0, 0.6875), as MXFP4 (0, 0.75); times 0.5 against 0.7 times 0.7."""
    for activations, value in (("mxfp8", 0.6875), ("mxfp4", 0.75)):
        found = group_error(by_hand(torch.tensor([[0.0, 0.7]]), activations), scaled())
        assert found == pytest.approx((value * 0.5 - 0.49) ** 2, rel=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_infinitely_bad(bad: float) -> None:
    group = by_hand(torch.tensor([[1.0, 10.0]]))
    assert group.inputs is not None and group.inputs.sample is not None
    broken = dataclasses.replace(group.inputs, sample=group.inputs.sample * bad)
    assert group_error(dataclasses.replace(group, inputs=broken), scaled()) == float("inf")


def test_no_token_makes_no_error() -> None:
    assert group_error(by_hand(torch.zeros(0, 2)), scaled()) == 0.0


def test_a_transform_that_is_there_counts() -> None:
    """The same numbers, once as a scale that is asked about, once as a transform of the layers."""
    group = by_hand(torch.tensor([[1.0, 10.0]]))
    turned = [layer.with_transforms([scale_transform(1 / scaled(1.0, 2.0))]) for layer in group.layers]
    found = group_error(dataclasses.replace(group, layers=tuple(turned)), scaled())
    assert found == pytest.approx(0.25, rel=1e-5)


def test_inputs_as_a_layer_sees_them() -> None:
    values = random(3, 32)
    assert rounded_inputs(values, None) is values
    for spec in ("mxfp4", "nvfp4@static"):
        activations = parse_activation(spec)
        assert torch.equal(rounded_inputs(values, activations), fake_quantize(values, activations.format))


@pytest.mark.parametrize("method", ["awq", "smoothquant:search=true"])
def test_searches_judge_the_scale_that_will_be_folded(method: str) -> None:
    """Heads that share a value share its scale: the best of what can be folded is found, not shared afterwards."""

    def share(scale: Tensor) -> Tensor:
        return scale.reshape(2, -1).log().mean(0).exp().repeat(2)

    step = parse_method(method).steps[0]
    assert isinstance(step, FoldStep)
    group = dataclasses.replace(
        group_problem(layer_problem(inputs=input_rows() * torch.linspace(1, 30, COLS))), share=share
    )
    found = step.input_scale(group)
    torch.testing.assert_close(found, share(found))
    alone = step.input_scale(dataclasses.replace(group, share=lambda scale: scale))
    assert group_error(group, found) <= group_error(group, share(alone))
    if method == "awq":
        assert group_error(group, found) <= group_error(group, torch.ones(COLS))
