"""compressed-tensors as an oracle: its MXFP4 is ours with rule even, its MXFP8 ours with even(1), its NVFP4 ours.

Bit for bit on finite numbers. compressed-tensors writes +0 for -0 and is undefined on NaN and Inf, so those stay out.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from microscale.formats.codec import decode
from microscale.formats.elements import E4M3
from microscale.kernels import dequantize, fake_quantize, quantize
from microscale.tensor import QuantizedTensor
from vectors.inputs import FLOAT32_MAX

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

ROWS, COLS = 96, 256
CASES = {
    "MXFP4": ("mxfp4-pack-quantized", "mxfp4:even", "weight_packed"),
    "MXFP8": ("mxfp8-quantized", "mxfp8:even(1)", "weight"),
    "NVFP4A16": ("nvfp4-pack-quantized", "nvfp4", "weight_packed"),
}
KINDS = ("gauss", "wide", "blocks_from_2^-120_to_2^120", "bits", "ties", "edges")


def weights(kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Finite weights without -0."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(ROWS, COLS, generator=generator)

    def integers(low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    match kind:
        case "gauss":
            values = values * 0.02
        case "wide":
            values = values * torch.exp2(integers(-60, 60, (ROWS, COLS)).float())
        case "bits":
            values = integers(-(2**31), 2**31, (ROWS, COLS)).to(torch.int32).view(torch.float32)
            values = torch.where(values.isfinite() & (values.abs() < 1.7e38), values, 0.0)
        case "ties":
            values = integers(-64, 65, (ROWS, COLS)).float() / 8 * torch.exp2(integers(-4, 4, (ROWS, 1)).float())
        case "edges":
            values = values * 0.02
            for row, number in enumerate((0.0, 1e-45, -1e-39, 2.0**-126, 2.0**-133, 448, 447, 449, 6, 7, 6.96, 1.7e38)):
                values[row] = number
            values[20, 3] = 2.9e38
            values[21, ::32] = 4.0
        case _:
            exponents = integers(-120, 120, (ROWS, COLS // 32, 1)).float()
            values = (values.unflatten(-1, (-1, 32)).clamp(-3, 3) / 3.01 * torch.exp2(exponents)).flatten(-2)
    return (values.clamp(-FLOAT32_MAX, FLOAT32_MAX).to(dtype).float() + 0.0).to(dtype)


def compressed(weight: torch.Tensor, preset: str, layout: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scheme = preset_name_to_scheme(preset, ["Linear"])
    arguments: Any = scheme.weights
    blocks = weight.unflatten(-1, (-1, arguments.group_size))
    global_scale = generate_gparam(weight.amin(), weight.amax()) if preset.startswith("NVFP4") else None
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments, global_scale=global_scale)
    state = {"weight": weight.clone(), "weight_scale": scale}
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
    compressor: Any = BaseCompressor.get_value_from_registry(layout)
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(stored, scheme)["weight"]


def without_minus_zero(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes with -0 as +0: both keep the sign of what rounds to zero, theirs not where the quotient underflows."""
    if bits == 8:
        return torch.where(packed == 0x80, 0, packed)
    low, high = packed & 0xF, packed >> 4
    return torch.where(low == 8, 0, low) | torch.where(high == 8, 0, high) << 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("preset", ["MXFP4", "MXFP8"])
def test_mx_codes_scales_and_values(preset: str, dtype: torch.dtype, kind: str) -> None:
    layout, spec, codes = CASES[preset]
    weight = weights(kind, dtype)
    stored, restored = compressed(weight, preset, layout)
    ours = quantize(weight, spec)
    assert torch.equal(ours.parts["scale"], stored["weight_scale"].reshape(ours.parts["scale"].shape))
    theirs = stored[codes].view(torch.uint8)
    if kind == "bits":
        bits = 4 if preset == "MXFP4" else 8
        assert torch.equal(without_minus_zero(ours.parts["codes"], bits), without_minus_zero(theirs, bits))
    else:
        assert torch.equal(ours.parts["codes"], theirs)
    values = dequantize(ours, torch.bfloat16)
    assert torch.equal(values, restored)


@pytest.mark.parametrize("kind", ["gauss", "ties", "wide"])
def test_nvfp4_of_float32_weights(kind: str) -> None:
    """In float32 both take the same steps; a block whose scale rounds to 0 gets 0.125 there and zeros here."""
    layout, spec, codes = CASES["NVFP4A16"]
    weight = weights(kind, torch.float32)
    stored, restored = compressed(weight, "NVFP4A16", layout)
    ours = quantize(weight, spec)
    assert torch.equal(ours.parts["tensor_inv_scale"], stored["weight_global_scale"].reshape(1))
    theirs = stored["weight_scale"].view(torch.uint8)
    is_zero = ours.parts["scale"] == 0
    assert torch.equal(ours.parts["scale"][~is_zero], theirs[~is_zero])
    keep = (~is_zero).repeat_interleave(16, dim=1)
    packed = (~is_zero).repeat_interleave(8, dim=1)
    assert torch.equal(ours.parts["codes"][packed], stored[codes][packed])
    assert torch.equal(dequantize(ours, torch.bfloat16)[keep], restored[keep])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_nvfp4_values_given_their_scales(dtype: torch.dtype, kind: str) -> None:
    """Any NVFP4 file of theirs reads to the same bits here: factor = scale / global scale, in float32."""
    layout, spec, codes = CASES["NVFP4A16"]
    stored, restored = compressed(weights(kind, dtype), "NVFP4A16", layout)
    template = quantize(torch.ones(ROWS, COLS), spec)
    parts = {
        "codes": stored[codes],
        "scale": stored["weight_scale"].view(torch.uint8),
        "tensor_inv_scale": stored["weight_global_scale"].reshape(1).float(),
    }
    ours = QuantizedTensor(format=template.format, shape=(ROWS, COLS), dtype=torch.bfloat16, parts=parts)
    assert torch.equal(dequantize(ours), restored)


def test_nvfp4_of_bfloat16_weights_differs_by_their_rounding_of_the_global_scale_only() -> None:
    weight = weights("gauss", torch.bfloat16)
    stored, _ = compressed(weight, "NVFP4A16", CASES["NVFP4A16"][0])
    ours = quantize(weight, "nvfp4")
    ratio = ours.parts["tensor_inv_scale"].item() / stored["weight_global_scale"].item()
    assert ratio == pytest.approx(1.0, rel=2**-7)
    scales, theirs = (decode(s, E4M3) for s in (ours.parts["scale"], stored["weight_scale"].view(torch.uint8)))
    assert bool(((scales - theirs).abs() <= theirs / 8).all())


def test_the_largest_numbers_where_they_give_up() -> None:
    """From 1.75 * 2^127 on compressed-tensors has no scale; ours goes on and only the product overflows."""
    block = torch.zeros(32)
    block[0] = 3e38
    packed = quantize(block, "mxfp4:even")
    assert packed.parts["scale"].item() == 253
    assert fake_quantize(block, "mxfp4:even")[0].item() == math.inf
