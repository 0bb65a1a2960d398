"""The error of a decoder layer's outputs: what methods that learn from them minimize, and are judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from microscale.algorithms.contract import BlockProblem, GroupProblem, LayerFunction, LayerProblem
from microscale.algorithms.objective import rounded_inputs
from microscale.algorithms.rtn import Rtn
from microscale.kernels import dequantize
from microscale.kernels.transform import apply_transforms

JUDGES = 8
"""Batches, evenly spread, that an error is measured on."""


def rounded_stand_ins(groups: Sequence[GroupProblem], biases: Mapping[str, Tensor | None]) -> dict[str, LayerFunction]:
    """Return what each layer computes once its weight is rounded to nearest, with its transforms and clip."""
    return {layer.name: _rounded(layer, biases[layer.name]) for group in groups for layer in group.layers}


def _rounded(layer: LayerProblem, bias: Tensor | None) -> LayerFunction:
    weight = dequantize(Rtn().quantize(layer), torch.float32)

    def run(inputs: Tensor) -> Tensor:
        turned = apply_transforms(inputs, layer.transforms)
        return functional.linear(rounded_inputs(turned, layer.activations), weight, bias)

    return run


@torch.no_grad()
def block_error(problem: BlockProblem, groups: Sequence[GroupProblem]) -> float:
    """Return the mean squared error of the outputs over up to :data:`JUDGES` batches, weights rounded to nearest.

    Special values: outputs that are not finite count as infinitely bad.
    """
    stand_ins = rounded_stand_ins(groups, problem.biases)
    total, count = 0.0, 0
    every = -(-len(problem.targets) // JUDGES)
    for batch in range(0, len(problem.targets), every):
        target = problem.targets[batch]
        total += float((problem.forward(stand_ins, batch) - target).to(torch.float64).square().sum())
        count += target.numel()
    return total / count if total < float("inf") else float("inf")
