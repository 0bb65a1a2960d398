"""The operations as they are called: through the dispatcher, with the results and refusals of their contracts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch.nn import functional

from microscale.errors import DtypeError, ShapeError
from microscale.formats import parse_format
from microscale.kernels import (
    dequantize,
    fake_quantize,
    gather_quantize,
    hadamard,
    hadamard_quantize,
    linear,
    linear_mixed,
    quantize,
    reference,
    rms_norm,
    rms_norm_quantize,
    silu_mul,
    silu_mul_quantize,
)
from microscale.tensor import QuantizedTensor
from vectors.inputs import same_bits


@pytest.mark.parametrize(
    "spec", ["mxfp4", "mxfp8", "nvfp4", "mxfp4_plus", "int4_asym", "mxfp4_sparse", "adaptive_2_4", "e4m3/16x16:fp32"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_a_product_with_the_decoded_weight(spec: str, dtype: torch.dtype) -> None:
    """Any order of the sum stays within k * u * sum |x| |w| of the exact one, and one rounding of the result."""
    generator = torch.Generator().manual_seed(8)
    weight = quantize(torch.randn(48, 96, generator=generator), spec)
    inputs = torch.randn(2, 5, 96, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    values = dequantize(weight, dtype).double()
    expected = inputs.double() @ values.T
    bound = inputs.double().abs() @ values.abs().T
    unit = torch.finfo(torch.float32).eps / 2
    for with_bias in (None, bias):
        got = linear(inputs, weight, with_bias)
        assert (got.shape, got.dtype) == ((2, 5, 48), dtype)
        wanted = expected if with_bias is None else expected + bias.double()
        size = bound if with_bias is None else bound + bias.double().abs()
        rounding = wanted.abs() * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
        assert bool(((got.double() - wanted).abs() <= size * unit * (96 + 2) + rounding).all())
    assert torch.equal(linear(inputs[0, 0], weight), linear(inputs[0, :1], weight)[0]) or dtype == torch.float32


def test_linear_refuses_shapes_that_do_not_fit() -> None:
    weight = quantize(torch.randn(4, 12), "mxfp4")
    with pytest.raises(ShapeError, match=r"\[2, 10\] and \[4, 12\]"):
        linear(torch.randn(2, 10), weight)
    with pytest.raises(ShapeError, match=r"\[2, 12\] and \[2, 4, 12\]"):
        linear(torch.randn(2, 12), quantize(torch.randn(2, 4, 12), "mxfp4"))
    with pytest.raises(ShapeError, match="linear takes"):
        linear(torch.tensor(1.0), weight)
    with pytest.raises(ShapeError, match=r"bias.*\[4\], got \[5\]"):
        linear(torch.randn(2, 12), weight, torch.zeros(5))


def test_records_name_the_dtype_that_dequantize_returns() -> None:
    packed = quantize(torch.randn(2, 32, dtype=torch.bfloat16), "mxfp4")
    assert isinstance(packed, QuantizedTensor)
    assert dequantize(packed).dtype == torch.bfloat16 and dequantize(packed, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("spec", ["mxfp4", "mxfp8_plus", "nvfp4", "adaptive_2_4", "mxfp4_sparse", "e4m3/16x16:fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_into_given_memory(spec: str, dtype: torch.dtype) -> None:
    packed = quantize(torch.linspace(-3, 3, 33 * 70).reshape(3, 11, 70), spec)
    out = torch.full((3, 11, 70), 7.0, dtype=dtype)
    assert dequantize(packed, out=out) is out or dequantize(packed, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, dequantize(packed, dtype))
    with pytest.raises(ShapeError, match="contiguous"):
        dequantize(packed, out=torch.empty(33, 70, dtype=dtype))
    with pytest.raises(DtypeError, match="out must be"):
        dequantize(packed, torch.float16, out=out)


def test_the_dispatcher_runs_them() -> None:
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    weight, columns = torch.ones(64), torch.arange(63, -1, -1)
    torch.testing.assert_close(rms_norm(values, weight, 0.0), functional.rms_norm(values, (64,)), rtol=4e-6, atol=0)
    torch.testing.assert_close(silu_mul(values, values), functional.silu(values) * values, rtol=1e-6, atol=0)
    assert same_bits(hadamard(values, 64), reference.hadamard(values, 64))
    for packed, plain in (
        (rms_norm_quantize(values, weight, 0.0, "mxfp4"), rms_norm(values, weight, 0.0)),
        (silu_mul_quantize(values, values, "mxfp4"), silu_mul(values, values)),
        (gather_quantize(values, columns, "mxfp4"), values[:, columns]),
        (hadamard_quantize(values, 64, "mxfp4"), hadamard(values, 64)),
    ):
        assert all(same_bits(part, quantize(plain, "mxfp4").parts[name]) for name, part in packed.parts.items())
    kept = hadamard_quantize(values, 64, "e2m1/channel:fp16:percentile(90)")
    assert same_bits(
        kept.parts["codes"],
        reference.hadamard_quantize(values, 64, parse_format("e2m1/channel:fp16:percentile(90)")).parts["codes"],
    )


@pytest.mark.parametrize("activations", [[None, None], ["mxfp8", None], ["mxfp4", "mxfp8"]])
def test_mixed_segments_are_the_sum_of_their_products(activations: list[str | None]) -> None:
    """Each segment of the inputs is rounded as a tensor of its own, so that no scale reaches over the border."""
    generator = torch.Generator().manual_seed(3)
    inputs, bias = torch.randn(2, 3, 80, generator=generator), torch.randn(7, generator=generator)
    weights = [quantize(torch.randn(7, cols, generator=generator), "mxfp4") for cols in (48, 32)]
    expected = bias.double()
    for weight, x, word in zip(weights, inputs.split([48, 32], -1), activations, strict=True):
        used = x if word is None else fake_quantize(x.contiguous(), word)
        expected = expected + used.double() @ dequantize(weight).double().T
    torch.testing.assert_close(
        linear_mixed(inputs, weights, activations, bias).double(), expected, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("activations", [[None, None], ["mxfp8", None], ["mxfp4", "mxfp8"]])
def test_gradients_pass_rounded_segments_as_if_they_were_kept(activations: list[str | None]) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(3, 80, generator=generator)
    weights = [quantize(torch.randn(7, cols, generator=generator), "mxfp4") for cols in (48, 32)]
    leaf = inputs.clone().requires_grad_()
    outputs = linear_mixed(leaf, weights, activations)
    with torch.no_grad():
        assert same_bits(outputs.detach(), linear_mixed(leaf, weights, activations)), "the values are the rounded ones"
    slopes = torch.randn(3, 7, generator=generator)
    (outputs * slopes).sum().backward()
    expected = slopes @ torch.cat([dequantize(weight) for weight in weights], dim=-1)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, expected)


PACKED = quantize(torch.ones(4, 32), "mxfp4")
X = torch.ones(2, 32)
LIST, NUMBER, TEXT = cast("tuple[Any, Any, Any]", ([1.0, 2.0], 1.0, "x"))  # no tensors


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: quantize(LIST, "mxfp4", name="w1"), DtypeError, r"w1 must be a torch tensor, got list; wrap it"),
        (lambda: rms_norm(NUMBER, X[0], 1e-5), DtypeError, "the input of rms_norm must be a torch tensor, got float"),
        (lambda: linear(TEXT, PACKED), DtypeError, "linear takes a float tensor as inputs, got str; cast it first"),
        (
            lambda: linear(X, PACKED, LIST),
            DtypeError,
            "the bias is a float tensor on cpu, as the inputs are, got list",
        ),
        (
            lambda: linear_mixed(X, [PACKED], [None, None]),
            ShapeError,
            r"got \[2, 32\], weights \[\(4, 32\)\] and 2 formats",
        ),
        (lambda: linear_mixed(X, [], []), ShapeError, r"got \[2, 32\], weights \[\] and 0 formats"),
        (
            lambda: linear_mixed(torch.ones(1, 64), [PACKED, quantize(torch.ones(5, 32), "mxfp4")], [None, None]),
            ShapeError,
            r"the segments of one layer have equal rows, got \[4, 5\]",
        ),
        (lambda: dequantize(PACKED, out=torch.empty(32, 4).T), ShapeError, r"contiguous and of shape \[4, 32\]"),
        (
            lambda: dequantize(PACKED, out=torch.empty(4, 32, device="meta")),
            DtypeError,
            r"out must be torch.float32 on cpu, got torch.float32 on meta",
        ),
    ],
)
def test_what_is_refused(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
