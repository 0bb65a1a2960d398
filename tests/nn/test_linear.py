"""The packed linear layer: what runs it."""

from __future__ import annotations

import torch

from microscale.formats import parse_format
from microscale.kernels import Operation, count_executions, quantize
from microscale.nn import QuantizedLinear


def test_a_weight_that_was_unpacked_before_runs_on_the_reference_path() -> None:
    layer = QuantizedLinear.from_tensor(quantize(torch.randn(32, 64), parse_format("mxfp4")))
    layer.cache_weight()
    with count_executions() as counts:
        layer(torch.randn(3, 64))
    assert counts == {(Operation.LINEAR, "reference"): 1}
