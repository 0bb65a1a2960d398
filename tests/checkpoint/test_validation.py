"""check_parts: content that no quantization writes is refused, what one writes never is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from microscale.checkpoint.validation import check_parts
from microscale.errors import CheckpointError
from microscale.formats import NAMED_FORMATS, parse_format
from microscale.kernels import dequantize, quantize
from microscale.tensor import QuantizedTensor

MORE = (
    *("e2m1/24:e8m0:plus", "e2m1/64:e8m0:plusplus", "mxfp4+sparse3%:fp16", "pair(mxfp4_plus,mxfp8_plus,25%)"),
    *("pair(mxfp4,mxfp8,0%)", "pair(mxfp4,mxfp8,100%)", "e4m3/tensor:fp32", "int4/channel:bf16", "e2m1/16x16:e8m0"),
    *("pair(e2m1/24:e8m0:plus,e4m3/24:e8m0:plus,50%)+sparse1%:fp8", "e2m1/32:ue5m3", "e2m1/2:e8m0:plus"),
)


def parts_of(spec: str, rows: int = 6, cols: int = 96, *, scale: float = 1.0) -> dict[str, Tensor]:
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * cols)) * scale
    return dict(quantize(values, spec).parts)


@pytest.mark.parametrize("spec", [*NAMED_FORMATS, *MORE])
@pytest.mark.parametrize("shape", [(6, 96), (1, 1), (5, 33), (3, 200)])
def test_what_quantization_writes_passes(spec: str, shape: tuple[int, int]) -> None:
    for scale in (1.0, 1e-30, 1e30, 0.0):
        check_parts("layer", parse_format(spec), shape, parts_of(spec, *shape, scale=scale))


def test_poisoned_blocks_pass() -> None:
    values = torch.ones(2, 64)
    values[1, 3] = torch.nan
    for spec in ("mxfp4", "nvfp4", "int4_asym", "mxfp4_sparse", "adaptive_2_4", "mxfp4_plusplus"):
        check_parts("layer", parse_format(spec), (2, 64), quantize(values, spec).parts)


def fill(value: float) -> Callable[[Tensor], Tensor]:
    return lambda part: torch.full_like(part, value)


WRONG: list[tuple[str, str, Callable[[Tensor], Tensor], str]] = [
    ("nvfp4", "tensor_inv_scale", fill(0.0), "finite and positive"),
    ("nvfp4", "tensor_inv_scale", fill(-2.0), "finite and positive"),
    ("nvfp4", "tensor_inv_scale", fill(torch.nan), "finite and positive"),
    ("nvfp4", "tensor_inv_scale", fill(torch.inf), "finite and positive"),
    ("int4_asym", "scale", fill(torch.inf), "infinite or negative"),
    ("int4_asym", "scale", fill(-1.0), "infinite or negative"),
    ("int4_asym:nan_raise", "scale", fill(torch.nan), "nan_raise"),
    ("mxfp4:nan_raise", "scale", fill(255), "nan_raise"),
    ("nvfp4:nan_raise", "scale", fill(0x7F), "nan_raise"),
    ("e2m1/24:e8m0:plus", "index", fill(255), "past its block"),
    ("e2m1/48:e8m0:plusplus", "index", fill(255), "past its block"),
    ("mxfp4_sparse", "sparse_offsets", fill(0), "do not ascend"),
    ("mxfp4_sparse", "sparse_offsets", lambda part: part.flip(0), "do not ascend"),
    ("mxfp4_sparse", "sparse_offsets", lambda part: part + 1, "do not ascend"),
    ("mxfp4_sparse", "sparse_offsets", lambda part: part - 1, "do not ascend"),
    ("mxfp4_sparse", "sparse_offsets", fill(2**31 - 1), "do not ascend"),
    ("mxfp4_sparse", "sparse_columns", fill(96), "outside 0..95"),
    ("mxfp4_sparse", "sparse_columns", fill(-1), "outside 0..95"),
    ("mxfp4_sparse", "sparse_scale", fill(torch.inf), "sparse_scale"),
    ("mxfp4_sparse", "sparse_scale", fill(torch.nan), "sparse_scale"),
    ("mxfp4_sparse", "sparse_scale", fill(0.0), "sparse_scale"),
    ("adaptive_2_4", "bitmap", fill(255), "bitmap"),
    ("adaptive_2_4", "bitmap", fill(0), "bitmap"),
    ("adaptive_2_4", "low_scale", fill(torch.inf), "low stream"),
    ("adaptive_2_4", "high_scale", fill(-1.0), "high stream"),
    ("pair(e2m1/24:e8m0:plus,e4m3/24:e8m0:plus,50%)", "high_index", fill(255), "high stream"),
    ("pair(e2m1/24:e8m0:plus,e4m3/24:e8m0:plus,50%)", "low_index", fill(255), "low stream"),
]


@pytest.mark.parametrize(("spec", "part", "change", "words"), WRONG)
def test_what_it_does_not_write_is_refused(
    spec: str, part: str, change: Callable[[Tensor], Tensor], words: str
) -> None:
    parts = parts_of(spec)
    parts[part] = change(parts[part])
    with pytest.raises(CheckpointError, match=words) as caught:
        check_parts("model.layer", parse_format(spec), (6, 96), parts)
    assert "model.layer" in str(caught.value)


@settings(max_examples=150)
@given(spec=st.sampled_from([*NAMED_FORMATS, *MORE]), data=st.data())
def test_noise_is_refused_or_can_be_read(spec: str, data: st.DataObject) -> None:
    """Bytes from anywhere: dequantization of what passes stays inside its tensors and has the right shape."""
    shape = data.draw(st.sampled_from([(6, 96), (3, 33), (1, 1)]))
    fmt = parse_format(spec)
    parts = parts_of(spec, *shape)
    name = data.draw(st.sampled_from(sorted(parts)))
    part = parts[name].contiguous()
    size = part.numel() * part.element_size()
    noise = torch.frombuffer(bytearray(data.draw(st.binary(min_size=size, max_size=size)) or b"\0"), dtype=torch.uint8)
    if size:
        parts[name] = noise.view(part.dtype).reshape(part.shape)
    try:
        check_parts("layer", fmt, shape, parts)
    except CheckpointError:
        return
    restored = dequantize(QuantizedTensor(format=fmt, shape=shape, dtype=torch.float32, parts=parts))
    assert restored.shape == shape
