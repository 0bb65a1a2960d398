"""Online transforms: the product of transformed inputs and weights is that of the plain ones, for every kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from method_problems import random
from microscale.errors import NonFiniteError, ShapeError
from microscale.kernels.transform import (
    apply_transforms,
    hadamard_matrix,
    restore_weight,
    transform_second_moment,
    transform_weight,
)
from microscale.transforms import (
    Transform,
    block_transform,
    hadamard_transform,
    kronecker_transform,
    parse_transform,
    permute_transform,
    scale_transform,
)

COLS = 64


def mixing(*shape: int, seed: int = 0) -> Tensor:
    """Return well-conditioned matrices that are not symmetric."""
    return torch.eye(shape[-1]) + 0.4 * random(*shape, seed=seed) / shape[-1] ** 0.5


TRANSFORMS = {
    "scale": scale_transform(random(COLS).abs() + 0.5),
    "permute": permute_transform(torch.randperm(COLS, generator=torch.Generator().manual_seed(1))),
    "hadamard(2)": hadamard_transform(COLS, 2),
    "hadamard(16)": hadamard_transform(COLS, 16),
    "hadamard(64)": hadamard_transform(COLS, 64),
    "block(32)": block_transform(mixing(2, 32, 32), COLS),
    "block(16,shared)": block_transform(mixing(1, 16, 16), COLS),
    "block(64)": block_transform(mixing(1, 64, 64), COLS),
    "kronecker(4,16)": kronecker_transform(mixing(4, 4), mixing(16, 16)),
}


def matrix_of(transform: Transform) -> Tensor:
    """Return M by its definition: the images of the unit vectors."""
    return apply_transforms(torch.eye(transform.cols), [transform])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_products_stay_and_specs_parse_back(name: str) -> None:
    transform = TRANSFORMS[name]
    assert str(transform.spec) == name and parse_transform(name) == transform.spec
    inputs, weight = random(2, 5, COLS, seed=2), random(7, COLS, seed=3)
    before = inputs.clone(), weight.clone()
    turned = apply_transforms(inputs, [transform])
    assert turned.shape == inputs.shape and turned.dtype == inputs.dtype
    product = turned.to(torch.float64) @ transform_weight(weight, transform).to(torch.float64).T
    exact = inputs.to(torch.float64) @ weight.to(torch.float64).T
    assert float((product - exact).abs().max() / exact.abs().max()) < 1e-5
    assert torch.equal(inputs, before[0]) and torch.equal(weight, before[1])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_second_moment_is_that_of_the_transformed_inputs(name: str) -> None:
    rows = random(200, COLS, seed=4)
    turned = apply_transforms(rows, [TRANSFORMS[name]])
    found = transform_second_moment(rows.T @ rows / 200, TRANSFORMS[name])
    torch.testing.assert_close(found, turned.T @ turned / 200, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients_are_those_of_the_matrix(name: str) -> None:
    inputs = random(3, COLS, seed=5).requires_grad_()
    weights = random(3, COLS, seed=6)
    (apply_transforms(inputs, [TRANSFORMS[name]]) * weights).sum().backward()
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad, weights @ matrix_of(TRANSFORMS[name]).T, rtol=1e-4, atol=1e-5)


def test_each_kind_is_its_definition() -> None:
    x = random(COLS, seed=7)
    parts = {name: transform.parts for name, transform in TRANSFORMS.items()}
    expected = {
        "scale": x * parts["scale"]["scale"],
        "permute": torch.stack([x[int(i)] for i in parts["permute"]["order"]]),
        "hadamard(16)": torch.cat([piece @ hadamard_matrix(16) for piece in x.split(16)]),
        "block(32)": torch.cat([x[:32] @ parts["block(32)"]["matrix"][0], x[32:] @ parts["block(32)"]["matrix"][1]]),
        "kronecker(4,16)": (
            parts["kronecker(4,16)"]["left"].T @ x.reshape(4, 16) @ parts["kronecker(4,16)"]["right"]
        ).reshape(-1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(apply_transforms(x, [TRANSFORMS[name]]), value, rtol=1e-5, atol=1e-5)


def test_chains_go_in_order() -> None:
    chain = [TRANSFORMS["permute"], TRANSFORMS["block(32)"], TRANSFORMS["scale"]]
    inputs, weight = random(5, COLS, seed=8), random(7, COLS, seed=9)
    turned = weight
    for transform in chain:
        turned = transform_weight(turned, transform)
    torch.testing.assert_close(apply_transforms(inputs, chain) @ turned.T, inputs @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_weight_is_brought_back(name: str) -> None:
    weight, transform = random(7, COLS, seed=10), TRANSFORMS[name]
    torch.testing.assert_close(restore_weight(transform_weight(weight, transform), [transform]), weight)


def test_a_chain_is_undone_from_its_end() -> None:
    chain = [TRANSFORMS["permute"], TRANSFORMS["block(32)"], TRANSFORMS["scale"]]
    weight = random(7, COLS, seed=11)
    turned = weight
    for transform in chain:
        turned = transform_weight(turned, transform)
    torch.testing.assert_close(restore_weight(turned, chain), weight, rtol=1e-5, atol=1e-5)
    assert torch.equal(restore_weight(transform_weight(weight, chain[0]), chain[:1]), weight), "no number is changed"
    assert restore_weight(weight, ()) is weight


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="64 columns"):
        apply_transforms(random(2, 32), [TRANSFORMS["scale"]])
    with pytest.raises(ShapeError, match="64 columns"):
        transform_weight(random(2, 32), TRANSFORMS["scale"])
    with pytest.raises(ShapeError, match="singular"):
        transform_weight(random(2, COLS), block_transform(torch.zeros(1, 32, 32), COLS))
    with pytest.raises(ShapeError, match="singular"):
        transform_weight(random(2, COLS), scale_transform(torch.zeros(COLS)))


def test_a_weight_with_nan_is_not_the_fault_of_the_transform() -> None:
    weight = random(4, COLS)
    weight[1, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"a weight holds NaN or Inf, which transform hadamard\(16\) would spread"):
        transform_weight(weight, TRANSFORMS["hadamard(16)"])
