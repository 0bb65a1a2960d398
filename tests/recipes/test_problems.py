"""Small changes of problems: what layers know, what is seen, and scales and orders that find a place before a group."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from family_models import family_model, run
from method_problems import group_problem, input_rows, layer_problem, statistics
from microscale.algorithms.contract import GroupProblem, LayerProblem, Step
from microscale.algorithms.pipeline import parse_method
from microscale.families.look_up import describe
from microscale.families.structure import BlockStructure, FoldKind, LinearGroup
from microscale.formats import parse_format
from microscale.nn.modules import float_weight
from microscale.recipes.problems import (
    fold_first_scale,
    fold_segment_order,
    is_scaled_at_most,
    knows_inputs,
    transformed,
    with_inputs,
)
from microscale.transforms import permute_transform, scale_transform


def first_step(method: str) -> Step:
    return parse_method(method).steps[0]


def test_layers_of_a_group_know_the_inputs_of_the_group() -> None:
    group = group_problem()
    assert with_inputs(group, None).inputs is None
    assert all(layer.inputs is None for layer in with_inputs(group, None).layers)
    found = statistics(input_rows(tokens=5))
    known = with_inputs(group, found)
    assert all(layer.inputs is found for layer in known.layers) and known.inputs is found
    assert group.inputs is not found, "the problem itself stays"


def test_transforms_are_added_at_the_end_of_every_layer() -> None:
    scale, other = scale_transform(torch.full((64,), 2.0)), scale_transform(torch.full((64,), 0.25))
    once = transformed(group_problem(), [scale])
    twice = transformed(once, [other])
    assert [layer.transforms for layer in twice.layers] == [(scale, other)] * 2
    assert transformed(once, []).layers[0].transforms == (scale,)
    assert is_scaled_at_most(twice.layers[0])
    moved = transformed(once, [permute_transform(torch.arange(63, -1, -1))])
    assert not is_scaled_at_most(moved.layers[0])
    assert is_scaled_at_most(layer_problem()), "no transform at all"


def test_a_step_that_wants_inputs_sees_none_without_a_token() -> None:
    group, nothing = group_problem(), statistics(input_rows(tokens=1)[:0])
    assert nothing.num_tokens == 0
    awq, hadamard = first_step("awq+rtn"), first_step("hadamard+rtn")
    assert awq.wanted is not None and hadamard.wanted is None
    assert knows_inputs(group, awq)
    for problem in (with_inputs(group, None), with_inputs(group, nothing)):
        assert not knows_inputs(problem, awq) and knows_inputs(problem, hadamard)


def found_group(model: Any, role: str) -> tuple[BlockStructure, LinearGroup]:
    block = describe(model).blocks[0]
    return block, next(group for group in block.groups if group.role == role)


def task_of(model: Any, block: BlockStructure, group: LinearGroup, **facts: Any) -> GroupProblem:
    layers = tuple(
        LayerProblem(
            name=f"{block.name}.{name}",
            weight=float_weight(model.get_submodule(f"{block.name}.{name}")),
            format=parse_format("mxfp4"),
            activations=None,
            dtype=torch.float64,
        )
        for name in group.linears
    )
    return GroupProblem(role=group.role, layers=layers, **facts)


def positive(width: int) -> Tensor:
    return torch.rand(width, generator=torch.Generator().manual_seed(3)) + 0.5


@torch.no_grad()
def test_a_learned_scale_goes_into_the_norm_before() -> None:
    """Inputs are multiplied by the scale: the norm takes it, and the layer's weight is divided by it."""
    model = family_model("llama")
    expected = run(model)
    block, group = found_group(model, "attention.qkv")
    assert group.fold is not None and group.fold.kind is FoldKind.NORM
    scale, rest = positive(32), scale_transform(positive(32))
    problem = transformed(task_of(model, block, group), [scale_transform(scale), rest])
    norm = model.get_submodule(f"{block.name}.{group.fold.name}").weight.clone()
    folded = fold_first_scale(model, block, group, problem)
    torch.testing.assert_close(model.get_submodule(f"{block.name}.{group.fold.name}").weight, norm * scale.double())
    for before, after in zip(problem.layers, folded.layers, strict=True):
        assert after.transforms == (rest,), "what follows stays online"
        torch.testing.assert_close(after.weight, before.weight / scale)
    torch.testing.assert_close(run(model), expected, rtol=1e-6, atol=1e-6)


def test_scales_that_stay_online() -> None:
    model = family_model("llama")
    block, group = found_group(model, "attention.qkv")
    scale, turn = scale_transform(positive(32)), permute_transform(torch.arange(31, -1, -1))
    problem = task_of(model, block, group)
    down_block, down = found_group(model, "mlp.down")
    down_task = transformed(task_of(model, down_block, down), [scale_transform(positive(48))])
    alone = dataclasses.replace(transformed(problem, [scale]), layers=transformed(problem, [scale]).layers[:1])
    for case in (problem, transformed(problem, [turn, scale]), alone):  # none, not first, not all layers of the group
        assert fold_first_scale(model, block, group, case) is case
    assert fold_first_scale(model, down_block, down, down_task) is down_task, "no norm stands before it"


@torch.no_grad()
def test_an_order_of_channels_is_folded_and_scales_move_with_their_channels() -> None:
    model = family_model("llama")
    expected = run(model)
    block, group = found_group(model, "mlp.down")
    order = torch.randperm(48, generator=torch.Generator().manual_seed(4))
    scale = positive(48)
    chain = [scale_transform(scale), permute_transform(order)]
    problem = transformed(task_of(model, block, group, is_order_folded=True), chain)
    folded = fold_segment_order(model, block, group, problem)
    (layer,) = folded.layers
    assert torch.equal(layer.weight, problem.layers[0].weight[:, order])
    (kept,) = layer.transforms
    assert torch.equal(kept.parts["scale"], scale[order])
    torch.testing.assert_close(run(model), expected)


@pytest.mark.parametrize("is_order_folded", [True, False])
def test_orders_that_stay_online(is_order_folded: bool) -> None:
    model = family_model("llama")
    block, group = found_group(model, "mlp.down")
    chain = [] if is_order_folded else [permute_transform(torch.arange(47, -1, -1))]
    problem = transformed(task_of(model, block, group, is_order_folded=is_order_folded), chain)
    assert fold_segment_order(model, block, group, problem) is problem
