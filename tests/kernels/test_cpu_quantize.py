"""The compiled quantize, dequantize and fake_quantize: on every level the same bits as the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_levels import LEVELS
from microscale.errors import DtypeError, FormatError, KernelError, NonFiniteError, ShapeError
from microscale.formats import NAMED_FORMATS, BlockFormat, parse_format
from microscale.kernels import cpu, reference
from microscale.kernels.backend import Operation, Request
from microscale.kernels.cpu import BACKEND as CPU
from microscale.kernels.cpu import native
from microscale.tensor import QuantizedTensor
from vectors.inputs import SUBNORMAL, matrices, same_bits

pytestmark = pytest.mark.skipif(native.NATIVE is None, reason="the extension is not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULES = (
    *("ceil", "rceil", "even", "even(0)", "even(1)", "even(23)", "threshold(7)", "threshold(7.25)", "threshold(0.3)"),
    *("prescale", "prescale(0.3)", "percentile(90)", "percentile(1)", "std", "std(0.01)", "std(9)", "mse", "mse(-2,3)"),
)
SPECS = (
    *NAMED_FORMATS,
    *(f"mxfp4:{rule}" for rule in RULES),
    *(f"mxfp8:{rule}" for rule in ("floor", "ceil", "even", "even(1)", "threshold(500)")),
    *("nvfp4:rceil", "nvfp4:threshold(7)", "nvfp4:percentile(80)", "e2m1/16:fp16:rceil", "int8/32:fp32:amax"),
    *(
        f"{name}:{mode}"
        for name in ("mxfp4", "mxfp8", "mxint8")
        for mode in ("stochastic(7)", "nearest_away", "toward_zero")
    ),
    *("nvfp4:stochastic(1)", "mxfp4_plus:stochastic(2)", "mxfp4_plusplus:nearest_away", "int4_asym:stochastic(5)"),
    *("mxfp8:nonfinite", "mxfp8_e5m2:nonfinite:floor", "e4m3-ieee/32:e8m0:nonfinite", "e3m4/32:e8m0:floor"),
    *("mxfp4:inf_saturate", "nvfp4:inf_saturate", "int4_asym:inf_saturate", "mxfp4:nan_raise"),
    *("mxfp4:nan_raise:inf_saturate", "nvfp4:nan_raise", "mxfp4_sparse:nan_raise"),
    *("e2m1/32:bf16", "e2m1/32:fp32", "e2m1/16:ue5m3", "e2m1/32:ue4m3+fp32", "e2m1-b5/32:e5m0", "e2m1/32:e4m0-b3"),
    *(
        "e0m3/32:e8m0",
        "e3m0/16:e8m0",
        "e1m2/8:e8m0",
        "e2m5/32:e8m0",
        "e7m0/32:e8m0",
        "e2m3-b100/32:e8m0",
        "e4m1/24:fp16",
    ),
    *("ue4m3/32:e8m0", "uint4/32:fp16", "int3/20:e8m0", "int7-f3/16:e8m0:even", "int4-full/32:e8m0", "int2/1:e8m0"),
    *("int5/7:fp32", "int8/channel:fp32", "e4m3/channel:e8m0:rceil", "e4m3/channel:fp32", "e2m1/channel:e4m3+fp32"),
    *("int4/32:fp32:asym", "int8/64:bf16:asym", "int4/channel:fp16:asym", "int4/32:e4m3+fp32:asym"),
    *("int2/16:fp16:asym(fp8)", "e2m1/16:e8m0:plus", "e2m1/20:e8m0:plus", "e2m1/72:e8m0:plus", "e2m1/256:e8m0:plus"),
    *(
        "int8/16:e4m3+fp32:plus",
        "e2m1/16:fp16:plus",
        "e5m2/32:e8m0:plus",
        "e3m2/32:e8m0:plusplus",
        "e2m1/8:e8m0:plusplus",
    ),
    *("mxfp8:std(3)", "mxint8:std", "nvfp4:std", "nvfp4:std(9)", "e2m1/16:fp16:std", "int5/7:fp32:std(2)"),
    *("e4m3/channel:e8m0:std", "e4m3/channel:bf16:std(4)", "e2m1/channel:e4m3+fp32:std"),
    *("mxfp8:mse", "mxint8:mse(0,2)", "mxfp6_e3m2:mse(-3,-1)", "mxfp4:mse(-140,140)", "mxfp4:mse(4000000,4000001)"),
    *("int3/20:e8m0:mse", "int2/1:e8m0:mse", "e2m1/300:e8m0:mse", "e4m3/channel:e8m0:mse"),
    *("nvfp4:mse", "nvfp4:mse(0.1,3)", "e2m1/16:e4m3:mse(0.5,1.2)", "e2m1/16:ue5m3:mse", "int2/16:fp16:mse(0.9,9)"),
    *("int5/7:fp32:mse", "int8/channel:fp32:mse", "e2m1/channel:e4m3+fp32:mse", "int4/32:bf16:mse"),
    *(
        "e2m1/300:fp32:mse(1,1)",
        "e2m1/32:fp32:mse(1,1e29)",
        "ue4m3/32:fp16:mse",
        "ue4m3/32:e8m0:std",
        "e0m3/32:e8m0:mse",
    ),
    *(
        "e2m3-b100/32:e8m0:mse",
        "e2m3-b100/16:e4m3+fp32:mse",
        "e3m0/16:fp16:mse",
        "e2m1/32:e5m0:mse",
        "e2m1/16:e5m2:std",
    ),
    *("mxfp4:std:stochastic(7)", "nvfp4:mse:stochastic(7)", "mxfp8_e5m2:mse:nonfinite", "e4m3/16:fp16:mse:nonfinite"),
    *("mxfp4:mse:toward_zero", "nvfp4:std:inf_saturate", "nvfp4:mse:inf_saturate", "mxfp4:mse:inf_saturate"),
    *(
        "pair(mxfp4:std,mxfp8:mse,30%)",
        "nvfp4:mse+sparse1%:fp16",
        "mxfp4_plus+sparse1%:fp16",
        "pair(mxfp4,mxfp8,30%)",
        "pair(int2/32:fp16:asym,mxint8,50%)+sparse1%:fp8",
    ),
)


def request(spec: str, operation: Operation = Operation.QUANTIZE, dtype: torch.dtype = torch.float32) -> Request:
    return Request(
        operation=operation, format=parse_format(spec), device=torch.device("cpu"), dtype=dtype, layout="row_major"
    )


@st.composite
def hard_tensors(draw: st.DrawFn) -> torch.Tensor:
    """Matrices of any float dtype with extreme exponents, ties, and in places NaN, Inf, -0 and subnormals."""
    exponents = draw(st.sampled_from([(-12, 12), (-12, 12), (-150, -110), (100, 127)]))
    values = draw(matrices(rows=(1, 5), cols=(1, 150), exponents=exponents))
    flat = values.view(-1)
    specials = [math.nan, -math.nan, math.inf, -math.inf, -0.0, 0.0, SUBNORMAL, -3 * SUBNORMAL, 2.0**-126]
    places = st.tuples(st.integers(0, flat.numel() - 1), st.sampled_from(specials))
    for place, value in draw(st.lists(places, max_size=4)):
        flat[place] = value
    return values.to(draw(st.sampled_from(DTYPES)))


def outcome(operation: object, *arguments: object) -> object:
    """What an operation returns, or the text of its refusal."""
    assert callable(operation)
    try:
        return operation(*arguments)
    except NonFiniteError as error:
        return str(error)


def check_equal(values: torch.Tensor, spec: str) -> None:
    fmt = parse_format(spec)
    expected = outcome(reference.quantize, values, fmt)
    if not isinstance(expected, QuantizedTensor):
        for name in LEVELS:
            with native.use_level(name):
                assert outcome(cpu.quantize, values, fmt) == expected
                assert outcome(cpu.fake_quantize, values, fmt) == expected
        return
    restored = {dtype: reference.dequantize(expected, dtype) for dtype in DTYPES}
    for name in LEVELS:
        with native.use_level(name):
            got = cpu.quantize(values, fmt)
            for part, tensor in expected.parts.items():
                assert same_bits(got.parts[part], tensor), f"{name} {part}: {got.parts[part]} is not {tensor}"
            for dtype, numbers in restored.items():
                assert same_bits(cpu.dequantize(expected, dtype), numbers), f"{name} to {dtype}"
            assert same_bits(cpu.fake_quantize(values, fmt), restored[values.dtype]), name


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=20)
@given(values=hard_tensors())
def test_every_level_gives_the_bits_of_the_reference(spec: str, values: torch.Tensor) -> None:
    assert CPU.refusal(request(spec)) is None
    check_equal(values, spec)


@pytest.mark.parametrize(
    "spec",
    [
        *("mxfp4", "mxfp8", "mxfp6_e2m3", "mxint8", "nvfp4", "mxfp4_plus", "int3_asym", "int5/7:fp32"),
        *("mxfp4:std", "mxfp4:mse", "nvfp4:std", "nvfp4:mse", "int5/7:fp32:mse", "e4m3/channel:fp32:std"),
    ],
)
@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (7, 33), (13, 97), (3, 4099), (61, 1024), (2, 3, 65), (200, 512)])
def test_odd_shapes_unaligned_views_and_large_matrices(spec: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    storage = torch.randn(math.prod(shape) + 3, generator=generator)
    for dtype in DTYPES:
        view = storage.to(dtype)[3:].view(shape)
        assert view.storage_offset() == 3
        check_equal(view, spec)
    check_equal(storage[: math.prod(shape)].view(shape[-1], -1).T, spec)


def test_unaligned_parts_are_read_where_they_lie() -> None:
    values = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    for spec in ("mxfp4", "mxfp6_e3m2", "nvfp4_plus", "int4_asym"):
        whole = reference.quantize(values, parse_format(spec))
        moved = {
            name: torch.cat([part.reshape(-1)[:1], part.reshape(-1)])[1:].view(part.shape)
            for name, part in whole.parts.items()
        }
        shifted = QuantizedTensor(format=whole.format, shape=whole.shape, dtype=whole.dtype, parts=moved)
        assert same_bits(cpu.dequantize(shifted), reference.dequantize(whole))


@pytest.mark.parametrize(
    "spec", ["mxfp4", "nvfp4", "mxfp8:stochastic(3)", "int4_asym_fp8", "mxfp6_plusplus", "int8/channel:fp32"]
)
def test_results_do_not_depend_on_the_number_of_threads(spec: str) -> None:
    values = torch.randn(97, 2080, generator=torch.Generator().manual_seed(5))
    values[50, 7], values[96, 2079] = math.nan, 1e30
    fmt = parse_format(spec)
    results: list[QuantizedTensor] = []
    restored: list[torch.Tensor] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(cpu.quantize(values, fmt))
            restored.append(cpu.dequantize(results[-1]))
    finally:
        torch.set_num_threads(before)
    for other, numbers in zip(results[1:], restored[1:], strict=True):
        assert all(same_bits(part, other.parts[name]) for name, part in results[0].parts.items())
        assert same_bits(restored[0], numbers)
    assert same_bits(restored[0], reference.dequantize(reference.quantize(values, fmt)))


@pytest.mark.parametrize(
    ("spec", "amax"),
    [
        ("mxfp4", torch.tensor(3.0)),
        ("mxfp4:rceil", torch.linspace(0, 9, 12).view(4, 3)),
        ("mxfp8:even", torch.linspace(1e-40, 1e38, 4).view(4, 1)),
        ("nvfp4", torch.tensor([40.0])),
        ("nvfp4:percentile(80)", torch.tensor(2.0)),
        ("mxfp4_plus", torch.tensor(0.5)),
        ("nvfp4:std", torch.tensor([40.0])),
        ("nvfp4:mse", torch.tensor([40.0])),
        ("mxfp4:mse", torch.linspace(0, 9, 12).view(4, 3)),
        ("e2m1/32:fp16:mse", torch.linspace(0, 9, 12).view(4, 3)),
        ("int8/channel:fp32", torch.linspace(0, 5, 4, dtype=torch.float64).view(4, 1)),
    ],
)
def test_a_given_amax_is_used_as_the_reference_uses_it(spec: str, amax: torch.Tensor) -> None:
    values = torch.randn(4, 72, generator=torch.Generator().manual_seed(8))
    values[1, 1], values[2, 0] = math.inf, -0.0
    fmt = parse_format(spec)
    expected = reference.quantize(values, fmt, amax=amax)
    for name in LEVELS:
        with native.use_level(name):
            got = cpu.quantize(values, fmt, amax=amax)
            assert all(same_bits(got.parts[part], tensor) for part, tensor in expected.parts.items())
            assert same_bits(cpu.fake_quantize(values, fmt, amax=amax), reference.dequantize(expected))


def near_ties(blocks: int) -> torch.Tensor:
    """Blocks whose squared errors are equal under factors 1 and 2, but for the rounding of the sums.

    One x = 7 + e errs by 1 + e or 1 - e, some x = 0.75 - d by 0.25 - d or 0.25 + d: the sums are equal where 4 e is the
    sum of d. The others round to 0 under both factors; their squares are what the float64 sums have no room for.
    """
    generator = torch.Generator().manual_seed(9)
    values = torch.randn(blocks, 32, dtype=torch.float64, generator=generator) * 2.0**-8
    steps = torch.randint(0, 2**18, (blocks, 8), generator=generator)
    steps[:, 0] += -steps.sum(-1) % 32
    values[:, 0] = 7 + steps.sum(-1) * 2.0**-26
    values[:, 1:9] = 0.75 - steps * 2.0**-24
    order = torch.rand(blocks, 32, generator=generator).argsort(-1)
    exact = values.gather(-1, order)
    assert torch.equal(values[:, :9].float().double(), values[:, :9])
    return exact.float()


def test_the_order_of_the_sums_is_that_of_the_reference() -> None:
    values = near_ties(400)
    assert reference.quantize(values, parse_format("mxfp4:mse(0,1)")).parts["scale"].unique().tolist() == [127, 128]
    for spec in ("mxfp4:mse(0,1)", "e2m1/16:e8m0:mse", "e2m1/channel:e8m0:mse(0,1)"):
        check_equal(values, spec)


@pytest.mark.parametrize("spec", ["mxfp4:std", "nvfp4:std", "mxfp4:mse", "nvfp4:mse", "int4/8:fp32:mse(0.2,1)"])
@pytest.mark.parametrize("log2", [-145, -126, 0, 120])
def test_rules_that_sum_have_the_bits_of_the_reference_over_many_blocks(spec: str, log2: int) -> None:
    generator = torch.Generator().manual_seed(6)
    values = torch.randn(64, 1003, generator=generator) * 2.0 ** torch.randint(-3, 4, (64, 1), generator=generator)
    values[3], values[4, ::2], values[5] = 0.0, 0.0, values[5].abs()
    check_equal(values * 2.0**log2, spec)


@pytest.mark.parametrize("spec", ["int4_asym", "int4_asym_fp8", "int4/32:fp32:asym", "adaptive_2_4"])
def test_zeros_of_both_signs_keep_the_bits_of_the_reference(spec: str) -> None:
    generator = torch.Generator().manual_seed(2)
    zeros = torch.where(torch.rand(8, 64, generator=generator) < 0.5, 0.0, -0.0)
    for values in (zeros, torch.where(torch.rand(8, 64, generator=generator) < 0.5, zeros, 1.5)):
        check_equal(values, spec)


def test_every_code_and_scale_byte_decodes_as_the_reference_has_it() -> None:
    for spec in SPECS:
        fmt = parse_format(spec)
        if not isinstance(fmt, BlockFormat) or fmt.sparse is not None:
            continue
        generator = torch.Generator().manual_seed(4)
        packed = reference.quantize(torch.randn(9, 512, generator=generator), fmt)
        parts = {
            name: torch.randint(
                0,
                2 ** min(8, fmt.scale.bits) if name == "scale" else 256,
                part.shape,
                dtype=torch.uint8,
                generator=generator,
            )
            if part.dtype == torch.uint8 and name != "index"
            else part
            for name, part in packed.parts.items()
        }
        hostile = QuantizedTensor(format=fmt, shape=packed.shape, dtype=packed.dtype, parts=parts)
        for name in LEVELS:
            with native.use_level(name):
                assert same_bits(cpu.dequantize(hostile), reference.dequantize(hostile)), (spec, name)


# ------------------------------------------------------------------------------------------------ refusals


def test_what_the_reference_keeps_is_refused_with_the_reason() -> None:
    for spec, reason in (
        ("e2m1/channel:fp16:percentile(90)", "whole rows"),
        ("e4m3/128x128:fp32", "tiles"),
        ("e4m3/tensor:fp32", "whole tensor"),
        ("fp16/32:e8m0", "up to 8 bits"),
        ("e2m1/64:e8m0:plusplus", "index entries"),
        ("pair(mxfp4,fp16/32:e8m0,30%)", "up to 8 bits"),
    ):
        refusal = CPU.refusal(request(spec))
        assert refusal is not None and reason in refusal, spec
    assert CPU.refusal(request("e2m1/channel:fp16:percentile(90)", Operation.DEQUANTIZE)) is None
    assert "float64" in str(CPU.refusal(request("mxfp4", dtype=torch.float64)))
    other = Request(
        operation=Operation.QUANTIZE,
        format=parse_format("mxfp4"),
        device=torch.device("meta"),
        dtype=torch.float32,
        layout="row_major",
    )
    assert "CPU only" in str(CPU.refusal(other))


@pytest.mark.parametrize("operation", [cpu.quantize, cpu.fake_quantize])
def test_wrong_arguments_are_refused_by_name(operation: object) -> None:
    assert callable(operation)
    fmt = parse_format("mxfp4")
    with pytest.raises(DtypeError, match=r"the weight must be float32, bfloat16 or float16.*torch\.int32"):
        operation(torch.ones(2, 32, dtype=torch.int32), fmt, name="the weight")
    for empty in (torch.ones(0, 32), torch.ones(2, 0)):
        with pytest.raises(ShapeError, match="the weight has shape"):
            operation(empty, fmt, name="the weight")
    with pytest.raises(ShapeError, match="scalar"):
        operation(torch.tensor(1.0), fmt, name="the weight")
    with pytest.raises(KernelError, match="the weight is on meta"):
        operation(torch.ones(2, 32, device="meta"), fmt, name="the weight")
    with pytest.raises(ShapeError, match="grid of blocks"):
        operation(torch.ones(2, 32), fmt, amax=torch.ones(3, 3), name="the weight")
    with pytest.raises(NonFiniteError, match="amax given for the weight"):
        operation(torch.ones(2, 32), fmt, amax=torch.tensor(-1.0), name="the weight")
    with pytest.raises(FormatError, match="cannot use a given amax"):
        operation(torch.ones(2, 64), parse_format("int4_asym"), amax=torch.tensor(1.0), name="the weight")


def test_dequantize_refuses_other_dtypes_and_devices() -> None:
    packed = cpu.quantize(torch.ones(2, 32), parse_format("mxfp4"))
    with pytest.raises(KernelError, match="float64"):
        cpu.dequantize(packed, torch.float64)
    with pytest.raises(KernelError, match="'codes' is on meta"):
        cpu.dequantize(packed.to("meta"))


def test_gradients_do_not_flow_through_codes_but_inputs_that_want_them_are_taken() -> None:
    values = torch.randn(2, 32, requires_grad=True)
    assert not cpu.fake_quantize(values, parse_format("mxfp4")).requires_grad
