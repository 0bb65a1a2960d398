"""The reference's packing: any layout to any other by way of row_major, whoever owns them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from microscale.formats import Format
from microscale.kernels import quantize, reference
from microscale.layouts import LAYOUTS, Layout, add_layout, part_specs, remove_layout
from vectors.inputs import same_bits


@pytest.fixture
def reversed_rows() -> Iterator[str]:
    """A layout with all rows upside down."""

    def flip(parts: Mapping[str, Tensor], fmt: Format, shape: tuple[int, ...]) -> dict[str, Tensor]:
        del fmt, shape
        return {name: part.flip(0) if part.dim() > 1 else part for name, part in parts.items()}

    layout = Layout(name="upside_down", part_specs=part_specs, refusal=lambda fmt, shape: None, pack=flip, unpack=flip)
    add_layout(layout)
    yield layout.name
    remove_layout(layout.name)


@pytest.mark.parametrize("spec", ["mxfp4", "nvfp4", "mxfp4_plus", "int4_asym"])
def test_from_any_layout_to_any_other(spec: str, reversed_rows: str) -> None:
    values = torch.randn(21, 70, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    tensor = quantize(values, spec)
    turned = reference.to_layout(tensor, reversed_rows)
    assert same_bits(turned.parts["scale"], tensor.parts["scale"].flip(0))
    assert (turned.layout, turned.shape, turned.dtype, turned.format) == (
        reversed_rows, (21, 70), torch.bfloat16, tensor.format,
    )  # fmt: skip
    direct, over = reference.to_layout(tensor, "rows16"), reference.to_layout(turned, "rows16")
    assert set(over.parts) == set(LAYOUTS["rows16"].part_specs(tensor.format, (21, 70)))
    assert all(same_bits(part, direct.parts[name]) for name, part in over.parts.items())
    back = reference.to_layout(over, "row_major")
    assert all(same_bits(part, tensor.parts[name]) for name, part in back.parts.items())
