"""Rounding that passes gradients: values as the kernels round them, gradients by hand, and the stand-in of a layer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from method_problems import layer_problem, random
from microscale.algorithms.straight_through import (
    StandIn,
    clipped_rounding,
    rounded_straight_through,
    straight_through_inputs,
    tuned_rounding,
)
from microscale.formats import parse_activation, parse_format
from microscale.kernels import fake_quantize
from microscale.transforms import hadamard_transform
from small_models import same_bits

FMT = parse_format("mxfp4")


def row(*values: float) -> Tensor:
    """Return a row of one block: the values, a 6 that makes its scale 1, and zeros."""
    return torch.tensor([[*values, 6.0, *[0.0] * (31 - len(values))]])


def test_a_clipped_rounding_passes_gradients() -> None:
    weight = random(4, 64).requires_grad_()
    limit = torch.full((4, 64), 1.2, requires_grad=True)
    fmt = parse_format("mxfp4")
    rounded = clipped_rounding(weight, limit, fmt)
    assert torch.equal(rounded, fake_quantize(weight.detach().clamp(-1.2, 1.2), fmt))
    rounded.sum().backward()
    is_inside = weight.detach().abs() <= 1.2
    assert weight.grad is not None and limit.grad is not None
    assert torch.equal(weight.grad, is_inside.to(torch.float32))
    change = torch.where(is_inside, rounded - weight, rounded).detach() / 1.2
    torch.testing.assert_close(limit.grad, change)
    assert float((limit.grad * rounded.detach().sign())[~is_inside].min()) > 0, "a wider clip lets outliers grow"


@pytest.mark.parametrize("values", [row(0.7, -1.2, 0.0), torch.zeros(2, 32), row(torch.nan)])
def test_a_gradient_passes_as_if_nothing_was_rounded(values: Tensor) -> None:
    leaf = values.clone().requires_grad_()
    rounded = rounded_straight_through(leaf, FMT)
    assert same_bits(rounded.detach(), fake_quantize(values, FMT))
    slopes = torch.arange(float(values.numel())).reshape(values.shape)
    (rounded * slopes).nan_to_num().sum().backward()
    finite = torch.where(torch.isfinite(rounded.detach()), slopes, 0.0)
    assert leaf.grad is not None and torch.equal(leaf.grad, finite)


def test_values_by_hand() -> None:
    """Steps of a half up to 2, of one up to 4; the middle of two goes to the even code."""
    assert rounded_straight_through(row(0.7, 0.75, 0.25, -1.2, 2.5), FMT)[0, :6].tolist() == [
        0.5,
        1.0,
        0.0,
        -1.0,
        2.0,
        6.0,
    ]


def test_inputs_that_are_not_rounded_stay() -> None:
    values = random(2, 32)
    assert straight_through_inputs(values, None) is values
    static = parse_activation("nvfp4@static")
    found = straight_through_inputs(values, static)
    assert torch.equal(found, fake_quantize(values, static.format)), "the range is that of the numbers at hand"


def test_the_gradient_of_an_offset_is_the_gap() -> None:
    weight = row(0.7, 2.2, 4.5, -2.2)
    limit, offset = torch.full_like(weight, 6.0), torch.zeros_like(weight).requires_grad_()
    rounded = tuned_rounding(weight, limit, offset, FMT)
    assert rounded[0, :4].tolist() == [0.5, 2.0, 4.0, -2.0]
    rounded.sum().backward()
    assert offset.grad is not None and offset.grad[0, :4].tolist() == [0.5, 1.0, 2.0, 1.0]


@pytest.mark.parametrize(("shift", "found"), [(0.0, 0.5), (0.05, 0.5), (0.2, 1.0), (-0.5, 0.5), (-1.0, 0.0)])
def test_an_offset_moves_a_number_in_gaps(shift: float, found: float) -> None:
    """0.7 lies between 0.5 and 1, a gap of a half: 0.7 + 0.5 shift is rounded."""
    weight = row(0.7)
    moved = tuned_rounding(weight, torch.full_like(weight, 6.0), torch.full_like(weight, shift) * (weight < 6), FMT)
    assert moved[0, 0].item() == found


def test_the_gradient_of_a_clip_under_an_offset() -> None:
    """Inside it is (q - w) / c, past it q / c."""
    weight = row(0.7, 2.2)
    limit = torch.full_like(weight, 4.0).requires_grad_()
    rounded = tuned_rounding(weight, limit, torch.zeros_like(weight), FMT)
    rounded.sum().backward()
    assert limit.grad is not None
    expected = [(rounded[0, i].item() - weight[0, i].item()) / 4 for i in range(2)]
    assert limit.grad[0, :2].tolist() == pytest.approx(expected) and expected[0] != 0
    assert limit.grad[0, 2].item() == pytest.approx(rounded[0, 2].item() / 4), "the 6 lies past its clip of 4"


@pytest.mark.parametrize("activations", [None, "mxfp8"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_stand_in_computes_what_the_layer_would(activations: str | None, has_bias: bool) -> None:
    layer = layer_problem("mxfp4", activations)
    bias = random(48, seed=5) if has_bias else None
    x = random(3, 64, seed=6)
    found = StandIn(layer=layer, bias=bias, operands=lambda inputs: (inputs, layer.weight))(x)
    rounded = x if activations is None else fake_quantize(x, "mxfp8")
    assert torch.equal(found, functional.linear(rounded, fake_quantize(layer.weight, "mxfp4"), bias))


def test_a_stand_in_starts_behind_the_transforms_that_are_there() -> None:
    layer = layer_problem("mxfp4", None).with_transforms([hadamard_transform(64, 16)])
    x = random(3, 64, seed=6)
    found = StandIn(layer=layer, bias=None, operands=lambda inputs: (inputs, layer.target))(x)
    exact = functional.linear(x, layer.weight)
    assert float((found - exact).square().mean() / exact.square().mean()) < 0.03, "two transforms would leave nothing"


def test_what_becomes_of_the_product_comes_before_the_bias() -> None:
    layer, bias, x = layer_problem("mxfp4", None), random(48, seed=5), random(3, 64, seed=6)
    plain = StandIn(layer=layer, bias=None, operands=lambda inputs: (inputs, layer.weight))
    doubled = dataclasses.replace(plain, outputs=lambda products: products * 2)
    assert torch.equal(doubled(x), plain(x) * 2)
    assert torch.equal(dataclasses.replace(doubled, bias=bias)(x), plain(x) * 2 + bias)


def test_a_clip_and_an_offset_reach_the_weight() -> None:
    weight = row(0.7)
    layer = dataclasses.replace(layer_problem("mxfp4", None, rows=1, cols=32), weight=weight)
    unit = torch.eye(32)

    def column(**options: object) -> list[float]:
        stand_in = StandIn(layer=layer, bias=None, operands=lambda inputs: (inputs, weight), **options)  # type: ignore[arg-type]
        return stand_in(unit)[:2, 0].tolist()

    assert column() == [0.5, 6.0]
    assert column(limit=lambda w: torch.full_like(w, 3.0)) == [0.75, 3.0]  # a clip of 3 halves the scale
    assert column(limit=lambda w: torch.full_like(w, 6.0), offset=row(1.0)) == [1.0, 6.0]
