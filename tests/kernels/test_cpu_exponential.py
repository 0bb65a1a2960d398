"""The exponential that attention and gates of the compiled kernels compute with, against float64 at every level."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernel_levels import LEVELS
from microscale.kernels.cpu import native

pytestmark = pytest.mark.skipif(native.NATIVE is None, reason="the compiled kernels are not installed")

EXPONENTIAL = 4 * 2.0**-24


def exponential(x: Tensor) -> Tensor:
    assert native.NATIVE is not None
    out = torch.empty_like(x)
    native.NATIVE.exponential(native.level(), x.data_ptr(), out.data_ptr(), x.numel())
    return out


@pytest.mark.parametrize("level", LEVELS)
def test_the_exponential(level: str) -> None:
    with native.use_level(level):
        x = torch.cat([torch.linspace(-87.3, 88.72, 200_003), torch.tensor([0.0, -0.0])])
        exact = x.double().exp()
        assert float(((exponential(x).double() - exact) / exact).abs().max()) <= EXPONENTIAL
        x = torch.linspace(-110, -87, 20_003)
        assert float((exponential(x).double() - x.double().exp()).abs().max()) <= 2.0**-149  # a subnormal's step
        special = exponential(torch.tensor([-math.inf, -1e30, -105.0, 88.8, 1e30, math.inf, math.nan]))
    assert special[:6].tolist() == [0.0, 0.0, 0.0, math.inf, math.inf, math.inf] and special[6].isnan()
