"""Small changes of the problems that methods get: statistics, transforms, and scales that find a place in a norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from microscale.algorithms.contract import GroupProblem, LayerProblem, Step
from microscale.algorithms.learned import is_seen
from microscale.calibration.statistics import InputStatistics
from microscale.families.structure import BlockStructure, FoldKind, LinearGroup
from microscale.layer_spec import LayerSpec
from microscale.nn.modules import float_weight, stored_of
from microscale.recipes.folding import fold_order, fold_scale
from microscale.transforms import Transform, TransformKind, scale_transform


def layer_problem(layer: LayerSpec, module: nn.Module) -> LayerProblem:
    """Return the problem of a layer as the plan has it, with the weight of its module."""
    return LayerProblem(
        name=layer.name,
        weight=float_weight(module),
        format=layer.format,
        activations=layer.activations,
        dtype=layer.dtype,
        stored=stored_of(module),
    )


def with_inputs(problem: GroupProblem, inputs: InputStatistics | None) -> GroupProblem:
    """Return the group whose layers know their inputs."""
    layers = tuple(dataclasses.replace(layer, inputs=inputs) for layer in problem.layers)
    return dataclasses.replace(problem, layers=layers, inputs=inputs)


def transformed(problem: GroupProblem, transforms: Sequence[Transform]) -> GroupProblem:
    """Return the group with more transforms."""
    return dataclasses.replace(problem, layers=tuple(layer.with_transforms(transforms) for layer in problem.layers))


def knows_inputs(problem: GroupProblem, step: Step) -> bool:
    """Whether a step knows what it needs: nothing, or inputs of at least one token."""
    return step.wanted is None or is_seen(problem)


def is_scaled_at_most(layer: LayerProblem) -> bool:
    """Whether the transforms of a layer keep every channel to itself and in its place."""
    return all(transform.spec.kind is TransformKind.SCALE for transform in layer.transforms)


def fold_first_scale(
    model: nn.Module, block: BlockStructure, group: LinearGroup, problem: GroupProblem
) -> GroupProblem:
    """Fold a learned scale that comes first into the norm before a group; other scales stay online."""
    chain = problem.layers[0].transforms
    is_norm = group.fold is not None and group.fold.kind is FoldKind.NORM
    is_first = bool(chain) and chain[0].spec.kind is TransformKind.SCALE
    if not is_norm or not is_first or len(problem.layers) < len(group.linears):
        return problem
    fold_scale(model, block, group, 1.0 / chain[0].parts["scale"].to(torch.float64))
    layers = tuple(
        dataclasses.replace(layer, weight=float_weight(model.get_submodule(layer.name)), transforms=chain[1:])
        for layer in problem.layers
    )
    return dataclasses.replace(problem, layers=layers)


def fold_segment_order(
    model: nn.Module, block: BlockStructure, group: LinearGroup, problem: GroupProblem
) -> GroupProblem:
    """Fold the order that segments want into the layers that make a group's input; where it cannot be, it stays online.

    Scales that come before it and stay online move with their channels.
    """
    last = (layer.transforms[-1] for layer in problem.layers if layer.transforms)
    order = next((each.parts["order"] for each in last if each.spec.kind is TransformKind.PERMUTE), None)
    if order is None or not problem.is_order_folded:
        return problem
    fold_order(model, block, group, order)
    layers = tuple(
        dataclasses.replace(
            layer,
            weight=float_weight(model.get_submodule(layer.name)),
            transforms=tuple(
                scale_transform(transform.parts["scale"][order])
                for transform in layer.transforms
                if transform.spec.kind is TransformKind.SCALE
            ),
        )
        for layer in problem.layers
    )
    return dataclasses.replace(problem, layers=layers)
