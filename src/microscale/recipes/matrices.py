"""Weights seen one way, whatever module holds them, and changed in place.

A matrix is named as in families/: the full name of a parameter. Its view has the shape [..., out, in], so that it maps
a column vector x to W x: a linear layer's weight as it is, Conv1D's transposed, a stack of experts as it is, and an
embedding transposed, for it writes a column for each token.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from microscale.errors import ModelError
from microscale.families.modules import is_transposed

CHUNK = 4096
"""Rows or columns that a product takes at a time, so that the float64 copy of a matrix stays small."""


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """Return one of a module's own parameters, without its gradient, or None."""
    found = dict(module.named_parameters(recurse=False)).get(name)
    return None if found is None else found.detach()


def matrix(model: nn.Module, name: str) -> Float[Tensor, "... out in"]:
    """Return a view of a weight as [..., out, in]; writing to it changes the model.

    Raises:
        ModelError: there is no float parameter of this name, for the layer is quantized already.
    """
    holder_name, _, leaf = name.rpartition(".")
    holder = model.get_submodule(holder_name)
    weight = parameter_of(holder, leaf)
    if weight is None or not weight.is_floating_point():
        raise ModelError(f"{name} is no float weight of {type(holder).__name__}; fold before the layers are quantized")
    return weight.T if is_transposed(holder) or isinstance(holder, nn.Embedding) else weight


def bias_of(model: nn.Module, name: str) -> Float[Tensor, " out"] | None:
    """Return the bias that belongs to a matrix, or None."""
    holder_name, _, leaf = name.rpartition(".")
    return parameter_of(model.get_submodule(holder_name), "bias") if leaf == "weight" else None


def scale_inputs(weight: Float[Tensor, "... out in"], scale: Float[Tensor, " in"]) -> None:
    """W <- W diag(scale)."""
    weight.copy_(weight.to(torch.float64) * scale)


def multiply_right(weight: Float[Tensor, "... out in"], factor: Float[Tensor, "in in"]) -> None:
    """W <- W factor, in float64."""
    for start in range(0, weight.shape[-2], CHUNK):
        rows = weight[..., start : start + CHUNK, :]
        rows.copy_(rows.to(torch.float64) @ factor)


def multiply_left(weight: Float[Tensor, "... out in"], factor: Float[Tensor, "out out"]) -> None:
    """W <- factor W, in float64."""
    for start in range(0, weight.shape[-1], CHUNK):
        cols = weight[..., start : start + CHUNK]
        cols.copy_(factor @ cols.to(torch.float64))


def centre_outputs(weight: Float[Tensor, "... out in"]) -> None:
    """Subtract from each column its mean, so that every output vector has the mean zero."""
    for start in range(0, weight.shape[-1], CHUNK):
        cols = weight[..., start : start + CHUNK]
        wide = cols.to(torch.float64)
        cols.copy_(wide - wide.mean(dim=-2, keepdim=True))
