"""Round-to-nearest: the baseline method."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from microscale.algorithms.contract import LayerProblem
from microscale.algorithms.pipeline import parse_method
from microscale.algorithms.rtn import Rtn
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


def test_a_weight_of_the_same_format_keeps_its_codes() -> None:
    """Blocks whose largest code is small: other scales mean the same numbers, so that rounding alone loses them."""
    fmt = parse_format("mxfp4")
    parts = {"codes": torch.full((4, 32), 0x11, dtype=torch.uint8), "scale": torch.full((4, 2), 120, dtype=torch.uint8)}
    stored = QuantizedTensor(format=fmt, shape=(4, 64), dtype=torch.float32, parts=parts)
    problem = LayerProblem(
        name="layer", weight=dequantize(stored), format=fmt, activations=None, dtype=torch.bfloat16, stored=stored
    )
    kept = Rtn().quantize(problem)
    assert kept.dtype == torch.bfloat16 and all(torch.equal(kept.parts[name], parts[name]) for name in parts)
    changes: tuple[dict[str, Any], ...] = (
        {"stored": None},
        {"format": parse_format("mxfp4:even")},
        {"weight": dequantize(stored) * 2},
        {"offset": torch.zeros(4, 64)},
        {"clip": torch.full((4, 64), torch.inf)},
    )
    for change in changes:
        other = Rtn().quantize(dataclasses.replace(problem, **change))
        assert not torch.equal(other.parts["scale"], parts["scale"]), change
    assert not torch.equal(Rtn(search=True).quantize(problem).parts["scale"], parts["scale"])


def test_errors_name_the_weight() -> None:
    bad = weight()
    bad[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"a\.b\.weight"):
        rtn(bad, parse_format("mxfp4:nan_raise"), name="a.b")
    with pytest.raises(DtypeError, match=r"a\.b\.weight"):
        rtn(weight().to(torch.float64), parse_format("mxfp4"), name="a.b")
    with pytest.raises(ShapeError, match=r"a\.b\.weight"):
        rtn(weight(0, 96), parse_format("mxfp4"), name="a.b")
