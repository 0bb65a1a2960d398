"""SmoothQuant: move the spread of the inputs' channels into the weights.

Source: arXiv 2211.10438, equation 4: s_j = max|x_j|^alpha / max|w_j|^(1 - alpha).
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

SEARCHED_ALPHAS = tuple(i / 10 for i in range(11))


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothQuant(FoldStep):
    """x -> x / s, W -> W * s with the exponent ``alpha``, or the best of 0, 0.1 … 1 (``search``).

    With a ``gain`` only those groups are scaled whose output error, both sides rounded to nearest, that divides by at
    least as much: groups with outlier channels that the weights can take over. The others stay as they are, to the bit.
    """

    name: ClassVar[str] = "smoothquant"
    source: ClassVar[str] = "arXiv 2211.10438 equation 4"

    alpha: float = 0.5
    search: bool = False
    gain: float = 0.0

    def __post_init__(self) -> None:
        if self.gain < 0:
            raise RecipeError(f"smoothquant: gain is 0 or more, got {self.gain:g}")
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"smoothquant: alpha is between 0 and 1, got {self.alpha}")

    @property
    def wanted(self) -> Wanted | None:
        """Channel maxima; rows of the input for the search and the gain."""
        return Wanted.SAMPLE if self.search or self.gain else Wanted.RANGE

    def input_scale(self, group: GroupProblem) -> Float[Tensor, "cols"]:
        """Return s; a channel without input or without weights keeps 1."""
        assert group.inputs is not None
        inputs = group.inputs.amax
        weights = torch.stack([layer.weight.abs().amax(0) for layer in group.layers]).amax(0)
        alphas = SEARCHED_ALPHAS if self.search else (self.alpha,)
        candidates = [group.share(smoothing_scale(inputs, weights, alpha)) for alpha in alphas]
        if not self.search and not self.gain:
            return candidates[0]
        errors = [group_error(group, scale) for scale in candidates]
        best = min(range(len(errors)), key=errors.__getitem__)
        none = torch.ones_like(candidates[best])
        is_worth = not self.gain or self.gain * errors[best] <= group_error(group, none)
        return candidates[best] if is_worth else none


def smoothing_scale(
    inputs: Float[Tensor, "cols"], weights: Float[Tensor, "cols"], alpha: float
) -> Float[Tensor, "cols"]:
    """Return inputs^alpha / weights^(1 - alpha), 1 where either is 0, within 1e-5 to 1e5.

    All are divided by the power of two that is nearest to their geometric mean: that changes no power-of-two scale, and
    keeps what is folded into a norm near its old size (the gain of a norm that stores gain - 1 would lose digits).
    """
    scale = inputs.pow(alpha) / weights.clamp(min=1e-12).pow(1 - alpha)
    is_usable = (inputs > 0) & (weights > 0) & torch.isfinite(scale)
    if bool(is_usable.any()):
        scale = scale / scale[is_usable].log2().mean().round().exp2()
    return torch.where(is_usable, scale, 1.0).clamp(1e-5, 1e5)
