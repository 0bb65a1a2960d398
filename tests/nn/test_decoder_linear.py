"""Linear layers of a decoder: whatever the call that computes them, the numbers of their modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from microscale.formats import parse_format
from microscale.kernels import Gate
from microscale.kernels.plan import bind
from microscale.nn.decoder_linear import Execution, LinearCalls, rows_stand_alone
from packed_modules import COLS, packed_linear

ROUNDED = (None, "mxfp8", "mxfp4_plus", "nvfp4@ema(0.5)")


def run(calls: LinearCalls, inputs: Tensor) -> Tensor:
    out = torch.full((len(inputs), calls.rows_out), torch.nan)
    bind(calls.calls(inputs, out)).run()
    return out


def rows(count: int = 3) -> Tensor:
    return torch.randn(count, COLS, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("activations", ROUNDED)
@pytest.mark.parametrize("spec", ["mxfp4", "nvfp4", "int4_asym"])
def test_one_layer_and_several_give_what_the_modules_give(spec: str, activations: str | None) -> None:
    layers = [packed_linear(spec, activations=activations, bias=has_bias) for has_bias in (True, False)]
    expected = [layer(rows()) for layer in layers]
    alone = LinearCalls(layers[:1])
    together = LinearCalls(layers)
    torch.testing.assert_close(run(alone, rows()), expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(together, rows()), torch.cat(expected, 1), rtol=1e-4, atol=1e-4)
    assert together.rows_out == 2 * alone.rows_out and len(together.executions) == 2


@pytest.mark.parametrize("gate", [Gate.SILU, Gate.GELU_TANH])
def test_a_gate_multiplies_the_second_half(gate: Gate) -> None:
    layers = [packed_linear("mxfp4"), packed_linear("mxfp8")]
    first, second = (layer(rows()) for layer in layers)
    act = functional.silu(first) if gate is Gate.SILU else functional.gelu(first, approximate="tanh")
    torch.testing.assert_close(run(LinearCalls(layers, gate), rows()), act * second, rtol=1e-4, atol=1e-4)


def test_layers_with_float_weights_are_computed_in_float32() -> None:
    layer = nn.Linear(COLS, 48, dtype=torch.bfloat16)
    calls = LinearCalls([layer])
    assert calls.executions == [Execution.PLAIN] and calls.num_bytes == 2 * 48 * COLS
    expected = functional.linear(rows(), layer.weight.float(), layer.bias.float())
    torch.testing.assert_close(run(calls, rows()), expected.detach(), rtol=1e-5, atol=1e-5)


def test_a_layer_that_adds_a_side_path_runs_as_its_module() -> None:
    layer: Any = packed_linear("mxfp4")
    from microscale.nn.online import LowRank

    generator = torch.Generator().manual_seed(1)
    layer.low_rank = LowRank.from_factors(
        torch.randn(4, COLS, generator=generator), torch.randn(48, 4, generator=generator)
    )
    calls = LinearCalls([layer])
    assert calls.executions == [Execution.MODULE]
    torch.testing.assert_close(run(calls, rows()), layer(rows()))


ALONE = {"mxfp4": True, "mxfp8": True, "nvfp4": False, "mxfp4:stochastic(1)": False, "mxfp4_sparse": False}


@pytest.mark.parametrize("spec", ALONE)
def test_formats_that_round_each_row_by_itself(spec: str) -> None:
    assert rows_stand_alone(parse_format(spec)) is ALONE[spec]
