"""Golden vectors of microsoft/microxcaling: 6 formats, 3 roundings, 4 inputs, bit for bit (needs the shared data)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from microscale.kernels import fake_quantize

ELEMENTS = {
    "fp8_e4m3": "e4m3",
    "fp8_e5m2": "e5m2",
    "fp6_e2m3": "e2m3",
    "fp6_e3m2": "e3m2",
    "fp4_e2m1": "e2m1",
    "int8": "int8",
}
ROUNDINGS = {"even": "nearest_even", "nearest": "nearest_away", "floor": "toward_zero"}
INPUTS = ("weights", "gauss_outliers", "wide", "corners")


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_microxcaling(shared_dir: Path, element: str, rounding: str, name: str) -> None:
    with np.load(shared_dir / "vectors" / "microxcaling_block32_golden.npz") as golden:
        values = torch.from_numpy(golden[f"in_{name}"])
        expected = torch.from_numpy(golden[f"{element}|{rounding}|{name}"])
    got = fake_quantize(values, f"{ELEMENTS[element]}/32:e8m0:floor:{ROUNDINGS[rounding]}")
    assert torch.equal(got.isnan(), expected.isnan())
    is_number = ~expected.isnan()
    assert torch.equal(got[is_number], expected[is_number])
