"""Working on rows in pieces changes no bit."""

from __future__ import annotations

import sys

import pytest
import torch

from microscale.formats import NAMED_FORMATS, parse_format
from microscale.kernels import dequantize, fake_quantize, quantize

SPECS = [
    *NAMED_FORMATS,
    "e2m1/channel:fp16",
    "e4m3/tensor:fp32",
    "e2m1/3x16:e8m0",
    "mxfp4:stochastic(3)",
    "e2m1/16:e4m3+fp32:threshold(7)",
    "e2m1/16:e4m3+fp32:mse",
    "nvfp4:inf_saturate",
    "int4/32:e4m3+fp32:asym",
]


def values(is_finite: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(23, 72, generator=generator) * torch.logspace(-3, 3, 23).unsqueeze(1)
    if not is_finite:
        rows[2, 5], rows[11, 40], rows[20, 71] = float("nan"), float("inf"), -float("inf")
    return rows.to(torch.bfloat16)


@pytest.mark.parametrize("is_finite", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, spec: str, is_finite: bool) -> None:
    fmt, tensor = parse_format(spec), values(is_finite)
    whole = quantize(tensor, fmt)
    expected = dequantize(whole)
    monkeypatch.setattr(sys.modules["microscale.kernels.reference.quantize"], "PIECE_ELEMENTS", 72 * 4)
    pieces = quantize(tensor, fmt)
    for name, part in whole.parts.items():
        assert torch.equal(pieces.parts[name].view(torch.uint8), part.view(torch.uint8)), name
    torch.testing.assert_close(dequantize(whole), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(fake_quantize(tensor, fmt), expected, rtol=0, atol=0, equal_nan=True)


def test_a_given_amax_is_cut_with_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, fmt = values(True), parse_format("e4m3/channel:fp32")
    amax = torch.linspace(1, 5, 23).unsqueeze(1)
    whole = quantize(tensor, fmt, amax=amax)
    monkeypatch.setattr(sys.modules["microscale.kernels.reference.quantize"], "PIECE_ELEMENTS", 72 * 4)
    pieces = quantize(tensor, fmt, amax=amax)
    assert all(torch.equal(pieces.parts[name], part) for name, part in whole.parts.items())
