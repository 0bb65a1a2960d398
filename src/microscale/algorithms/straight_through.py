"""Rounding that passes gradients, and the one stand-in for a layer that is rounded while something of it is learned.

The gradient passes a rounding as if it were not there. A clip is a share of the largest magnitude of a block; the scale
of the block is taken from what it leaves, and the gradient passes the scale as if it were no power of two: with s
proportional to the clip c, dq/dc = (q - w) / c for a number inside of the clip and q / c for one past it. An offset is
in gaps between the two numbers of the format around a weight: dq/dV is the gap.

Source: arXiv 1308.3432 (straight-through estimator), arXiv 1902.08153 (gradient of a scale), arXiv 2309.05516
equation 3 (offsets).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from microscale.algorithms.contract import LayerProblem
from microscale.formats import ActivationSpec, Format
from microscale.kernels import fake_quantize
from microscale.kernels.grid import make_grid
from microscale.kernels.straight_through import straight_through as pass_straight_through
from microscale.kernels.transform import apply_transforms


class _ClippedRounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, limit: Tensor, fmt: Format) -> Tensor:
        rounded = fake_quantize(torch.clamp(weight.detach(), -limit, limit), fmt)
        ctx.save_for_backward(weight, limit, rounded)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, limit, rounded = ctx.saved_tensors
        is_inside = weight.abs() <= limit
        by_limit = _clip_gradient(gradients[0], weight, limit, rounded)
        return torch.where(is_inside, gradients[0], 0.0), by_limit, None


class _TunedRounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, offset: Tensor, limit: Tensor, weight: Tensor, fmt: Format) -> Tensor:
        grid = make_grid(torch.clamp(weight, -limit, limit), fmt)
        gap = grid.gap(weight)
        rounded = grid.round(weight + offset * gap, slice(None))
        ctx.save_for_backward(gap, limit, weight, rounded)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gap, limit, weight, rounded = ctx.saved_tensors
        return gradients[0] * gap, _clip_gradient(gradients[0], weight, limit, rounded), None, None


def _clip_gradient(gradient: Tensor, weight: Tensor, limit: Tensor, rounded: Tensor) -> Tensor:
    """Return the gradient by the clip of every element."""
    change = torch.where(weight.abs() <= limit, rounded - weight, rounded)
    return gradient * change / limit.clamp(min=torch.finfo(torch.float32).tiny)


def rounded_straight_through(values: Float[Tensor, "..."], fmt: Format) -> Float[Tensor, "..."]:
    """Return the values rounded to the format; the gradient passes unchanged.

    Special values and errors: as :func:`microscale.kernels.ops.fake_quantize`.
    """
    return pass_straight_through(values, lambda kept: fake_quantize(kept, fmt))


def straight_through_inputs(inputs: Float[Tensor, "..."], spec: ActivationSpec | None) -> Float[Tensor, "..."]:
    """Return a layer's inputs as it rounds them, the range taken from the tensor at hand; gradients pass."""
    return inputs if spec is None else rounded_straight_through(inputs, spec.format)


def clipped_rounding(
    weight: Float[Tensor, "rows cols"], limit: Float[Tensor, "rows cols"], fmt: Format
) -> Float[Tensor, "rows cols"]:
    """Return quantize(clamp(w, limit)) with the gradients by both."""
    return _ClippedRounding.apply(weight, limit, fmt)


def tuned_rounding(
    weight: Float[Tensor, "rows cols"],
    limit: Float[Tensor, "rows cols"],
    offset: Float[Tensor, "rows cols"],
    fmt: Format,
) -> Float[Tensor, "rows cols"]:
    """Return the weight moved by ``offset`` gaps and rounded on the grid of its clip; gradients by offset and clip."""
    return _TunedRounding.apply(offset, limit, weight, fmt)


Operands = Callable[[Float[Tensor, "... cols"]], tuple[Float[Tensor, "... cols"], Float[Tensor, "rows cols"]]]
"""Of the inputs of a layer to the inputs and the weight that are rounded."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StandIn:
    """What a layer computes while it learns: x' and W' rounded to its formats, their product, and its bias.

    ``operands`` makes x' and W' of the inputs behind the transforms that the layer has already. ``limit`` gives the
    clip of W', ``offset`` moves it before it is rounded, in gaps (with a clip alone). ``outputs`` is what becomes of
    the product before the bias.
    """

    layer: LayerProblem
    bias: Float[Tensor, "rows"] | None
    operands: Operands
    limit: Callable[[Float[Tensor, "rows cols"]], Float[Tensor, "rows cols"]] | None = None
    offset: Float[Tensor, "rows cols"] | None = None
    outputs: Callable[[Float[Tensor, "... rows"]], Float[Tensor, "... rows"]] | None = None

    def __call__(self, inputs: Float[Tensor, "... cols"]) -> Float[Tensor, "... rows"]:
        """Return the outputs; gradients pass.

        Special values and errors: as :func:`microscale.kernels.ops.fake_quantize`.
        """
        turned, weight = self.operands(apply_transforms(inputs, self.layer.transforms))
        rounded = self._rounded(weight)
        turned = straight_through_inputs(turned, self.layer.activations)
        if self.outputs is None:
            return functional.linear(turned, rounded, self.bias)
        outputs = self.outputs(functional.linear(turned, rounded))
        return outputs if self.bias is None else outputs + self.bias

    def _rounded(self, weight: Tensor) -> Tensor:
        if self.limit is None:
            return rounded_straight_through(weight, self.layer.format)
        limit = self.limit(weight)
        if self.offset is None:
            return clipped_rounding(weight, limit, self.layer.format)
        return tuned_rounding(weight, limit, self.offset, self.layer.format)
