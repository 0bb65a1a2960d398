"""What the linear kernels are told about a weight: its own memory, and only weights that they can read."""

from __future__ import annotations

import pytest
import torch

from microscale.errors import KernelError
from microscale.formats import parse_format
from microscale.kernels import quantize, to_layout
from microscale.kernels.cpu import native
from microscale.kernels.cpu.weights import pack_weight
from microscale.tensor import QuantizedTensor

pytestmark = pytest.mark.skipif(native.NATIVE is None, reason="the extension is not built")


def weight(spec: str, layout: str = "rows16") -> QuantizedTensor:
    return to_layout(quantize(torch.randn(19, 64, generator=torch.Generator().manual_seed(1)), spec), layout)


@pytest.mark.parametrize("spec", ["mxfp4", "nvfp4", "mxfp4_plus", "int4_asym", "mxfp8", "int8/channel:fp32"])
def test_nothing_is_copied(spec: str) -> None:
    tensor = weight(spec)
    packed = pack_weight(tensor)
    assert (packed.rows, packed.cols, packed.num_bytes) == (19, 64, tensor.num_bytes)
    assert {part.data_ptr() for part in packed.kept} == {part.data_ptr() for part in tensor.parts.values()}


@pytest.mark.parametrize(("element", "dtype"), [("fp8", torch.uint8), ("fp16", torch.float16)])
def test_values_of_a_sparse_table_are_widened_once(element: str, dtype: torch.dtype) -> None:
    tensor = weight(f"mxfp4+sparse5%:{element}")
    assert tensor.parts["sparse_values"].dtype == dtype
    own = {part.data_ptr() for part in tensor.parts.values()}
    (widened,) = (part for part in pack_weight(tensor).kept if part.data_ptr() not in own)
    assert widened.dtype == torch.float32 and widened.numel() == tensor.parts["sparse_values"].numel()


@pytest.mark.parametrize("spec", ["mxfp4", "adaptive_2_4"])
def test_other_layouts_are_refused(spec: str) -> None:
    with pytest.raises(KernelError, match=rf"layout rows16 on the CPU, got {spec} in row_major on cpu; lay the tensor"):
        pack_weight(weight(spec, "row_major"))


def test_other_devices_are_refused() -> None:
    tensor = weight("mxfp4")
    parts = {name: part.to("meta") for name, part in tensor.parts.items()}
    fmt = parse_format("mxfp4")
    moved = QuantizedTensor(format=fmt, shape=tensor.shape, dtype=tensor.dtype, parts=parts, layout="rows16")
    with pytest.raises(KernelError, match="got mxfp4 in rows16 on meta"):
        pack_weight(moved)
