"""The error that methods are judged by: a mean over batches by hand, which batches, and layers as they are rounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.nn import functional

from method_problems import block_problem, group_problem, layer_problem, random, silent
from microscale.algorithms.block_error import JUDGES, block_error, rounded_stand_ins
from microscale.algorithms.contract import BlockProblem, LayerFunction
from microscale.kernels import dequantize, fake_quantize, quantize
from microscale.transforms import hadamard_transform


def problem_of(outputs: list[list[float]], targets: list[list[float]], seen: list[int] | None = None) -> BlockProblem:
    """Return a decoder layer without linear layers, whose outputs and targets are these numbers."""

    def forward(stand_ins: Mapping[str, LayerFunction], batch: int) -> Tensor:
        if seen is not None:
            seen.append(batch)
        return torch.tensor(outputs[batch])

    wanted = [torch.tensor(target) for target in targets]
    return BlockProblem(groups=(), forward=forward, targets=wanted, biases={}, seed=0, progress=silent)


def test_it_is_the_mean_over_all_numbers() -> None:
    """Batches of one and of three: (3^2 + 0 + 1 + 4) / 4, no mean of means."""
    problem = problem_of([[3.0], [1.0, 2.0, 5.0]], [[0.0], [1.0, 3.0, 3.0]])
    assert block_error(problem, ()) == 14 / 4


@pytest.mark.parametrize(
    ("count", "judged"),
    [(1, [0]), (8, list(range(8))), (9, [0, 2, 4, 6, 8]), (20, [0, 3, 6, 9, 12, 15, 18]), (64, list(range(0, 64, 8)))],
)
def test_a_few_batches_evenly_spread_are_judged(count: int, judged: list[int]) -> None:
    seen: list[int] = []
    assert block_error(problem_of([[1.0]] * count, [[0.0]] * count, seen), ()) == 1.0
    assert seen == judged and len(seen) <= JUDGES


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_what_is_not_finite_is_infinitely_bad(bad: float) -> None:
    found = block_error(problem_of([[1.0], [bad]], [[0.0], [-3e38]]), ())
    assert found == float("inf"), "so is a difference past float32"


def test_it_asks_for_no_gradient() -> None:
    problem = block_problem()
    leaf = torch.zeros((), requires_grad=True)
    forward = problem.forward
    calls: list[bool] = []

    def watched(stand_ins: Mapping[str, LayerFunction], batch: int) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return forward(stand_ins, batch) + leaf

    assert block_error(dataclasses.replace(problem, forward=watched), problem.groups) > 0
    assert calls == [False] * len(problem.targets)


@pytest.mark.parametrize("activations", [None, "mxfp8"])
def test_a_layer_is_what_its_rounded_parts_compute(activations: str | None) -> None:
    layer, bias, x = layer_problem("mxfp4", activations), random(48, seed=4), random(3, 64, seed=5)
    found = rounded_stand_ins([group_problem(layer)], {layer.name: bias})[layer.name](x)
    inputs = x if activations is None else fake_quantize(x, "mxfp8")
    assert torch.equal(found, functional.linear(inputs, fake_quantize(layer.weight, "mxfp4"), bias))


def test_transforms_and_clips_are_those_of_the_layer() -> None:
    turned = layer_problem("mxfp4", None).with_transforms([hadamard_transform(64, 32)])
    layer = dataclasses.replace(turned, clip=torch.full((48, 64), 0.1))
    x = random(3, 64, seed=5)
    found = rounded_stand_ins([group_problem(layer)], {layer.name: None})[layer.name](x)
    sylvester = torch.from_numpy(scipy.linalg.hadamard(32)).to(torch.float32) / 32**0.5
    rotation = torch.block_diag(sylvester, sylvester)
    weight = dequantize(quantize((layer.weight @ rotation).clamp(-0.1, 0.1), "mxfp4"))
    torch.testing.assert_close(found, x @ rotation @ weight.T, rtol=1e-4, atol=1e-5)


def test_every_layer_of_every_group_has_one() -> None:
    problem: Any = block_problem()
    assert set(rounded_stand_ins(problem.groups, problem.biases)) == set(problem.biases)
