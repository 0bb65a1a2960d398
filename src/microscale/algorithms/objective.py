"""The error of a group's outputs on sampled inputs: what searches over scales and transforms minimize."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.algorithms.contract import GroupProblem
from microscale.formats import ActivationSpec
from microscale.kernels import fake_quantize


def group_error(group: GroupProblem, scale: Float[Tensor, "cols"]) -> float:
    """Return the squared error of all outputs when inputs are divided by ``scale`` and weights multiplied by it.

    Both are rounded to the formats of each layer. Special values: NaN or Inf anywhere counts as infinitely bad.
    """
    sample = group.sample
    total = torch.zeros((), dtype=torch.float64, device=sample.device)
    for layer in group.layers:
        target = layer.target
        exact = sample @ target.T
        inputs = rounded_inputs(sample / scale, layer.activations)
        outputs = inputs @ fake_quantize(target * scale, layer.format).T
        total += (outputs - exact).to(torch.float64).square().sum()
    return float(total) if bool(torch.isfinite(total)) else float("inf")


def rounded_inputs(inputs: Float[Tensor, "... cols"], spec: ActivationSpec | None) -> Float[Tensor, "... cols"]:
    """Return the inputs as a layer with these activations sees them, the range taken from the tensor at hand."""
    return inputs if spec is None else fake_quantize(inputs, spec.format)
