"""linear on the CPU kernels: every level, every format, kept and rounded activations, within the derived bound."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bounds import exact_linear, linear_bound
from kernel_levels import LEVELS
from microscale.errors import DtypeError, KernelError, ShapeError
from microscale.formats import NAMED_FORMATS, parse_format
from microscale.kernels import dequantize, dispatch, fake_quantize, linear, linear_mixed, quantize, to_layout
from microscale.kernels.cpu import native
from microscale.kernels.cpu.activations import plan_activations
from microscale.kernels.cpu.descriptors import descriptor
from microscale.kernels.cpu.enums import ActRule
from microscale.kernels.cpu.linear import prepare_linear
from microscale.kernels.operands import Combine
from microscale.layouts import LAYOUTS
from microscale.tensor import QuantizedTensor

pytestmark = pytest.mark.skipif(native.NATIVE is None, reason="the compiled kernels are not installed")

WEIGHTS = [
    *(name for name in NAMED_FORMATS if LAYOUTS["rows16"].refusal(parse_format(name), (16, 64)) is None),
    *("e3m1/32:e8m0:floor", "e2m2/32:e8m0:floor", "e3m3/32:e8m0:floor", "e4m2-none/32:e8m0:floor"),
    *("e2m1/channel:fp32", "int8/channel:fp32", "int8-full/32:e8m0:floor", "e4m3/64:bf16", "e2m1/64:fp16"),
    *("e3m4/32:e8m0:floor", "e2m1/32:e8m0:prescale(0.75)", "e2m1/16:e8m0:floor", "int4/32:fp32", "int5/16:e4m3+fp32"),
    *("e0m3/32:e8m0:floor", "int8/32:fp16:asym", "mxfp8_e5m2"),
]
ACTIVATIONS = [
    *("int8/32:fp32:amax", "mxfp4", "mxfp8", "mxint8", "mxfp6_e2m3", "mxfp6_e3m2", "nvfp4", "mxfp4_plus"),
    *("mxfp4_plusplus", "int8/channel:fp32", "e2m1/64:e8m0:floor", "mxfp4:stochastic(3)", "int4/16:e8m0:rceil"),
]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.use_level(request.param):
        yield request.param


def numbers(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Numbers of very different rows, with outlier columns."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, cols, generator=generator)
    values *= torch.exp2(torch.randint(-8, 8, (rows, 1), generator=generator).float())
    values[:, :: max(1, cols // 3)] *= 30
    return values


def packed(spec: str, rows: int, cols: int) -> QuantizedTensor:
    return to_layout(quantize(numbers(rows, cols, seed=1), spec), "rows16")


def check(inputs: Tensor, weight: QuantizedTensor, activations: str | None, bias: Tensor | None = None) -> None:
    used = inputs if activations is None else fake_quantize(inputs, activations)
    values = dequantize(weight, torch.float32)
    got = linear(inputs, weight, bias, activations=activations)
    assert got.dtype == inputs.dtype
    bound = linear_bound(used, values, weight.format, bias, dtype=inputs.dtype)
    error = (got.double() - exact_linear(used, values, bias)).abs()
    assert bool((error <= bound).all()), f"{(error / bound).max():.2f} of the bound"


def test_the_backend_is_the_one_that_runs() -> None:
    weight = packed("mxfp4", 16, 64)
    request = dispatch.Request(
        operation=dispatch.Operation.LINEAR,
        format=weight.format,
        device=weight.device,
        dtype=torch.float32,
        layout="rows16",
    )
    assert dispatch.choose(request).name == "cpu"


@pytest.mark.parametrize("spec", WEIGHTS)
def test_every_weight_format(level: str, spec: str) -> None:
    for rows, cols in ((48, 128), (37, 200), (1, 7)):
        weight = packed(spec, rows, cols)
        for count in (1, 2, 7, 33):
            inputs = numbers(count, cols, seed=count)
            check(inputs, weight, None)
            check(inputs, weight, "int8/32:fp32:amax")


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_every_activation_format(level: str, activations: str) -> None:
    for spec in ("mxfp4", "mxfp8", "nvfp4", "mxfp6_e3m2", "mxint8", "mxfp4_plus", "mxfp6_plusplus", "int4_asym"):
        weight = packed(spec, 33, 96)
        for count in (1, 5, 20):
            check(numbers(count, 96, seed=count), weight, activations)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", ["mxfp4", "mxfp8", "mxfp6_e3m2", "nvfp4", "mxfp8_plus", "int4_asym"])
def test_half_precision(level: str, spec: str, dtype: torch.dtype) -> None:
    weight = packed(spec, 40, 160)
    bias = torch.linspace(-1, 1, 40).to(dtype)
    for count in (1, 3, 18):
        check(torch.tanh(numbers(count, 160)).to(dtype), weight, None, bias)


def test_true_four_bits_are_exact_sums(level: str) -> None:
    """W4A4: with power-of-two scales that agree, the product of small integers has no error at all."""
    weight = to_layout(quantize(torch.randint(-6, 7, (16, 64)).float(), "mxfp4"), "rows16")
    inputs = torch.randint(-6, 7, (3, 64)).float()
    expected = exact_linear(fake_quantize(inputs, "mxfp4"), dequantize(weight))
    assert torch.equal(linear(inputs, weight, activations="mxfp4").double(), expected)


def test_integer_rules() -> None:
    rules = {name: plan_activations(parse_format(name)).rule for name in ACTIVATIONS}
    assert {name for name, rule in rules.items() if rule is ActRule.NUMBER} == {
        "mxfp8",
        "mxfp6_e3m2",
        "mxfp4_plusplus",
    }


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(WEIGHTS),
    activations=st.sampled_from([None, *ACTIVATIONS]),
    rows=st.integers(1, 40),
    cols=st.integers(1, 150),
    count=st.integers(1, 20),
    exponent=st.integers(-40, 40),
    level=st.sampled_from(LEVELS),
)
def test_any_shape_and_size(
    spec: str, activations: str | None, rows: int, cols: int, count: int, exponent: int, level: str
) -> None:
    with native.use_level(level):
        check(numbers(count, cols) * 2.0**exponent, packed(spec, rows, cols), activations)


def test_subnormal_codes_of_8_bit_floats(level: str) -> None:
    """Bfloat16 dot products take subnormals for zero: the kernels must not."""
    values = torch.full((16, 64), 448.0)
    values[:, 1::2] = torch.linspace(-1, 1, 32) * 2.0**-6
    weight = to_layout(quantize(values, "mxfp8"), "rows16")
    inputs = torch.zeros(2, 64)
    inputs[:, 1::2] = torch.linspace(0.5, 1, 32)
    for activations in (None, "int8/32:fp32:amax", "mxfp8"):
        check(inputs[:1], weight, activations)
        check(inputs, weight, activations)
        assert bool((linear(inputs[:1], weight, activations=activations) != 0).all())


def test_special_codes_of_8_bit_floats(level: str) -> None:
    weight = quantize(numbers(16, 64), "mxfp8_e5m2")
    weight.parts["codes"][3, 5] = 0x7C  # +Inf
    weight.parts["codes"][4, 40] = 0x7F  # NaN
    moved = to_layout(weight, "rows16")
    inputs = numbers(2, 64).abs() + 1
    for count in (1, 2):
        got = linear(inputs[:count], moved)
        assert bool(torch.isposinf(got[:, 3]).all()) and bool(got[:, 4].isnan().all())
        assert bool(got[:, [0, 1, 2, *range(5, 16)]].isfinite().all())


@pytest.mark.parametrize("spec", ["mxfp4", "mxfp8", "nvfp4", "mxfp4_plus"])
@pytest.mark.parametrize("activations", [None, "int8/32:fp32:amax", "mxfp4", "mxfp8"])
def test_nan_stays_in_its_row(level: str, spec: str, activations: str | None) -> None:
    poisoned = numbers(20, 64, seed=1)
    poisoned[5, 40] = float("nan")
    weight = to_layout(quantize(poisoned, spec), "rows16")
    inputs = numbers(4, 64)
    inputs[2, 3] = float("nan")
    for rows in (inputs, inputs[2:3]):
        got = linear(rows, weight, activations=activations)
        expected = torch.zeros(got.shape, dtype=torch.bool)
        expected[:, 5] = True
        expected[rows.isnan().any(-1)] = True
        assert torch.equal(got.isnan(), expected)


@pytest.mark.parametrize("rows", [16, 24, 33, 48])
@pytest.mark.parametrize("activations", [None, "int8/32:fp32:amax"])
def test_rows_of_inputs_do_not_meet(level: str, rows: int, activations: str | None) -> None:
    weight = packed("mxfp4", rows, 64)
    inputs = numbers(5, 64)
    expected = linear(inputs, weight, activations=activations)
    for row in range(5):
        broken = inputs.clone()
        broken[row, 3] = float("inf")
        got = linear(broken, weight, activations=activations)
        others = [other for other in range(5) if other != row]
        assert torch.equal(got[others], expected[others])
        assert not bool(got[row].isfinite().all())


def test_negated_views() -> None:
    weight = packed("mxfp4", 16, 64)
    for count in (1, 3):
        inputs = numbers(count, 64)
        negated = torch._neg_view(inputs)  # pyright: ignore[reportPrivateImportUsage]  # it has no public name
        assert torch.equal(linear(negated, weight), linear(-inputs, weight))
        assert torch.equal(dequantize(quantize(negated, "mxfp8")), dequantize(quantize(-inputs, "mxfp8")))


def test_infinite_activations(level: str) -> None:
    weight = packed("mxfp8", 16, 64)
    inputs = numbers(1, 64)
    inputs[0, 3] = float("inf")
    values = dequantize(weight)
    assert torch.equal(linear(inputs, weight).isfinite(), (inputs @ values.T).isfinite())


def test_zero_blocks_and_no_rows(level: str) -> None:
    values = numbers(16, 96)
    values[:, 32:64] = 0
    for spec in ("mxfp4", "mxfp4_plus", "nvfp4", "mxfp8_plusplus", "int4_asym"):
        weight = to_layout(quantize(values, spec), "rows16")
        check(numbers(1, 96), weight, None)
        check(torch.zeros(3, 96), weight, "mxfp4")
        assert linear(torch.empty(0, 96), weight, activations="mxfp4").shape == (0, 16)
        assert linear(torch.empty(2, 0, 96), weight).shape == (2, 0, 16)


def test_results_do_not_depend_on_threads_or_views(level: str) -> None:
    before = torch.get_num_threads()
    weights = [packed(spec, 200, 320) for spec in ("mxfp4", "mxfp8_plus", "nvfp4")]
    wide = numbers(35, 330)
    try:
        for weight in weights:
            for activations in (None, "int8/32:fp32:amax", "nvfp4"):
                results = []
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    view = wide[1:, 3:323]  # neither contiguous nor aligned
                    results.append(linear(view, weight, activations=activations))
                assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("activations", [None, "nvfp4", "mxfp4:stochastic(3)", "mxfp8", "int8/channel:fp32"])
def test_more_rows_than_are_done_at_once(activations: str | None) -> None:
    """Rows go in hundreds: a scale of the whole tensor and random bits by place must not notice."""
    for spec in ("mxfp4", "mxfp8"):
        weight = packed(spec, 33, 96)
        check(numbers(1100, 96), weight, activations)


def test_calls_from_many_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    weight, inputs = packed("mxfp4", 256, 512), numbers(1, 512)
    expected = linear(inputs, weight)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: linear(inputs, weight), range(200)))
    assert all(torch.equal(result, expected) for result in results)


def test_a_remembered_call_follows_its_tensors() -> None:
    """The second level is no address: another one at the same place makes another call."""
    weight = packed("nvfp4", 16, 64)
    inputs = numbers(1, 64)
    first = linear(inputs, weight)
    weight.parts["tensor_inv_scale"].mul_(2)
    check(inputs, weight, None)
    assert torch.allclose(linear(inputs, weight) * 2, first)


def test_a_prepared_call_keeps_its_activation_format() -> None:
    """The record that the kernels point to may leave every cache meanwhile."""
    weight, inputs = packed("mxfp4", 16, 64), numbers(2, 64)
    call = prepare_linear([weight], [None], parse_format("mxfp8"))
    before, after = torch.empty(2, 16), torch.empty(2, 16)
    call.run(inputs, before)
    plan_activations.cache_clear()
    descriptor.cache_clear()
    for size in range(1, 600):
        descriptor(parse_format(f"e2m1/{size}:e8m0:floor"))
    call.run(inputs, after)
    assert torch.equal(before, after)


def test_shared_inputs_and_silu() -> None:
    gate, up, other = packed("mxfp4", 48, 96), packed("mxfp8", 48, 96), packed("nvfp4", 17, 96)
    bias = torch.linspace(-1, 1, 48)
    for count in (1, 9):
        inputs = numbers(count, 96) / 64
        both = prepare_linear([gate, other], [bias, None])
        out = torch.full((count, 65), float("nan"))
        both.run(inputs, out)
        assert torch.equal(out[:, :48], linear(inputs, gate) + bias)
        assert torch.equal(out[:, 48:], linear(inputs, other))
        silu = prepare_linear([gate, up], [bias, None], combine=Combine.SILU_MUL)
        out = torch.empty(count, 48)
        silu.run(inputs, out)
        g = (linear(inputs, gate) + bias).double()
        expected = torch.nn.functional.silu(g) * linear(inputs, up)
        assert bool(((out - expected).abs() <= 16 * 2.0**-24 * expected.abs() + 2.0**-90).all())


def test_silu_of_numbers_that_are_not_finite(level: str) -> None:
    gate, up = packed("mxfp4", 16, 64), packed("mxfp8", 16, 64)
    bias = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, *[0.0] * 11])
    for count in (1, 3):
        out = torch.empty(count, 16)
        prepare_linear([gate, up], [bias, torch.ones(16)], combine=Combine.SILU_MUL).run(torch.zeros(count, 64), out)
        for row in out:
            assert row[0] == math.inf and row[1].isnan() and row[2].isnan() and row[3] == torch.tensor(3e38)
            assert not bool(row[4:].any())


@pytest.mark.parametrize("count", [1, 3, 20])
def test_mixed_segments(level: str, count: int) -> None:
    """Channels in 4, 6 and 8 bits, and any other list of formats, add up in one call."""
    for specs in (["mxfp4", "mxfp6_e3m2", "mxfp8"], ["int2_asym", "mxfp4_plus", "nvfp4", "mxint8"]):
        weights = [packed(spec, 40, cols) for spec, cols in zip(specs, (128, 64, 33, 32), strict=False)]
        cols = sum(weight.cols for weight in weights)
        inputs, bias = numbers(count, cols), torch.linspace(-1, 1, 40)
        for rounding in (None, "mxfp4", "own"):
            activations = [spec if rounding == "own" and "asym" not in spec else rounding for spec in specs]
            activations = [None if each == "own" else each for each in activations]
            got = linear_mixed(inputs, weights, activations, bias)
            exact, bound = bias.double().expand(count, -1).clone(), torch.zeros(count, 40, dtype=torch.float64)
            start = 0
            for weight, fmt in zip(weights, activations, strict=True):
                part = inputs[:, start : start + weight.cols].contiguous()
                used = part if fmt is None else fake_quantize(part, fmt)
                exact += exact_linear(used, dequantize(weight))
                bound += linear_bound(used, dequantize(weight), weight.format, bias)
                start += weight.cols
            bound *= 1 + (len(weights) + 1) / 32  # a rounding for each segment; each bound has at least 32 of them
            assert bool(((got - exact).abs() <= bound).all())
            rows = [to_layout(weight, "row_major") for weight in weights]
            assert torch.allclose(linear_mixed(inputs, rows, activations, bias), got, rtol=1e-4, atol=1e-2)
    with pytest.raises(ShapeError, match="fill"):
        linear_mixed(inputs[:, 1:], weights, [None] * 4)
    with pytest.raises(ShapeError, match="equal rows"):
        linear_mixed(numbers(1, 128), [packed("mxfp4", 8, 64), packed("mxfp4", 9, 64)], [None, None])


def test_errors_before_any_pointer_is_touched() -> None:
    weight = packed("mxfp4", 32, 64)
    call = prepare_linear([weight], [None])
    good, out = torch.zeros(2, 64), torch.zeros(2, 32)
    with pytest.raises(ShapeError, match=r"\[rows, 64\]"):
        call.run(torch.zeros(2, 63), out)
    with pytest.raises(ShapeError, match="equal"):
        call.run(torch.zeros(3, 64), out)
    with pytest.raises(DtypeError, match="float32"):
        call.run(good.double(), out)
    with pytest.raises(ShapeError, match="contiguous"):
        call.run(torch.zeros(2, 128)[:, ::2], out)
    with pytest.raises(ShapeError, match="contiguous"):
        call.run(good, torch.zeros(32, 2).T)
    with pytest.raises(KernelError, match="CPU"):
        call.run(good.to("meta"), out)
    with pytest.raises(KernelError, match="rows16"):
        prepare_linear([quantize(good, "mxfp4")], [None])
    with pytest.raises(KernelError, match="on the fly"):
        prepare_linear([weight], [None], parse_format("adaptive_2_4"))
    with pytest.raises(ShapeError, match="one width"):
        prepare_linear([weight, packed("mxfp4", 32, 96)], [None, None])
    with pytest.raises(ShapeError, match="bias"):
        prepare_linear([weight], [torch.zeros(31)])
    with pytest.raises(ShapeError, match="silu_mul takes two weights of equal shape"):
        prepare_linear([weight], [None], combine=Combine.SILU_MUL)
    with pytest.raises(DtypeError, match="float64"):
        prepare_linear([weight], [None], dtype=torch.float64)
    for function in (
        lambda inputs, bias=None: linear(inputs, weight, bias),
        lambda inputs, bias=None: linear_mixed(inputs, [weight], [None], bias),
    ):
        with pytest.raises(DtypeError, match="cast"):
            function(torch.zeros(2, 64, dtype=torch.int32))
        with pytest.raises(DtypeError, match="bias is a float tensor on cpu"):
            function(good, torch.zeros(32, device="meta"))
        with pytest.raises(DtypeError, match="bias"):
            function(good, torch.zeros(32, dtype=torch.int64))
        with pytest.raises(ShapeError, match="scalar"):
            function(torch.tensor(1.0))


def test_gradients_take_the_reference() -> None:
    weight = packed("mxfp4", 16, 64)
    inputs = numbers(2, 64).requires_grad_()
    linear(inputs, weight).sum().backward()
    assert inputs.grad is not None
    assert torch.allclose(inputs.grad, dequantize(weight).sum(0).expand(2, -1), rtol=1e-5, atol=1e-4)
    bias = torch.zeros(16, requires_grad=True)
    linear(numbers(2, 64), weight, bias).sum().backward()
    assert bias.grad is not None and torch.equal(bias.grad, torch.full((16,), 2.0))
