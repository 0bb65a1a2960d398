"""Rounding that passes gradients: the one straight-through estimator of kernels, modules and methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

RoundingFunction = Callable[[Float[Tensor, "..."]], Float[Tensor, "..."]]
"""Of numbers to numbers of the same shape and dtype."""


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rounding: RoundingFunction) -> Tensor:
        return rounding(values.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(values: Float[Tensor, "..."], rounding: RoundingFunction) -> Float[Tensor, "..."]:
    """Return ``rounding(values)``; where autograd records, the gradient passes as if nothing was rounded.

    A graph that is traced by torch.compile records none.

    Special values and errors: those of the rounding; the gradient of a number that became NaN passes too.

    Source: arXiv 1308.3432 (straight-through estimator).
    """
    is_recorded = torch.is_grad_enabled() and values.requires_grad and not torch.compiler.is_compiling()
    return _StraightThrough.apply(values, rounding) if is_recorded else rounding(values)
