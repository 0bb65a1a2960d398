"""The packed linear layer: the numbers of its weight, what runs it, and inputs that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from format_specs import SPECS
from microscale.errors import ShapeError
from microscale.formats import parse_activation, parse_format
from microscale.kernels import Operation, count_executions, dequantize, quantize
from microscale.nn.activation import ActivationQuantizer, observe_activations
from microscale.nn.linear import QuantizedLinear
from microscale.transforms import hadamard_transform, scale_transform
from packed_modules import COLS, ROWS, inputs, packed_linear, weight
from small_models import same_bits


@pytest.mark.parametrize("spec", SPECS)
def test_linear_is_that_of_the_dequantized_weight(spec: str) -> None:
    layer = packed_linear(spec)
    restored = dequantize(quantize(weight(), spec))
    assert same_bits(layer.weight, restored)
    assert layer.bias is not None
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        exact = dequantize(quantize(weight(), spec), dtype)
        expected = functional.linear(inputs(dtype), exact, layer.bias.to(dtype))
        assert same_bits(layer(inputs(dtype)), expected)
    without = packed_linear(spec, bias=False)
    assert without.bias is None
    assert same_bits(without(inputs()), functional.linear(inputs(), restored))


@pytest.mark.parametrize("activations", [None, "mxfp8", "mxfp4", "mxfp4_plus", "nvfp4@static", "nvfp4@ema(0.5)"])
@pytest.mark.parametrize("is_cached", [False, True])
def test_gradients_pass_through_to_the_inputs(activations: str | None, is_cached: bool) -> None:
    """A rounding of the inputs, whatever its range, passes them as if it were not there; the values are rounded."""
    layer = packed_linear("mxfp4")
    if activations is not None:
        layer.activations = ActivationQuantizer(parse_activation(activations))
        with observe_activations(layer):
            layer(inputs(torch.float32))
    if is_cached:
        layer.cache_weight()
    argument = inputs(torch.float32).requires_grad_()
    outputs = layer(argument)
    outputs.sum().backward()
    assert same_bits(outputs.detach(), layer(inputs(torch.float32)))
    assert argument.grad is not None
    expected = dequantize(quantize(weight(), "mxfp4"), torch.float32).sum(0)
    assert torch.allclose(argument.grad, expected.expand_as(argument.grad), rtol=1e-5, atol=1e-5)


def test_a_weight_that_was_unpacked_before_runs_on_the_reference_path() -> None:
    layer = QuantizedLinear.from_tensor(quantize(torch.randn(32, 64), parse_format("mxfp4")))
    layer.cache_weight()
    with count_executions() as counts:
        layer(torch.randn(3, 64))
    assert counts == {(Operation.LINEAR, "reference"): 1}


def test_inputs_of_another_width() -> None:
    with pytest.raises(ShapeError, match=r"\[2, 3, 79\]"):
        packed_linear("mxfp4")(inputs()[..., :79])


@pytest.mark.parametrize("activations", [None, "mxfp8", "nvfp4", "int8/32:fp32:amax"])
@pytest.mark.parametrize("spec", ["mxfp4", "nvfp4", "mxfp4_plus", "int4_asym"])
def test_a_layer_on_meta_gives_shapes(spec: str, activations: str | None) -> None:
    rounding = None if activations is None else parse_activation(activations)
    layer = QuantizedLinear.from_tensor(quantize(torch.ones(48, 64), spec), activations=rounding).to("meta")
    outputs = layer(torch.empty(2, 3, 64, device="meta"))
    assert (outputs.shape, outputs.device.type) == ((2, 3, 48), "meta")


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_weight_is_that_of_the_layers_own_inputs(kind: str) -> None:
    """Transforms and the low-rank side path are in it: a model may multiply by the weight itself."""
    generator = torch.Generator().manual_seed(3)
    factors = (torch.randn(4, COLS, generator=generator), torch.randn(ROWS, 4, generator=generator))
    scale = torch.rand(COLS, generator=generator) + 0.5
    layer = QuantizedLinear.from_tensor(
        quantize(weight(dtype=torch.float32), "mxfp8"),
        kind=kind,
        transforms=[scale_transform(scale), hadamard_transform(COLS, 16)],
        low_rank=factors,
    )
    given = inputs(torch.float32)
    used = layer.weight.T if kind == "linear" else layer.weight
    torch.testing.assert_close(given @ used, layer(given), rtol=1e-4, atol=1e-4)
    packed = dequantize(layer.tensor)
    assert not torch.allclose(given @ packed.T, layer(given), rtol=0.1, atol=0.1), "the packed numbers are others"
