"""Sizes: each way of counting on layers whose bytes are counted by hand."""

from __future__ import annotations

import torch
from torch import nn

import microscale
from microscale.formats import parse_format
from microscale.nn.linear import QuantizedLinear
from microscale.nn.online import LowRank
from microscale.nn.sizes import Size, file_size, held_size, module_bytes, packed_size, spec_bytes, total_size

PACKED_BYTES = 64 * 64 // 2 + 64 * 2  # codes, and a scale for each block of 32


def packed_layer() -> QuantizedLinear:
    tensor = microscale.quantize_tensor(torch.ones(64, 64), "mxfp4")
    return QuantizedLinear.from_tensor(tensor, bias=torch.zeros(64))


def test_a_packed_layer_counts_what_stays_for_run_time_and_no_bias() -> None:
    layer = packed_layer()
    assert module_bytes(layer) == PACKED_BYTES == spec_bytes(parse_format("mxfp4"), (64, 64))
    layer.low_rank = LowRank(2, 64, 64)
    assert packed_size([layer, nn.Linear(8, 8)]) == Size(num_weights=64 * 64, num_bytes=PACKED_BYTES + 4 * 2 * 128)


def test_a_float_layer_counts_its_weight() -> None:
    assert module_bytes(nn.Linear(8, 4, dtype=torch.bfloat16)) == 8 * 4 * 2


def test_a_file_holds_all_else_in_its_own_dtype() -> None:
    model = nn.Sequential(packed_layer(), nn.Linear(64, 3))
    assert file_size(model, packed_size(model), torch.bfloat16).num_bytes == PACKED_BYTES + (64 + 64 * 3 + 3) * 2


def test_what_is_held_counts_a_shared_weight_once_and_leaves_layers_out() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False), "c": nn.LayerNorm(4)})
    model["b"].weight = model["a"].weight
    assert held_size(model) == Size(num_weights=24, num_bytes=4 * 24)
    assert held_size(model, without=("a",)) == Size(num_weights=8, num_bytes=4 * 8)


def test_sizes_add_up() -> None:
    one = Size(num_weights=10, num_bytes=5)
    assert (one + one).bits_per_weight == 4.0 and total_size(()).bits_per_weight == 0.0
