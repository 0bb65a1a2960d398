"""Rounding by look-up is the reference encoder's rounding, bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from microscale.formats import NAMED_FORMATS, BlockFormat, Extension, Format, Overflow, Rounding, parse_format
from microscale.formats.codec import decode, encode
from microscale.kernels.reference.decode import decode_largest
from microscale.kernels.reference.encode import encode_largest
from microscale.kernels.rounding_table import element_table, largest_table
from small_models import same_bits

CPU = torch.device("cpu")
BLOCK_FORMATS: dict[str, Format] = {
    name: named.format for name, named in NAMED_FORMATS.items() if isinstance(named.format, BlockFormat)
}


def inputs(steps: Tensor, numbers: Tensor) -> Tensor:
    """Steps and numbers with the floats beside them, and floats of every size."""
    edges = torch.cat([steps, numbers])
    edges = torch.cat([edges, torch.nextafter(edges, edges + 1), torch.nextafter(edges, edges - 1)])
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4000, generator=generator) * torch.pow(
        2.0, torch.randint(-30, 30, (4000,), generator=generator)
    )
    extreme = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan])
    return torch.cat([edges, spread, extreme])


def block_format(name: str) -> BlockFormat:
    fmt = BLOCK_FORMATS[name]
    assert isinstance(fmt, BlockFormat)
    return fmt


@pytest.mark.parametrize("rounding", [rounding for rounding in Rounding if rounding is not Rounding.STOCHASTIC])
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_it_is_the_encoder(name: str, rounding: Rounding) -> None:
    fmt = dataclasses.replace(block_format(name), rounding=rounding)
    table = element_table(fmt, CPU)
    if fmt.element.bits > 8:
        assert table is None
        return
    assert table is not None
    values = inputs(table.steps, table.numbers)
    expected = decode(encode(values, fmt.element, rounding=rounding, overflow=fmt.overflow), fmt.element)
    assert same_bits(table(values), expected)


@pytest.mark.parametrize("name", [name for name in BLOCK_FORMATS if block_format(name).extension is not Extension.NONE])
def test_largest_elements_too(name: str) -> None:
    fmt = block_format(name)
    table = largest_table(fmt, CPU)
    values = inputs(table.steps, table.numbers)
    values = values[values != 0]  # a zero is never the largest of a block that has a scale
    values = values[~values.isnan()]
    assert same_bits(table(values), decode_largest(encode_largest(values, fmt), fmt))


def test_overflow_to_nan_has_no_table() -> None:
    """Rounding then falls back from the largest number to NaN, which no rising table says."""
    fmt = parse_format("mxfp8_e4m3")
    assert isinstance(fmt, BlockFormat)
    assert element_table(dataclasses.replace(fmt, overflow=Overflow.NONFINITE), CPU) is None
