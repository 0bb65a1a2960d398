"""Weights seen as [out, in], whatever module holds them: what is written there changes what the module computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from microscale.errors import ModelError
from microscale.kernels import quantize
from microscale.nn.linear import QuantizedLinear
from microscale.recipes import matrices
from microscale.recipes.matrices import bias_of, centre_outputs, matrix, multiply_left, multiply_right, scale_inputs


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    found = nn.ModuleDict({"linear": nn.Linear(6, 4), "conv": Conv1D(4, 6), "table": nn.Embedding(6, 4)}).double()
    found["experts"] = nn.ParameterDict({"up": nn.Parameter(randn(3, 4, 6))})
    return found


def output(holder: nn.Module, x: Tensor) -> Tensor:
    """What a module makes of six numbers; a table of one-hot tokens."""
    if isinstance(holder, nn.Embedding):
        return x @ holder.weight
    if isinstance(holder, nn.ParameterDict):
        return torch.einsum("eoi,bi->ebo", holder["up"], x)
    return holder(x)


NAMES = ["linear.weight", "conv.weight", "table.weight", "experts.up"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_matrix_maps_a_column_to_what_the_module_computes(name: str) -> None:
    found, x = model(), randn(5, 6, seed=1)
    holder = found[name.partition(".")[0]]
    bias = bias_of(found, name)
    expected = x @ matrix(found, name).mT + (0 if bias is None else bias)
    torch.testing.assert_close(output(holder, x), expected)
    assert (bias is None) == (name in ("table.weight", "experts.up"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 2, 4096])
@torch.no_grad()
def test_products_change_the_module_in_place(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """W S R x is the module on S R x, and L W x is L times what it gives; in pieces or at once."""
    monkeypatch.setattr(matrices, "CHUNK", chunk)
    found, before, x = model(), model(), randn(5, 6, seed=1)
    scale, right, left = randn(6, seed=2), randn(6, 6, seed=3), randn(4, 4, seed=4)
    bias = bias_of(found, name)
    if bias is not None:
        bias.zero_()
        bias_of(before, name).zero_()  # type: ignore[union-attr]
    weight, holder = matrix(found, name), name.partition(".")[0]
    scale_inputs(weight, scale)
    torch.testing.assert_close(output(found[holder], x), output(before[holder], x * scale))
    multiply_right(weight, right)
    torch.testing.assert_close(output(found[holder], x), output(before[holder], x @ right.T * scale))
    multiply_left(weight, left)
    torch.testing.assert_close(output(found[holder], x), output(before[holder], x @ right.T * scale) @ left.T)
    centre_outputs(weight)
    torch.testing.assert_close(
        output(found[holder], x).mean(-1), torch.zeros(output(found[holder], x).shape[:-1]).double()
    )


@torch.no_grad()
def test_a_narrow_weight_is_rounded_once() -> None:
    """The product of a bfloat16 weight is taken in float64 and rounded at the end."""
    weight = randn(3, 6).to(torch.bfloat16)
    factor = randn(6, 6, seed=1)
    expected = (weight.double() @ factor).to(torch.bfloat16)
    multiply_right(weight, factor)
    assert torch.equal(weight, expected)


def test_what_is_no_float_weight_any_more() -> None:
    found = nn.ModuleDict({"linear": QuantizedLinear.from_tensor(quantize(torch.ones(4, 32), "mxfp4"))})
    with pytest.raises(
        ModelError, match=r"linear\.weight is no float weight of QuantizedLinear; fold before the layers"
    ):
        matrix(found, "linear.weight")
    with pytest.raises(ModelError, match=r"linear\.scale is no float weight of Linear"):
        matrix(nn.ModuleDict({"linear": nn.Linear(2, 2)}), "linear.scale")
