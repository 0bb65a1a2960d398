"""What gradients do to a quantized model: its parameters are frozen, and one warning says what else costs speed.

Compiled kernels record no gradients. A model whose embedding still needs one would run on the reference path, hundreds
of times slower, although nobody asked for a gradient. Who does ask still gets it: from an input, or from a parameter
whose ``requires_grad`` was set again.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from microscale.errors import GradientNote
from microscale.formats import Format
from microscale.kernels.backend import Operation
from microscale.kernels.checks import linear_request, records_gradient
from microscale.kernels.dispatch import choose
from microscale.tensor import QuantizedTensor


@dataclass(slots=True)
class ModelWatch:
    """What the layers of one model share: whether the warning was given."""

    has_warned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientWatch:
    """Looks at the inputs of a layer, and warns once for the whole model where a gradient takes its kernel away."""

    layer: str
    model: ModelWatch = field(repr=False)

    def look(self, weight: QuantizedTensor, inputs: Tensor, bias: Tensor | None, activations: Format | None) -> None:
        """Warn where ``linear`` on these would run on another backend without the gradient, unless it was said."""
        if self.model.has_warned or torch.compiler.is_compiling() or not records_gradient(inputs, bias):
            return
        request = linear_request(Operation.LINEAR, inputs, weight, bias, activations)
        slow, fast = choose(request), choose(dataclasses.replace(request, records_gradient=False))
        if slow is fast:
            return
        self.model.has_warned = True
        cause = "input" if inputs.requires_grad else "bias"
        warnings.warn(
            f"the {cause} of {self.layer} needs a gradient: this layer, and each behind it that the gradient reaches,"
            f" runs on the {slow.title} in place of the {fast.title}, which record none. Where none is needed, call the"
            " model in torch.no_grad(), or freeze its parameters",
            GradientNote,
            stacklevel=2,
        )
