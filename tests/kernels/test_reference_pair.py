"""Pairs: which blocks get the wide format, and that neither stream touches the other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings

from microscale.formats import PairFormat, parse_format
from microscale.kernels import fake_quantize, quantize
from microscale.layouts import unpack_bits
from vectors.inputs import FLOAT32_MAX, matrices, same_bits


@pytest.mark.parametrize(
    "spec", ["pair(mxfp4,mxfp8,25%)", "pair(int2/32:fp16:asym,int4/32:fp16:asym,50%)", "pair(mxfp4_plus,mxint8,10%)"]
)
@settings(max_examples=10, deadline=None)
@given(values=matrices(rows=(1, 4), cols=(1, 130), exponents=(-8, 8)))
def test_pairs_give_the_wide_format_to_the_blocks_that_gain_most(spec: str, values: torch.Tensor) -> None:
    fmt = parse_format(spec)
    assert isinstance(fmt, PairFormat)
    size = fmt.block.size
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % size))
    lines = padded.reshape(-1, size)
    low, high = fake_quantize(lines, fmt.low), fake_quantize(lines, fmt.high)
    gain = (low - lines).double().square().sum(-1) - (high - lines).double().square().sum(-1)
    count = round(fmt.high_percent / 100 * len(lines))
    chosen = sorted(range(len(lines)), key=lambda i: (-gain[i].item(), i))[:count]
    is_high = torch.zeros(len(lines), dtype=torch.bool)
    is_high[chosen] = True
    expected = torch.where(is_high.unsqueeze(-1), high, low).reshape(padded.shape)[:, : values.shape[1]]
    assert same_bits(fake_quantize(values, spec), expected)
    packed = quantize(values, spec)
    grid = padded.shape[1] // size
    assert unpack_bits(packed.parts["bitmap"], 1, grid).flatten().tolist() == is_high.int().tolist()
    for prefix, part, mask in (("low", fmt.low, ~is_high), ("high", fmt.high, is_high)):
        if mask.any():  # all blocks of one format are one row
            for name, stream in quantize(lines[mask].reshape(1, -1), part).parts.items():
                assert same_bits(packed.parts[f"{prefix}_{name}"], stream)


@pytest.mark.parametrize(
    "spec, same_as",
    [
        ("pair(mxfp4,mxfp8,100%)", "mxfp8"),
        ("adaptive_2_4", "int2_asym"),
        *(
            (f"pair(mxfp4,{high},0%)", "mxfp4")
            for high in ("mxfp8", "mxfp8_plusplus", "int4/32:fp16:asym", "mxfp8:mse")
        ),
        *((f"pair(mxfp4,{high},0%)", "mxfp4") for high in ("mxfp8:std", "mxfp8:percentile(50)", "int8/32:fp16:mse")),
        ("pair(mxfp4,e4m3/32:e8m0:sub(8,2,linear):stochastic(3),0%)", "mxfp4"),
    ],
)
def test_pairs_with_an_empty_stream(spec: str, same_as: str) -> None:
    """Half of one block rounds to none: a single block is narrow. Every rule and option copes with no blocks at all."""
    values = torch.randn(1, 32, generator=torch.Generator().manual_seed(2))
    assert same_bits(fake_quantize(values, spec), fake_quantize(values, same_as))


def test_a_poisoned_block_of_a_pair_poisons_no_other() -> None:
    values = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    values[0, 3] = math.nan
    restored = fake_quantize(values, "pair(mxfp4,mxfp8,50%)")
    assert restored[0, :32].isnan().all() and not restored[0, 32:].isnan().any() and not restored[1].isnan().any()


def test_a_block_that_overflows_in_both_formats_does_not_hide_the_others() -> None:
    """Inf - Inf is no gain: a block near the largest float32 must not take the place of a block that gains."""
    values = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    values[0, 0] = FLOAT32_MAX
    packed = quantize(values, "pair(mxfp4:rceil,mxfp8:rceil,50%)")
    assert packed.parts["bitmap"].flatten().tolist()[0] == 0
