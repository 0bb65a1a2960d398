"""Rounding that passes gradients as if it were not there, for methods that learn.

Source: arXiv 1308.3432 (straight-through estimator).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.formats import ActivationSpec, Format
from microscale.kernels import fake_quantize


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, fmt: Format) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return fake_quantize(values.detach(), fmt)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return gradients[0], None


def straight_through(values: Float[Tensor, "..."], fmt: Format) -> Float[Tensor, "..."]:
    """Return the values rounded to the format; the gradient passes unchanged.

    Special values and errors: as :func:`microscale.kernels.ops.fake_quantize`.
    """
    return _StraightThrough.apply(values, fmt)


def straight_through_inputs(inputs: Float[Tensor, "..."], spec: ActivationSpec | None) -> Float[Tensor, "..."]:
    """Return a layer's inputs as it rounds them, the range taken from the tensor at hand; gradients pass."""
    return inputs if spec is None else straight_through(inputs, spec.format)
