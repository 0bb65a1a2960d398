"""RMSNorm, SiLU times up, gather and Hadamard: within their bounds, and fused with quantize bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import nullcontext

import pytest
import torch

from kernel_levels import LEVELS
from microscale.errors import NonFiniteError, ShapeError
from microscale.formats import parse_format
from microscale.kernels import (
    cpu,
    reference,
)
from microscale.kernels.cpu import native
from microscale.tensor import QuantizedTensor
from vectors.inputs import same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (3, 7), (2, 33), (1, 4096), (5, 1031), (2, 3, 96), (67, 512))
SPECS = ("mxfp4", "mxfp6_e2m3", "mxfp8", "nvfp4", "mxfp4_plus", "int4_asym", "int8/32:fp32:amax", "mxfp8:stochastic(4)")
COMPOUND = ("mxfp4_sparse", "adaptive_2_4", "int8/channel:fp32", "int4_asym_fp8")
UNIT = 2.0**-24


@pytest.fixture(params=[None, *LEVELS], ids=lambda name: name or "reference")
def backend(request: pytest.FixtureRequest) -> Generator[object, None, None]:
    """The reference, then the kernels on every level."""
    with native.use_level(request.param) if request.param else nullcontext():
        yield cpu if request.param else reference


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


def assert_within(got: torch.Tensor, exact: torch.Tensor, units: float, floor: torch.Tensor | float = 0.0) -> None:
    """|got - exact| <= units * 2^-24 of the exact number, then half a step of the dtype, and its smallest subnormal."""
    info = torch.finfo(got.dtype)
    step = info.eps / 2 if got.dtype != torch.float32 else 0.0
    allowed = exact.abs() * ((1 + units * UNIT) * (1 + step) - 1) + info.tiny * info.eps + floor
    error = (got.to(torch.float64) - exact).abs()
    assert bool((error <= allowed).all()), f"{float((error / allowed).max())} times the bound"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_stays_within_its_bound(backend: object, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for weight_dtype in (torch.float32, dtype):
        values, weight = numbers(shape, dtype), numbers(shape[-1:], weight_dtype, seed=1)
        wide = values.double()
        exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        got = backend.rms_norm(values, weight, 1e-6)  # type: ignore[attr-defined]
        assert got.dtype == dtype and got.shape == values.shape
        assert_within(got, exact, shape[-1] / 2 + 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_silu_mul_stays_within_its_bound(backend: object, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for spread in (0.01, 1.0, 8.0, 40.0):
        gate, up = numbers(shape, dtype, spread=spread), numbers(shape, dtype, seed=1)
        wide = gate.double()
        exact = wide / (1 + (-wide).exp()) * up.double()
        got = backend.silu_mul(gate, up)  # type: ignore[attr-defined]
        assert got.dtype == dtype and got.shape == gate.shape
        assert_within(got, exact, 8, floor=up.double().abs() * 2.0**-118)


def test_silu_mul_over_the_whole_range_of_the_exponential(backend: object) -> None:
    gate = torch.cat([torch.linspace(-110, 110, 20001), torch.tensor([0.0, -0.0, 1e-30, -1e-38, 88.7, -88.72, -88.74])])
    wide = gate.double()
    got = backend.silu_mul(gate, torch.ones_like(gate))  # type: ignore[attr-defined]
    assert_within(got, wide / (1 + (-wide).exp()), 8, floor=2.0**-118)
    special = torch.tensor([math.nan, math.inf, -math.inf, 200.0, -200.0])
    got = backend.silu_mul(special, torch.ones(5))  # type: ignore[attr-defined]
    assert math.isnan(got[0]) and got[1] == math.inf and math.isnan(got[2]) and got[3] == 200 and got[4] == 0


def sylvester(size: int) -> torch.Tensor:
    """The Hadamard matrix of the textbook, by doubling."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_hadamard_is_sylvesters_matrix(size: int) -> None:
    values = torch.randint(-50, 50, (3, 2 * size), generator=torch.Generator().manual_seed(0)).float()
    exact = (values.double().unflatten(-1, (2, size)) @ sylvester(size)).flatten(-2)
    factor = 1 / torch.tensor(size, dtype=torch.float32).sqrt()
    assert same_bits(reference.hadamard(values, size), exact.float() * factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_hadamard_gives_the_same_bits_everywhere(backend: object, size: int, dtype: torch.dtype) -> None:
    for rows in (1, 7, 130):
        values = numbers((rows, 3 * size), dtype, seed=rows, spread=3.0)
        values.view(-1)[5], values.view(-1)[-1] = -0.0, 2.0**-120
        signs = torch.where(numbers((3 * size,), torch.float32, seed=2) < 0, -1.0, 1.0)
        for given in (None, signs):
            got = backend.hadamard(values, size, given)  # type: ignore[attr-defined]
            assert same_bits(got, reference.hadamard(values, size, given))
    values[0, 0], values[0, size] = math.nan, math.inf
    got = backend.hadamard(values, size)  # type: ignore[attr-defined]
    assert same_bits(got, reference.hadamard(values, size))


def fused_cases(values: torch.Tensor) -> list[tuple[str, tuple[object, ...], Callable[..., torch.Tensor], str]]:
    """Arguments of each fused operation, with what makes the tensor that is then quantized."""
    cols = values.shape[-1]
    weight, up = numbers((cols,), values.dtype, seed=1), numbers(tuple(values.shape), values.dtype, seed=2)
    columns = torch.randperm(cols, generator=torch.Generator().manual_seed(3))[: max(1, cols - 3)]
    signs = torch.where(numbers((cols,), torch.float32, seed=4) < 0, -1.0, 1.0)
    return [
        ("rms_norm", (weight, 1e-5), lambda own: own.rms_norm(values, weight, 1e-5), "fmt last"),
        ("silu_mul", (up,), lambda own: own.silu_mul(values, up), "fmt last"),
        ("gather", (columns,), lambda _: values[..., columns], "fmt last"),
        ("hadamard", (32,), lambda own: own.hadamard(values, 32), "fmt last"),
        ("hadamard", (32, signs), lambda own: own.hadamard(values, 32, signs), "fmt before signs"),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [*SPECS, *COMPOUND])
def test_fused_is_quantize_of_its_own_result(backend: object, spec: str, dtype: torch.dtype) -> None:
    fmt = parse_format(spec)
    for shape in ((1, 32), (3, 4128), (2, 5, 96)):
        values = numbers(shape, dtype, spread=2.0)
        values.view(-1)[7] = -0.0
        for name, arguments, plain, order in fused_cases(values):
            run = getattr(backend, f"{name}_quantize")
            got = run(values, *arguments, fmt) if order == "fmt last" else run(values, arguments[0], fmt, arguments[1])
            expected = reference.quantize(plain(backend), fmt)
            assert isinstance(got, QuantizedTensor) and got.shape == expected.shape and got.dtype == dtype
            for part, tensor in expected.parts.items():
                assert same_bits(got.parts[part], tensor), f"{name} {part}"


def test_nan_goes_by_the_policy_of_the_format(backend: object) -> None:
    values = numbers((2, 64), torch.float32)
    values[1, 3] = math.nan
    packed = backend.silu_mul_quantize(values, values, parse_format("mxfp4"))  # type: ignore[attr-defined]
    assert int(packed.parts["scale"][1, 0]) == 255 and int(packed.parts["scale"][1, 1]) != 255
    with pytest.raises(NonFiniteError):
        backend.silu_mul_quantize(values, values, parse_format("mxfp4:nan_raise"))  # type: ignore[attr-defined]


def test_unaligned_and_strided_inputs(backend: object) -> None:
    storage = numbers((4 * 64 + 1,), torch.float32)
    view, weight = storage[1:].view(4, 64), torch.ones(64)
    assert same_bits(
        backend.rms_norm(view, weight, 1e-5),  # type: ignore[attr-defined]
        backend.rms_norm(view.clone(), weight, 1e-5),  # type: ignore[attr-defined]
    )
    turned = view.reshape(64, 4).T
    assert same_bits(
        backend.hadamard(turned, 16),  # type: ignore[attr-defined]
        reference.hadamard(turned.contiguous(), 16),
    )


def test_empty_tensors(backend: object) -> None:
    empty = torch.empty(0, 32)
    assert backend.rms_norm(empty, torch.ones(32), 1e-5).shape == (0, 32)  # type: ignore[attr-defined]
    assert backend.silu_mul(empty, empty).shape == (0, 32)  # type: ignore[attr-defined]
    assert backend.hadamard(empty, 16).shape == (0, 32)  # type: ignore[attr-defined]
    with pytest.raises(ShapeError, match="empty tensor"):
        backend.silu_mul_quantize(empty, empty, parse_format("mxfp4"))  # type: ignore[attr-defined]
