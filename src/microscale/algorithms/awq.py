"""AWQ: scale up the weights of the channels with the largest inputs, by a search against the format at hand.

The clipping half of AWQ is the step ``rtn`` with ``weighted``, which errs by the same second moments.

Source: arXiv 2306.00978, section 3.2: s = mean|x|^alpha, alpha from a grid over [0, 1], by the error of the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.algorithms.contract import FoldStep, GroupProblem
from microscale.algorithms.objective import group_error
from microscale.calibration.statistics import Wanted
from microscale.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq(FoldStep):
    """x -> x / s, W -> W * s with s from a grid of ``steps`` exponents."""

    name: ClassVar[str] = "awq"
    source: ClassVar[str] = "arXiv 2306.00978 section 3.2"

    steps: int = 20

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise RecipeError(f"awq: steps is at least 1, got {self.steps}")

    @property
    def wanted(self) -> Wanted | None:
        """Channel magnitudes and rows of the input."""
        return Wanted.MEAN_ABS | Wanted.SAMPLE

    def input_scale(self, group: GroupProblem) -> Float[Tensor, "cols"]:
        """Return the best s; alpha = 0 (no scaling) is among the candidates, so the result is never worse."""
        assert group.inputs is not None
        magnitude = group.inputs.require("mean_abs").clamp(min=1e-8)
        best, best_error = torch.ones_like(magnitude), group_error(group, torch.ones_like(magnitude))
        for i in range(1, self.steps + 1):
            scale = magnitude.pow(i / self.steps).clamp(1e-4, 1e4)
            scale = group.share(scale / (scale.amax() * scale.amin()).sqrt())
            error = group_error(group, scale)
            if error < best_error:
                best, best_error = scale, error
        return best
