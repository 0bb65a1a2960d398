"""QuantizedTensor: it accepts exactly the parts of its format and shape; size, device, row selection."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from microscale.errors import DtypeError, RowError, ShapeError
from microscale.formats import NAMED_FORMATS, parse_format
from microscale.kernels import dequantize, quantize, to_layout
from microscale.layouts import part_specs
from microscale.tensor import QuantizedTensor


def make(spec: str, shape: tuple[int, ...]) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(1)
    return quantize(torch.randn(shape, generator=generator), spec)


def rebuilt(tensor: QuantizedTensor, **changes: Any) -> QuantizedTensor:
    fields = {"format": tensor.format, "shape": tensor.shape, "dtype": tensor.dtype, "parts": dict(tensor.parts)}
    return QuantizedTensor(**{**fields, **changes})


@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_parts_size_and_shape(name: str) -> None:
    tensor = make(name, (2, 5, 100))
    assert (tensor.rows, tensor.cols, tensor.shape, tensor.dtype) == (10, 100, (2, 5, 100), torch.float32)
    specs = part_specs(tensor.format, tensor.shape)
    assert tensor.num_bytes == sum(spec.num_bytes for spec in specs.values())
    assert tensor.device == torch.device("cpu") == tensor.to("cpu").device
    assert set(tensor.to("cpu").parts) == set(tensor.parts)
    assert all(part.is_contiguous() for part in tensor.parts.values())


def test_missing_unknown_and_wrong_parts() -> None:
    tensor = make("mxfp4_plus", (3, 64))
    without = {name: part for name, part in tensor.parts.items() if name != "index"}
    with pytest.raises(ShapeError, match="index"):
        rebuilt(tensor, parts=without)
    with pytest.raises(ShapeError, match="extra"):
        rebuilt(tensor, parts={**tensor.parts, "extra": torch.zeros(1)})
    with pytest.raises(ShapeError, match=r"'scale'.*shape \[3, 2\], got \[3, 3\]"):
        rebuilt(tensor, parts={**tensor.parts, "scale": torch.zeros(3, 3, dtype=torch.uint8)})
    with pytest.raises(ShapeError, match=r"'codes'"):
        rebuilt(tensor, shape=(3, 96))
    with pytest.raises(DtypeError, match=r"'scale'.*uint8.*int8"):
        rebuilt(tensor, parts={**tensor.parts, "scale": tensor.parts["scale"].to(torch.int8)})
    with pytest.raises(ShapeError, match="scalar"):
        rebuilt(tensor, shape=())
    with pytest.raises(ShapeError, match="parts"):
        rebuilt(tensor, format=parse_format("mxfp4"))


def test_it_is_frozen() -> None:
    tensor = make("mxfp4", (3, 64))
    with pytest.raises(AttributeError):
        tensor.dtype = torch.float16  # type: ignore[misc]


@pytest.mark.parametrize(
    "spec",
    [
        *(name for name in NAMED_FORMATS if name not in ("mxfp4_sparse", "adaptive_2_4")),
        *("int8/channel:fp32", "e2m1/32:e8m0:sub(8,2,linear)", "int4/32:fp16:asym(fp16)"),
    ],
)
def test_selected_rows_are_the_rows(spec: str) -> None:
    tensor = make(spec, (7, 100))
    rows = torch.tensor([5, 0, 5, 6])
    chosen = tensor.select_rows(rows)
    assert chosen is not None and chosen.shape == (4, 100)
    assert torch.equal(dequantize(chosen), dequantize(tensor)[rows])
    none = tensor.select_rows(torch.tensor([], dtype=torch.int64))
    assert none is not None and none.shape == (0, 100) and dequantize(none).shape == (0, 100)


GROUPED = ["mxfp4", "mxfp8", "mxfp6_e2m3", "nvfp4", "mxfp4_plus", "int4_asym", "segments(mxfp4*64,mxfp8*36)"]


@pytest.mark.parametrize("spec", GROUPED)
def test_rows_are_selected_from_groups(spec: str) -> None:
    """A layout of 16 rows a group gives the same bytes; rows that only fill up the last group are none."""
    tensor = make(spec, (37, 100))
    grouped = to_layout(tensor, "rows16")
    rows = torch.tensor([36, 0, 15, 16, 36, -1, -37])
    expected, chosen = tensor.select_rows(rows), grouped.select_rows(rows)
    assert expected is not None and chosen is not None and chosen.layout == "row_major"
    assert all(torch.equal(part, chosen.parts[name]) for name, part in expected.parts.items())
    for bad in (37, 40, 48, -38):
        with pytest.raises(RowError):
            grouped.select_rows(torch.tensor([0, bad]))
    none = grouped.select_rows(torch.tensor([], dtype=torch.int64))
    assert none is not None and none.shape == (0, 100)


@pytest.mark.parametrize("spec", ["mxfp4_sparse", "adaptive_2_4", "int8/4x4:fp32", "int8/tensor:fp32"])
def test_rows_that_do_not_stand_alone(spec: str) -> None:
    assert make(spec, (8, 64)).select_rows(torch.tensor([1])) is None
