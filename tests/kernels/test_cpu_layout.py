"""The compiled packing into rows16 gives the bytes of the torch one, on every level and number of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_levels import LEVELS
from microscale.errors import KernelError, LayoutError
from microscale.formats import parse_format
from microscale.kernels import quantize, reference, to_layout
from microscale.kernels.cpu import native
from microscale.kernels.cpu.layout import pack_rows16
from microscale.layouts import LAYOUTS
from microscale.tensor import QuantizedTensor
from small_models import same_tensors
from vectors.inputs import matrices

pytestmark = pytest.mark.skipif(native.NATIVE is None, reason="the compiled kernels are not installed")

SPECS = [
    *("mxfp4", "nvfp4", "mxfp8", "mxfp8_e5m2", "mxfp6_e2m3", "mxint8", "int7/16:fp16", "int5/32:bf16", "int3/128:fp32"),
    *("int2/16:e8m0", "int8/channel:fp32", "e2m1/channel:fp16", "e3m4/64:fp16", "ue4m4/32:fp16"),
    *("int4_asym", "int3/16:fp16:asym", "int2/32:bf16:asym(fp8)", "int5/channel:fp32:asym(fp16)"),
    *("mxfp4_plus", "mxfp6_plus", "mxint8_plus", "nvfp4_plus", "e0m3/32:e8m0:plus", "e2m5/32:e8m0:plus"),
    *("int2/32:e8m0:plus", "int3/16:fp16:plus", "int5/32:e8m0:plus", "int7/16:e8m0:plus"),
    *("mxfp8_plus", "mxfp4_plusplus", "mxfp6_plusplus", "mxfp8_plusplus", "int8/32:e8m0:plusplus"),
    *("e2m1-fn/32:e8m0:plus", "e3m2/32:fp16:plus", "mxfp4_sparse", "nvfp4_plus+sparse1%:fp8"),
]


def differing(tensor: QuantizedTensor) -> list[str]:
    return same_tensors(dict(pack_rows16(tensor).parts), dict(reference.to_layout(tensor, "rows16").parts))


def numbers(rows: int, cols: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, cols, generator=generator) * 2.0 ** torch.randint(
        -20, 20, (rows, 1), generator=generator
    )
    values.view(-1)[: cols // 2] = 0.0
    return values


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("spec", SPECS)
def test_the_bytes_of_the_torch_packing(spec: str, level: str) -> None:
    with native.use_level(level):
        for rows, cols in ((1, 1), (16, 32), (17, 33), (31, 257), (40, 96), (5, 16), (64, 200)):
            assert differing(quantize(numbers(rows, cols), spec)) == [], (rows, cols)


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_hard_numbers(spec: str, data: st.DataObject) -> None:
    values = data.draw(matrices(rows=(1, 35), cols=(1, 140), exponents=(-140, 100)))
    if data.draw(st.booleans()):
        values[0, -1] = float("nan")
    assert differing(quantize(values, spec)) == []


@pytest.mark.parametrize("spec", ["mxfp4_plus", "mxfp8_plusplus", "nvfp4_plus", "mxfp8"])
def test_bytes_that_no_quantization_writes(spec: str) -> None:
    """A file may hold anything: both packings make the same of it, and neither reads past a block."""
    tensor = quantize(numbers(37, 104), spec)
    generator = torch.Generator().manual_seed(0)
    parts = {
        name: torch.randint(0, 256, part.shape, generator=generator, dtype=torch.uint8)
        if part.dtype == torch.uint8
        else part
        for name, part in tensor.parts.items()
    }
    parts["scale"][:, ::2] = 0
    # Places past the columns belong to the padding, which is not kept: there, the largest element is lost in both.
    strange = QuantizedTensor(format=tensor.format, shape=tensor.shape, dtype=tensor.dtype, parts=parts)
    packed, expected = pack_rows16(strange), reference.to_layout(strange, "rows16")
    assert same_tensors({"codes": packed.parts["codes"]}, {"codes": expected.parts["codes"]}) == []


def test_threads_views_and_empty_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = quantize(numbers(200, 96), "mxfp6_plus")
    expected = dict(pack_rows16(tensor).parts)
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "num_threads", lambda threads=threads: threads)
        assert same_tensors(dict(pack_rows16(tensor).parts), expected) == []
    shifted = {}
    for name, part in tensor.parts.items():
        room = torch.zeros(part.numel() + 3, dtype=part.dtype)
        shifted[name] = room[3:].view(part.shape).copy_(part)
    view = QuantizedTensor(format=tensor.format, shape=tensor.shape, dtype=tensor.dtype, parts=shifted)
    assert same_tensors(dict(pack_rows16(view).parts), expected) == []
    fmt = parse_format("mxfp8_plusplus")
    for shape in ((0, 64), (5, 0)):
        specs = LAYOUTS["row_major"].part_specs(fmt, shape)
        parts = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
        empty = QuantizedTensor(format=fmt, shape=shape, dtype=torch.float32, parts=parts)
        assert differing(empty) == []


def test_refusals() -> None:
    with pytest.raises(LayoutError, match="last axis"):
        pack_rows16(quantize(numbers(16, 16), "e4m3/16x16:fp32"))
    tensor = quantize(numbers(16, 32), "mxfp4")
    with pytest.raises(KernelError, match="meta"):
        pack_rows16(tensor.to("meta"))
    with pytest.raises(KernelError, match="rows16"):
        pack_rows16(to_layout(tensor, "rows16"))


def test_to_layout_takes_the_compiled_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = quantize(numbers(16, 32), "mxfp4")
    compiled = to_layout(tensor, "rows16")
    monkeypatch.setattr(native, "NATIVE", None)
    monkeypatch.setattr(native, "UNAVAILABLE", "no compiler was there")
    assert same_tensors(dict(to_layout(tensor, "rows16").parts), dict(compiled.parts)) == []
    with pytest.raises(KernelError, match="no compiler"):
        pack_rows16(tensor)
