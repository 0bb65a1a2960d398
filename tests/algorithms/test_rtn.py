"""Round-to-nearest: the baseline method."""

from __future__ import annotations

import pytest
import torch

from microscale.algorithms.contract import LayerProblem
from microscale.algorithms.pipeline import parse_method
from microscale.errors import DtypeError, NonFiniteError, ShapeError
from microscale.formats import NAMED_FORMATS, Format, parse_format
from microscale.kernels import dequantize, quantize
from microscale.tensor import QuantizedTensor
from small_models import same_bits


def weight(rows: int = 24, cols: int = 96) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def rtn(values: torch.Tensor, fmt: Format, name: str = "layer") -> QuantizedTensor:
    layer = LayerProblem(name=name, weight=values, format=fmt, activations=None, dtype=values.dtype)
    return parse_method("rtn").rounding.quantize(layer)


@pytest.mark.parametrize("name", NAMED_FORMATS)
@pytest.mark.parametrize("shape", [(24, 96), (1, 7), (3, 33), (5, 1)])
def test_it_is_the_kernel_and_keeps_its_input(name: str, shape: tuple[int, int]) -> None:
    fmt = NAMED_FORMATS[name].format
    values = weight(*shape)
    before = values.clone()
    found, expected = rtn(values, fmt), quantize(values, fmt)
    assert found.format == fmt and found.shape == shape and found.dtype == torch.bfloat16
    assert all(same_bits(part, expected.parts[key]) for key, part in found.parts.items())
    assert same_bits(values, before)
    assert all(same_bits(part, rtn(values, fmt).parts[key]) for key, part in found.parts.items())


def test_each_element_of_mxfp4_is_the_nearest_value() -> None:
    """By definition: no other code of the block's scale is nearer."""
    values = weight().to(torch.float32)
    packed = rtn(values, parse_format("mxfp4"))
    restored = dequantize(packed)
    scale = torch.pow(2.0, packed.parts["scale"].to(torch.float32) - 127).repeat_interleave(32, dim=1)
    grid = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = torch.cat([grid, -grid])
    best = (values.unsqueeze(-1) - grid * scale.unsqueeze(-1)).abs().amin(-1)
    assert torch.equal((values - restored).abs(), best)


def test_errors_name_the_weight() -> None:
    bad = weight()
    bad[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"a\.b\.weight"):
        rtn(bad, parse_format("mxfp4:nan_raise"), name="a.b")
    with pytest.raises(DtypeError, match=r"a\.b\.weight"):
        rtn(weight().to(torch.float64), parse_format("mxfp4"), name="a.b")
    with pytest.raises(ShapeError, match=r"a\.b\.weight"):
        rtn(weight(0, 96), parse_format("mxfp4"), name="a.b")
