"""What every step of a method must do, whatever it does besides: one check, or a few, for each kind."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from method_problems import (
    COLS,
    block_problem,
    group_problem,
    input_rows,
    layer_problem,
    model_problem,
    random,
    tensors_of,
)
from microscale.algorithms.block_error import block_error
from microscale.algorithms.contract import (
    BlockStep,
    FoldStep,
    FormatStep,
    LayerProblem,
    ModelStep,
    RoundStep,
    SideStep,
    Step,
    TransformStep,
)
from microscale.algorithms.distill import mean_divergence
from microscale.algorithms.objective import group_error
from microscale.algorithms.pipeline import parse_method
from microscale.algorithms.rtn import Rtn
from microscale.errors import FormatError
from microscale.kernels import dequantize, quantize
from microscale.kernels.transform import apply_transforms
from microscale.transforms import scale_transform
from small_models import same_bits


def step(text: str) -> Step:
    """Return the one step of a text."""
    pipeline = parse_method(text)
    return next(found for found in pipeline.steps if found.name == text.partition(":")[0])


def same(one: object, other: object) -> bool:
    """Whether two results hold the same bits."""
    first, second = tensors_of(one), tensors_of(other)
    return len(first) == len(second) and all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def output_error(layer: LayerProblem, rounded: Tensor) -> float:
    """Return the squared error of the outputs on the calibration inputs: trace(E S E^T)."""
    error = (rounded - layer.target).to(torch.float64)
    moment = layer.second_moment
    assert moment is not None
    return float(((error @ moment.to(torch.float64)) * error).sum())


def check_rounding(text: str, fmt: str) -> None:
    rounding, layer = step(text), layer_problem(fmt)
    assert isinstance(rounding, RoundStep)
    before = [tensor.clone() for tensor in tensors_of(layer)]
    found = rounding.quantize(layer)
    assert (found.format, found.shape, found.dtype) == (layer.format, tuple(layer.weight.shape), layer.dtype)
    assert same(found.parts, rounding.quantize(layer).parts), "the same input gives the same result"
    assert all(same_bits(a, b) for a, b in zip(before, tensors_of(layer), strict=True)), "the input is not changed"
    plain = dequantize(quantize(layer.target, layer.format), torch.float32)
    rounded = dequantize(found, torch.float32)
    if text == "rtn:search=true":  # its own objective is the error of the weights
        assert float((rounded - layer.target).square().sum()) <= float((plain - layer.target).square().sum())
    elif text == "rtn:weighted=true":  # that of the diagonal alone
        columns = layer.second_moment.diagonal()  # type: ignore[union-attr]
        error = ((rounded - layer.target).square() * columns).sum()
        assert float(error) <= float(((plain - layer.target).square() * columns).sum())
    else:
        assert output_error(layer, rounded) <= output_error(layer, plain)


def check_rounding_of_odd_inputs(text: str) -> None:
    """Zero rows, one token, no token, a width that no block divides, a transformed and clipped weight."""
    rounding = step(text)
    assert isinstance(rounding, RoundStep)
    one_token = layer_problem(inputs=input_rows(1))
    unseen = dataclasses.replace(one_token, inputs=layer_problem(inputs=input_rows(0)).inputs)
    unmeasured = dataclasses.replace(one_token, inputs=None)
    dead = layer_problem(inputs=input_rows() * torch.cat([torch.zeros(32), torch.ones(COLS - 32)]))
    ragged = layer_problem(cols=40, inputs=input_rows(cols=40))
    zeros = layer_problem()
    zeros = dataclasses.replace(zeros, weight=zeros.weight * (torch.arange(48) % 2).unsqueeze(1))
    scaled = layer_problem().with_transforms([scale_transform(random(COLS).abs() + 0.5)])
    clipped = dataclasses.replace(layer_problem(), clip=torch.full((48, COLS), 0.15))
    for layer in (one_token, unseen, unmeasured, dead, ragged, zeros, scaled, clipped):
        found = dequantize(rounding.quantize(layer), torch.float32)
        assert found.shape == layer.weight.shape and bool(torch.isfinite(found).all())
        assert float((found - layer.target).square().mean().sqrt()) < 0.06
    assert float(dequantize(rounding.quantize(zeros), torch.float32)[0].abs().max()) == 0.0
    plain = quantize(unseen.weight, unseen.format)
    if "search" not in text and "weighted" not in text:
        assert same(rounding.quantize(unseen).parts, plain.parts), "without a token it is rounding to nearest"


def check_fold(text: str, activations: str | None) -> None:
    fold = step(text)
    assert isinstance(fold, FoldStep)
    layers = [layer_problem("mxfp4", activations, seed=i, name=f"layers.0.{i}") for i in range(2)]
    group = group_problem(*layers)
    before = [tensor.clone() for tensor in tensors_of(group)]
    scale = fold.input_scale(group)
    assert scale.shape == (COLS,) and bool(torch.isfinite(scale).all()) and float(scale.min()) > 0
    assert same(scale, fold.input_scale(group))
    assert all(same_bits(a, b) for a, b in zip(before, tensors_of(group), strict=True))
    assert group_error(group, scale) <= group_error(group, torch.ones(COLS))
    turned = group.layers[0].with_transforms([scale_transform(1 / scale)])
    rows = apply_transforms(group.sample, turned.transforms)
    exact = group.sample @ group.layers[0].weight.T
    assert float((rows @ turned.target.T - exact).abs().max() / exact.abs().max()) < 1e-5


def check_fold_of_odd_inputs(text: str) -> None:
    fold = step(text)
    assert isinstance(fold, FoldStep)
    dead = input_rows() * torch.cat([torch.zeros(32), torch.ones(COLS - 32)])
    idle = layer_problem()
    idle = dataclasses.replace(idle, weight=idle.weight * (torch.arange(COLS) > 5))
    for group in (
        group_problem(layer_problem(inputs=input_rows(1))),
        group_problem(layer_problem(inputs=dead)),
        group_problem(layer_problem(inputs=torch.zeros(4, COLS))),
        group_problem(layer_problem(cols=40, inputs=input_rows(cols=40))),
        group_problem(idle),
    ):
        scale = fold.input_scale(group)
        assert bool(torch.isfinite(scale).all()) and float(scale.min()) > 0


def check_transform(text: str) -> None:
    finding = step(text)
    assert isinstance(finding, TransformStep)
    group = group_problem()
    before = [tensor.clone() for tensor in tensors_of(group)]
    chain = finding.transforms(group)
    assert chain and same(chain, finding.transforms(group))
    assert all(same_bits(a, b) for a, b in zip(before, tensors_of(group), strict=True))
    layers = tuple(layer.with_transforms(chain) for layer in group.layers)
    turned = dataclasses.replace(group, layers=layers)
    for old, new in zip(group.layers, layers, strict=True):
        exact = group.sample @ old.weight.T
        assert float((turned.sample @ new.target.T - exact).abs().max() / exact.abs().max()) < 1e-5
    if finding.name != "permute":  # see below
        assert group_error(turned, torch.ones(COLS)) < group_error(group, torch.ones(COLS))


def check_transform_of_odd_widths(text: str) -> None:
    """A width that is no multiple of the block gets a smaller transform, or none."""
    finding = step(text)
    assert isinstance(finding, TransformStep)
    for cols in (40, 33, 7, 1):
        group = group_problem(layer_problem(cols=cols, inputs=input_rows(cols=cols)))
        for transform in finding.transforms(group):
            assert transform.cols == cols


def check_learning_from_a_decoder_layer(text: str, fmt: str) -> None:
    learning = step(text)
    assert isinstance(learning, BlockStep)
    problem = block_problem(fmt, fmt)
    before = [tensor.clone() for tensor in tensors_of(problem)]
    learned = learning.learn(problem)
    assert all(same_bits(a, b) for a, b in zip(before, tensors_of(problem), strict=True))
    assert not any(tensor.requires_grad for tensor in tensors_of(learned))
    assert same(learned, learning.learn(problem)), "the same seed gives the same result"
    assert [layer.name for group in learned for layer in group.layers] == [
        layer.name for group in problem.groups for layer in group.layers
    ]
    assert all(
        new.weight.shape == old.weight.shape and new.format == old.format
        for new_group, old_group in zip(learned, problem.groups, strict=True)
        for new, old in zip(new_group.layers, old_group.layers, strict=True)
    )
    assert block_error(problem, learned) < block_error(problem, problem.groups)


def check_learning_where_an_expert_saw_no_token(text: str) -> None:
    learning = step(text)
    assert isinstance(learning, BlockStep)
    problem = block_problem()
    empty = layer_problem(inputs=input_rows(0), name="layers.0.expert")
    unseen = group_problem(empty, role="moe.experts.gate_up")
    problem = dataclasses.replace(
        problem, groups=(*problem.groups, unseen), biases={**problem.biases, "layers.0.expert": None}
    )
    *_, last = learning.learn(problem)
    assert torch.allclose(last.layers[0].target, empty.target) or last.layers[0].transforms
    assert bool(torch.isfinite(last.layers[0].target).all())


def check_learning_from_a_model(text: str) -> None:
    learning = step(text)
    assert isinstance(learning, ModelStep)
    problem = model_problem()
    before = [tensor.clone() for tensor in tensors_of(problem)]
    learned = learning.learn(problem)
    assert all(same_bits(a, b) for a, b in zip(before, tensors_of(problem), strict=True))
    assert same(learned, learning.learn(problem))
    assert model_error(problem, learned) < model_error(problem, problem.groups)


def model_error(problem: object, groups: object) -> float:
    """Return KL(unquantized || rounded to nearest) on the calibration windows."""
    from microscale.algorithms.block_error import rounded_stand_ins

    with torch.no_grad():
        return float(mean_divergence(problem, rounded_stand_ins(groups, problem.biases), problem.windows))  # type: ignore[attr-defined,arg-type]


def check_side_path(text: str) -> None:
    side = step(text)
    assert isinstance(side, SideStep)
    layer = layer_problem()
    tensor = Rtn().quantize(layer)
    down, up = side.side(layer, tensor)
    assert down.shape[1] == COLS and up.shape[0] == 48 and down.shape[0] == up.shape[1]
    assert same((down, up), side.side(layer, tensor))
    rounded = dequantize(tensor, torch.float32)
    assert output_error(layer, rounded + up @ down) < 0.7 * output_error(layer, rounded)
    for odd in (layer_problem(inputs=input_rows(0)), layer_problem(inputs=input_rows(1)), layer_problem(rows=3)):
        down, up = side.side(odd, Rtn().quantize(odd))
        assert bool(torch.isfinite(down).all()) and bool(torch.isfinite(up).all())


def check_formats(text: str, fmt: str) -> None:
    changing = step(text)
    assert isinstance(changing, FormatStep)
    layer = layer_problem(fmt, "mxfp4")
    if changing.refusal(layer.format, layer.activations) is not None:
        with pytest.raises(FormatError):
            changing.adapt(layer.format, layer.activations)
        return
    found, activations = changing.adapt(layer.format, layer.activations)
    assert (found, activations) == changing.adapt(layer.format, layer.activations)
    assert quantize(layer.weight, found).shape == (48, COLS)
    assert changing.adapt(layer.format, None)[1] is None


FORMATS = ("mxfp4", "mxfp4_plus", "nvfp4", "int4_asym")
"""Weights that every rounding is checked on."""
CHECKS: dict[type[Step], tuple[Callable[[str], None], ...]] = {
    FormatStep: tuple(
        functools.partial(check_formats, fmt=fmt) for fmt in (*FORMATS, "mxfp8", "pair(mxfp4,mxfp8,25%)")
    ),
    FoldStep: (
        functools.partial(check_fold, activations=None),
        functools.partial(check_fold, activations="mxfp4"),
        check_fold_of_odd_inputs,
    ),
    ModelStep: (check_learning_from_a_model,),
    TransformStep: (check_transform, check_transform_of_odd_widths),
    BlockStep: (
        functools.partial(check_learning_from_a_decoder_layer, fmt="mxfp4"),
        check_learning_where_an_expert_saw_no_token,
    ),
    RoundStep: (
        *(functools.partial(check_rounding, fmt=fmt) for fmt in FORMATS),
        check_rounding_of_odd_inputs,
    ),
    SideStep: (check_side_path,),
}
"""The checks of a kind of step; those of rotations and segments have files of their own."""


def check_algorithm(text: str) -> None:
    """Check a step, with its options, by all that its kind asks for."""
    found = step(text)
    for check in next(checks for kind, checks in CHECKS.items() if isinstance(found, kind)):
        check(text)
