"""The words of GPTQ, AWQ and bitsandbytes files, by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from microscale.checkpoint.float_packed import awq_weights, bitsandbytes_weights, gptq_weights, state_shape
from microscale.checkpoint.schema import TensorInfo
from microscale.errors import CheckpointError


def infos(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(dtype=tensor.dtype, shape=tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_gptq_stores_zero_points_less_one_and_lets_them_wrap() -> None:
    tensors = {
        "x.qweight": torch.tensor([[0x76543210, 0x11111111]], dtype=torch.int32),
        "x.qzeros": torch.tensor([[0x000000F2]], dtype=torch.int32),  # 2 + 1 = 3 and 15 + 1 = 0
        "x.scales": torch.tensor([[0.5, 2.0]], dtype=torch.float16),
    }
    for form, expected in (("gptq", [[-1.5, 2.0], [2.0, 2.0]]), ("gptq_v2", [[-1.0, 2.5], [-28.0, -28.0]])):
        found = gptq_weights(infos(tensors), {"bits": 4, "checkpoint_format": form})["x.weight"]
        assert found.shape == (2, 8)
        assert found.make(tensors.__getitem__)[:, [0, 7]].tolist() == expected
    with pytest.raises(CheckpointError, match="3 bits"):
        gptq_weights(infos(tensors), {"bits": 3})
    del tensors["x.scales"]
    with pytest.raises(CheckpointError, match=r"x\.scales"):
        gptq_weights(infos(tensors), {"bits": 4})


def test_awq_has_an_order_of_its_own() -> None:
    """The values of rows 0 2 4 6 1 3 5 7 lie from the lowest four bits up."""
    tensors = {
        "x.qweight": torch.tensor([[0x75316420]], dtype=torch.int32),
        "x.qzeros": torch.tensor([[0]], dtype=torch.int32),
        "x.scales": torch.ones(1, 8, dtype=torch.float16),
    }
    found = awq_weights(infos(tensors), {"version": "GEMM", "bits": 4})["x.weight"]
    assert found.shape == (8, 1) and found.make(tensors.__getitem__).flatten().tolist() == list(range(8))
    with pytest.raises(CheckpointError, match="gemv"):
        awq_weights(infos(tensors), {"version": "gemv"})


def state(**fields: Any) -> Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def test_bitsandbytes_has_the_first_value_in_the_high_bits() -> None:
    name = "x.weight.quant_state.bitsandbytes__fp4"
    tensors = {
        "x.weight": torch.tensor([[0x12], [0x30]], dtype=torch.uint8),
        "x.weight.absmax": torch.tensor([2.0, 10.0]),
        "x.weight.quant_map": torch.arange(16.0),
        name: state(shape=[2, 2], blocksize=2, quant_type="fp4"),
    }
    (found,) = bitsandbytes_weights(infos(tensors), {}).values()
    assert state_shape(tensors.__getitem__, found) == (2, 2)
    assert found.make(tensors.__getitem__).tolist() == [[2.0, 4.0], [30.0, 0.0]]
    tensors[name] = state(shape=[20, 20], blocksize=2)
    with pytest.raises(CheckpointError, match="too small"):
        found.make(tensors.__getitem__)
    tensors[name] = torch.tensor([1, 2, 255], dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="no state"):
        found.make(tensors.__getitem__)
