"""The records that operations of a decoder take beside tensors."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from microscale.kernels import Gate, dispatch, make_cache


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_bytes_of_a_cache_are_those_of_keys_and_values(stored: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", dispatch.BACKENDS[-1:])
    cache = make_cache(stored, positions=10, kv_heads=3, head_dim=8, length=torch.zeros(1, dtype=torch.int64))
    assert cache.num_bytes == 2 * cache.capacity * 3 * 8 * stored.itemsize and cache.capacity >= 10


@pytest.mark.parametrize("gate", Gate)
def test_gates_are_named_as_in_a_config_of_transformers(gate: Gate) -> None:
    x = torch.linspace(-4, 4, 33)
    expected = x * torch.sigmoid(x) if gate is Gate.SILU else torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(ACT2FN[gate.value](x), expected)
