"""GPTQ: round column after column, and let the columns still to come make up for the error of each.

The scales are fixed first, from the weight as it is (static act-order of MR-GPTQ: columns are visited by falling
mean square of their input, and stand where they stood). Any format with a grid of fixed scales works: the largest
element of an MX+ block is chosen before the first error is fed back.

Source: arXiv 2210.17323 (GPTQ), algorithm 1; arXiv 2509.23202 (static act-order, dampening 1e-2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microscale.algorithms.contract import LayerProblem, RoundStep, clipped
from microscale.algorithms.rtn import idle_search, search_clip
from microscale.calibration.statistics import Wanted
from microscale.errors import CalibrationError, RecipeError
from microscale.formats import ActivationSpec, Format
from microscale.kernels.grid import Grid, grid_refusal, make_grid
from microscale.tensor import QuantizedTensor

PANEL = 128
"""Columns whose feedback to the columns behind them is summed up in one matrix product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq(RoundStep):
    """Error feedback by the second moment of the inputs.

    ``damp`` is added to the diagonal as a share of its mean; ``order`` visits the columns of the largest inputs first;
    ``search`` takes the scales that :func:`~microscale.algorithms.rtn.search_clip` finds.
    """

    name: ClassVar[str] = "gptq"
    source: ClassVar[str] = "arXiv 2210.17323 algorithm 1"

    damp: float = 0.01
    order: bool = True
    search: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.damp < math.inf:
            raise RecipeError(f"gptq: damp is a finite number of at least 0, got {self.damp:g}")

    @property
    def wanted(self) -> Wanted | None:
        """The second moment of the inputs."""
        return Wanted.SECOND_MOMENT

    def refusal(self, fmt: Format, activations: ActivationSpec | None) -> str | None:
        """Refuse formats whose grid is not fixed by scales."""
        return grid_refusal(fmt)

    def idleness(self, fmt: Format, activations: ActivationSpec | None) -> str | None:
        """Say where the search finds no rows of blocks to search in."""
        return idle_search(fmt) if self.search else None

    def quantize(self, layer: LayerProblem) -> QuantizedTensor:
        """Quantize; a layer that no token reached is rounded to nearest.

        Raises:
            CalibrationError: a second moment that is not finite, or not positive definite after dampening.
            FormatError: a format without a fixed grid.
        """
        weight, moment = layer.target, layer.second_moment
        scaling = clipped(weight, layer)
        if self.search:
            columns = None if moment is None else moment.diagonal()
            clip = search_clip(scaling, layer.format, columns)
            scaling = scaling if clip is None else torch.clamp(scaling, -clip, clip)
        grid = make_grid(scaling, layer.format, dtype=layer.dtype)
        if moment is None:
            return grid.tensor(weight)
        diagonal = moment.diagonal()
        order = torch.argsort(diagonal, descending=True, stable=True)
        if not self.order:
            order = torch.arange(diagonal.numel(), device=diagonal.device)
        factor = inverse_factor(moment[order][:, order], self.damp, layer.name)
        return grid.tensor(feed_back(weight, grid, order, factor))


def inverse_factor(moment: Float[Tensor, "cols cols"], damp: float, name: str) -> Float[Tensor, "cols cols"]:
    """Return the upper Cholesky factor of the inverse of the dampened second moment.

    Columns that saw no input get a diagonal of the mean, so that they neither feed errors nor take any.

    Raises:
        CalibrationError: not finite, or not positive definite even with a hundred times the dampening.
    """
    if not bool(torch.isfinite(moment).all()):
        raise CalibrationError(
            f"{name}: the second moment of the inputs is not finite; are there NaN in the activations?"
        )
    wide = moment.to(torch.float64)
    mean = float(wide.diagonal().mean())
    is_dead = wide.diagonal() == 0
    wide = wide + torch.diag(is_dead.to(wide.dtype) * (mean or 1.0))
    for boost in (1, 10, 100):
        dampened = wide + torch.eye(wide.shape[0], dtype=wide.dtype, device=wide.device) * (
            damp * boost * (mean or 1.0)
        )
        lower, problem = torch.linalg.cholesky_ex(dampened)
        if int(problem) == 0:
            inverse = torch.cholesky_inverse(lower)
            upper, problem = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(problem) == 0:
                return upper.to(torch.float32)
    raise CalibrationError(
        f"{name}: the second moment of the inputs is singular even with a dampening of {damp * 100:g};"
        " raise damp, or give more calibration text"
    )


def feed_back(
    weight: Float[Tensor, "rows cols"], grid: Grid, order: Int[Tensor, "cols"], factor: Float[Tensor, "cols cols"]
) -> Float[Tensor, "rows cols"]:
    """Return the rounded weight; column order[i] is rounded as the i-th, after the errors of those before it."""
    rest = weight[:, order].clone()
    rounded = torch.empty_like(weight)
    places = order.tolist()
    for start in range(0, len(places), PANEL):
        stop = min(start + PANEL, len(places))
        errors = torch.empty(weight.shape[0], stop - start, dtype=torch.float32, device=weight.device)
        panel = rest[:, start:stop].T.contiguous()  # columns as rows: each is touched once for every one before it
        own = factor[start:stop, start:stop]
        for i in range(stop - start):
            place = places[start + i]
            column = panel[i].unsqueeze(1)
            value = grid.round(column, slice(place, place + 1))
            rounded[:, place] = value.squeeze(1)
            error = (column - value).squeeze(1) / own[i, i]
            errors[:, i] = error
            panel[i + 1 :] -= own[i, i + 1 :].unsqueeze(1) * error
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    return rounded
