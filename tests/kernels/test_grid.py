"""ElementGrid: the numbers of fixed scales are those of quantize, for every format that has a grid."""

from __future__ import annotations

import pytest
import torch

from format_specs import SPECS
from method_problems import random
from microscale.errors import FormatError
from microscale.formats import parse_format
from microscale.kernels import dequantize, quantize
from microscale.kernels.grid import ElementGrid, grid_refusal, make_grid
from small_models import same_bits

GRIDS = [spec for spec in SPECS if grid_refusal(parse_format(spec)) is None]
SHAPES = [(24, 96), (3, 80), (1, 7), (5, 1)]


def values(rows: int, cols: int) -> torch.Tensor:
    """Return numbers of all sizes: zero rows, an outlier, tiny ones, a negative zero."""
    weight = random(rows, cols)
    weight[0] = 0.0
    weight[-1] *= 1e-30
    weight[rows // 2, cols // 2] = -37.0
    weight[rows // 2, 0] = -0.0
    return weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", GRIDS)
def test_it_quantizes_as_the_kernel_does(spec: str, shape: tuple[int, int]) -> None:
    weight = values(*shape)
    before = weight.clone()
    found, expected = ElementGrid(weight, parse_format(spec)).tensor(weight), quantize(weight, spec)
    assert (found.format, found.shape, found.dtype) == (expected.format, expected.shape, expected.dtype)
    assert set(found.parts) == set(expected.parts)
    for name, part in expected.parts.items():
        assert same_bits(found.parts[name], part), name
    assert same_bits(weight, before)


@pytest.mark.parametrize("spec", GRIDS)
def test_rounded_columns_are_the_numbers_of_the_tensor(spec: str) -> None:
    """Columns rounded one by one, from other numbers than the scales, are what the packed tensor holds."""
    weight, others = values(6, 80), random(6, 80, seed=1) * 1.7
    grid = ElementGrid(weight, parse_format(spec))
    columns = torch.cat([grid.round(others[:, i : i + 1], slice(i, i + 1)) for i in range(80)], 1)
    assert torch.equal(columns, dequantize(grid.tensor(others), torch.float32))
    assert torch.equal(columns, dequantize(grid.tensor(columns), torch.float32)), "rounding again must change nothing"


@pytest.mark.parametrize("spec", ["pair(mxfp4,mxfp8,25%)", "mxfp4+sparse2%:fp16", "mxfp4:stochastic"])
def test_formats_without_a_grid_say_why(spec: str) -> None:
    with pytest.raises(FormatError, match="cannot be rounded element by element"):
        ElementGrid(random(4, 64), parse_format(spec))


def test_segments_are_grids_side_by_side() -> None:
    weight, others = random(6, 96), random(6, 96, seed=1) * 1.7
    grid = make_grid(weight, parse_format("segments(mxfp4*32,mxfp6_e2m3*32,mxfp8*32)"))
    parts = [make_grid(weight[:, i : i + 32], parse_format(spec)) for i, spec in ((0, "mxfp4"), (32, "mxfp6_e2m3"))]
    assert torch.equal(
        grid.gap(others)[:, :64], torch.cat([parts[0].gap(others[:, :32]), parts[1].gap(others[:, 32:64])], 1)
    )
    whole = grid.round(others, slice(None))
    assert torch.equal(whole[:, :32], parts[0].round(others[:, :32], slice(None)))
    assert torch.equal(whole[:, 30:40], grid.round(others[:, 30:40], slice(30, 40)))
    assert torch.equal(whole, dequantize(grid.tensor(others), torch.float32))
