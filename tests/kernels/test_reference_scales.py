"""Scale rules against exact arithmetic: subnormals, powers of two, one ulp around thresholds, both ends of E8M0."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from format_specs import block_format
from microscale.formats import BlockFormat, FloatElement, RuleKind, ScaleRule
from microscale.formats.codec import decode_scale
from microscale.kernels import dequantize, fake_quantize, quantize
from microscale.kernels.reference.scales import ordered_sum
from vectors import exact
from vectors.inputs import FLOAT32_MAX, SUBNORMAL, as_floats, matrices, same_bits, ulp_neighbours

ELEMENTS = ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "e3m4", "e0m3", "e3m0", "int8", "int4", "int2", "ue4m3", "e4m3-b20")
AMAX_RULES = (
    *("floor", "ceil", "rceil", "even", "even(0)", "even(1)", "even(7)", "even(23)"),
    *("threshold(7)", "threshold(7.25)", "threshold(0.1)", "threshold(1000)", "prescale", "prescale(0.6)"),
)
SCALES = ("e8m0", "e5m0", "e4m0-b3", "e2m0-b1")
MANTISSAS = (
    1,
    1.25,
    1.5,
    1.75,
    1.8125,
    1.875,
    1.9375,
    1.96875,
    1.984375,
    1.9921875,
    1.99609375,
    2 - 2**-10,
    2 - 2**-23,
)
EXPONENTS = (-149, -148, -130, -127, -126, -125, -121, -3, 0, 2, 8, 16, 120, 125, 127)
AMAXES = ulp_neighbours(
    [
        0.0,
        *(float(Fraction(m) * exact.two_to(k)) for m in MANTISSAS for k in EXPONENTS),
        *(448 * 2.0**k for k in (-130, -10, 0, 5, 100, 119)),
        *(t * 2.0**k for t in (6, 7, 7.25, 7.5, 28, 57344, 0.1, 1000) for k in (-126, -3, 0, 60)),
        *(3e38, 3.4e38, FLOAT32_MAX, SUBNORMAL, 3 * SUBNORMAL),
    ]
)


def scale_codes(values: torch.Tensor, fmt: BlockFormat) -> list[int]:
    return quantize(values, fmt).parts["scale"].flatten().tolist()


@pytest.mark.parametrize("rule", AMAX_RULES)
@pytest.mark.parametrize("element", ELEMENTS)
def test_power_of_two_rules_of_amax(element: str, rule: str) -> None:
    values = torch.zeros(len(AMAXES), 4)
    values[:, 2] = torch.tensor(AMAXES, dtype=torch.float32)
    if not element.startswith("u"):
        values[::2] *= -1
    values[:, 0] = values[:, 2] / 3
    exponents = [exact.rule_exponent([Fraction(a)], block_format(f"{element}/4:e8m0:{rule}")) for a in AMAXES]
    for scale in SCALES:
        fmt = block_format(f"{element}/4:{scale}:{rule}")
        expected = [exact.scale_code(exponent, fmt.scale) for exponent in exponents]
        assert scale_codes(values, fmt) == expected


@pytest.mark.parametrize(
    "spec, amax, code",
    [
        # OCP MX v1.0 section 6.3: floor(log2 amax) - e_max, biased by 127
        ("mxfp4", 6.0, 127),
        ("mxfp4", 7.999, 127),
        ("mxfp4", 8.0, 128),
        ("mxfp4:ceil", 4.0, 127),
        ("mxfp4:ceil", 4.000001, 128),
        ("mxfp4:rceil", 6.0, 127),
        ("mxfp4:rceil", 6.000001, 128),
        ("mxfp4:even", 6.999, 127),
        ("mxfp4:even", 7.0, 128),
        ("mxfp4:threshold(7.25)", 7.25, 127),
        ("mxfp4:threshold(7.25)", 7.250001, 128),
        ("mxfp4:prescale", 7.999, 127),
        ("mxfp8:floor", 511.0, 127),
        ("mxfp8:rceil", 448.0, 127),  # 448 * 2^k exactly fits
        ("mxfp8:rceil", 448.00003, 128),
        ("mxfp8:even(1)", 447.9, 127),
        ("mxfp8:even(1)", 448.0, 128),  # compressed-tensors rounds this one up
        ("mxfp8:even", 495.9, 127),
        ("mxfp8:even", 496.0, 128),
        ("mxint8:floor", 1.999, 127),
        ("mxint8:rceil", 127 / 64, 127),
        ("mxint8:rceil", 1.985, 128),
        # both ends of E8M0
        ("mxfp4", 2.0**-125, 0),
        ("mxfp4", 2.0**-124, 1),
        ("mxfp4", SUBNORMAL, 0),
        ("mxfp4", FLOAT32_MAX, 252),
        ("mxfp4:rceil", FLOAT32_MAX, 253),
        ("mxint8:ceil", FLOAT32_MAX, 254),
        ("mxint8:threshold(0.1)", FLOAT32_MAX, 254),
        ("e0m3/32:e8m0:ceil", FLOAT32_MAX, 254),
        ("mxfp8", 0.0, 0),
    ],
)
def test_scale_codes_by_number(spec: str, amax: float, code: int) -> None:
    values = torch.zeros(1, 32)
    values[0, 5] = amax
    assert scale_codes(values, block_format(spec)) == [code]


@pytest.mark.parametrize("percent", [100.0, 99.9, 99.0, 96.875, 50.0, 3.125, 0.01])
@pytest.mark.parametrize("block", ["32", "channel"])
def test_percentile_is_the_nearest_rank(block: str, percent: float) -> None:
    cols = 1000 if block == "channel" else 64
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(3, cols, generator=generator) * torch.exp2(
        torch.randint(-9, 9, (3, cols), generator=generator)
    )
    fmt = block_format(f"e2m1/{block}:e8m0:percentile({percent})")
    blocks = values.reshape(-1, 32) if block == "32" else values
    expected = [
        exact.scale_code(exact.rule_exponent([abs(Fraction(v)) for v in as_floats(row)], fmt), fmt.scale)
        for row in blocks
    ]
    assert scale_codes(values, fmt) == expected


def test_percentile_ranks_of_every_block_size() -> None:
    """99.9 % of 1000 is the 999th number, whatever 99.9 / 100 * 1000 is in floats."""
    for size, percent, rank in [(1000, 99.9, 999), (1000, 99.5, 995), (10, 70.0, 7), (100, 29.0, 29), (3, 1.0, 1)]:
        values = torch.exp2(torch.arange(1, size + 1) / size * 20).reshape(1, size)
        values = torch.where(torch.arange(size) < rank, 1.0, 64.0).reshape(1, size)
        code = scale_codes(values, block_format(f"e2m1/channel:e8m0:percentile({percent})"))
        assert code == [127 - 2], (size, percent)  # 2^ceil(log2(1 / 6))


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 16, 31, 33, 100])
def test_sums_are_taken_by_halves(size: int) -> None:
    """The order of docs/reference/formats.md, in plain Python floats."""
    values = torch.randn(5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    expected: list[float] = []
    for row in values.exp().tolist():
        terms = row + [0.0] * ((1 << max(size - 1, 0).bit_length()) - size)
        while len(terms) > 1:
            half = len(terms) // 2
            terms = [terms[i] + terms[i + half] for i in range(half)]
        expected.append(terms[0])
    assert ordered_sum(values.exp()).tolist() == expected


def test_a_deviation_past_the_largest_float32_leaves_finite_scales() -> None:
    values = torch.full((1, 32), 3e38)
    values[0, ::2] = -3e38
    packed = quantize(values, "e2m1/16:e4m3+fp32:std(9)")
    assert bool(torch.isfinite(packed.parts["tensor_inv_scale"]).all()) and packed.parts["tensor_inv_scale"] > 0
    assert torch.equal(dequantize(packed).sign(), values.sign())


@settings(max_examples=60, deadline=None)
@given(matrices(rows=(2, 4), cols=(32, 32), exponents=(-140, 120)), st.sampled_from([2.92247856, 3.0, 0.5]))
def test_std_is_the_population_standard_deviation(values: torch.Tensor, clip: float) -> None:
    fmt = block_format(f"e2m1/32:e8m0:std({clip})")
    for row, code in zip(values, scale_codes(values, fmt), strict=True):
        numbers = [Fraction(v) for v in as_floats(row)]
        mean = sum(numbers, Fraction(0)) / 32
        variance = sum(((v - mean) ** 2 for v in numbers), Fraction(0)) / 32
        squared = variance * (Fraction(clip) / 6) ** 2
        exponent = exact.floor_log2(squared) // 2 if squared else None
        assert code == exact.scale_code(exponent, fmt.scale)


def exact_squared_error(numbers: list[Fraction], factor: Fraction, fmt: BlockFormat) -> Fraction:
    error = Fraction(0)
    for value in numbers:
        code = exact.encode(abs(value) / factor, value < 0, fmt.element)
        error += (Fraction(exact.decode(fmt.element, code)) * factor - value) ** 2
    return error


@pytest.mark.parametrize(
    "spec",
    [
        "mxfp4:mse",
        "mxfp4:mse(-2,2)",
        "mxfp4:mse(0,0)",
        "mxfp4:mse(0,1)",
        "mxint4:mse",
        "mxfp8:mse",
        "mxfp6_e3m2:mse(-3,1)",
    ],
)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_mse_picks_the_least_squared_error_and_the_smallest_of_equals(spec: str, data: st.DataObject) -> None:
    """Whole numbers, so that the float64 sums are exact and ties are true ties."""
    fmt = block_format(spec)
    top = data.draw(st.sampled_from([3, 12, 100, 4000]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    row = np.random.default_rng(seed).integers(-top, top + 1, 32)
    if data.draw(st.booleans()):
        row[data.draw(st.integers(0, 31))] = 4 * top
    numbers = [Fraction(int(v)) for v in row]
    low, high = (int(v) for v in fmt.rule.arguments)
    amax = max(abs(v) for v in numbers)
    expected = 0
    if amax:
        start = exact.floor_log2(amax) - exact.floor_log2(exact.max_magnitude(fmt.element))
        candidates = range(start + low, start + high + 1)
        expected = min(candidates, key=lambda e: (exact_squared_error(numbers, exact.two_to(e), fmt), e)) + 127
    values = torch.tensor(row, dtype=torch.float32).reshape(1, 32)
    assert scale_codes(values, fmt) == [expected]


def test_mse_is_never_worse_than_floor_and_finds_the_better_neighbour() -> None:
    values = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    errors = {
        rule: (fake_quantize(values, f"mxfp4:{rule}") - values).double().square().sum(-1)
        for rule in ("mse", "floor", "mse(0,1)", "mse(1,1)")
    }
    assert bool((errors["mse"] <= errors["floor"]).all())
    assert torch.equal(errors["mse(0,1)"], torch.minimum(errors["floor"], errors["mse(1,1)"]))


# ------------------------------------------------------------------------------------------------ float scales

FLOAT_AMAXES = [a for a in AMAXES if a == 0 or a > 1e-44] + [
    float(a) for a in np.linspace(0.01, 3000, 997, dtype=np.float32)
]


def stored_values(values: torch.Tensor, fmt: BlockFormat) -> list[float]:
    return decode_scale(quantize(values, fmt).parts["scale"], fmt.scale).flatten().tolist()


def exact_stored(raw: float, scale: FloatElement, upward: bool) -> float:
    """The scale's value nearest to raw (ties to even), or the smallest one not below it; saturating."""
    if scale.bits == 32:
        return raw
    code = exact.encode(Fraction(raw), False, scale)
    if upward:
        code = exact.encode(Fraction(raw), False, scale, exact.Rounding.TOWARD_ZERO)
        code += exact.grid(scale)[code] < Fraction(raw) and code < exact.num_finite(scale) - 1
    return exact.decode(scale, code)


@pytest.mark.parametrize("scale", ["e4m3", "ue4m3", "e5m2", "e3m4", "fp16", "bf16", "fp32"])
@pytest.mark.parametrize("rule", ["amax", "rceil", "threshold(7.25)"])
@pytest.mark.parametrize("element", ["e2m1", "int4", "e4m3"])
def test_float_scales(element: str, rule: str, scale: str) -> None:
    fmt = block_format(f"{element}/4:{scale}:{rule}")
    amaxes = FLOAT_AMAXES if fmt.scale.bits <= 8 or element == "e2m1" else FLOAT_AMAXES[::7]
    values = torch.zeros(len(amaxes), 4)
    values[:, 1] = torch.tensor(amaxes, dtype=torch.float32)
    divisor = fmt.rule.arguments[0] if fmt.rule.arguments else float(exact.max_magnitude(fmt.element))
    for amax, stored in zip(amaxes, stored_values(values, fmt), strict=True):
        raw = float(np.float32(amax) / np.float32(divisor))
        assert stored == exact_stored(raw, fmt.scale, rule == "rceil"), amax


@pytest.mark.parametrize(
    "spec", ["e2m1/16:e4m3:std(3)", "int4/16:fp16:percentile(90)", "e2m1/16:bf16:std", "int8/16:e4m3:percentile(50)"]
)
@settings(max_examples=25, deadline=None)
@given(values=matrices(rows=(2, 3), cols=(16, 16), exponents=(-8, 8)))
def test_float_scales_from_the_whole_block(spec: str, values: torch.Tensor) -> None:
    fmt = block_format(spec)
    top = float(exact.max_magnitude(fmt.element))
    for row, stored in zip(values.double().numpy(), stored_values(values, fmt), strict=True):
        if fmt.rule.kind is RuleKind.STD:
            raw = float(np.float32(np.std(row) * (fmt.rule.arguments[0] / top)))
            options = {exact_stored(float(v), fmt.scale, False) for v in ulp_neighbours([raw])}
            assert stored in options  # the float64 sum may round either way before float32
        else:
            ranked = exact.nearest_rank([abs(Fraction(float(v))) for v in row], fmt.rule.arguments[0])
            raw = float(np.float32(float(ranked)) / np.float32(top))
            assert stored == exact_stored(raw, fmt.scale, True)


def least_squares_oracle(row: np.ndarray, fmt: BlockFormat, low: float, high: float) -> float:
    """The search of docs/reference/formats.md for one block in NumPy; returns the stored scale."""
    top = np.float32(float(exact.max_magnitude(fmt.element)))

    def rounded(factor: np.float32) -> np.ndarray:
        if not factor > 0:
            return np.zeros(len(row))
        scaled = (row / factor).astype(np.float32)
        codes = [exact.encode(abs(Fraction(float(v))), bool(v < 0), fmt.element) for v in scaled]
        return np.array([exact.decode(fmt.element, code) for code in codes])

    def error(stored: float) -> float:
        values = (rounded(np.float32(stored)).astype(np.float32) * np.float32(stored)).astype(np.float32)
        return float(np.sum(np.square((values - row).astype(np.float64))))

    full = np.float32(np.abs(row).max()) / top
    best = exact_stored(float(full), fmt.scale, False)
    for step in range(16):
        codes = rounded(np.float32(full * np.float32(low + (high - low) * step / 15)))
        energy = float(np.sum(codes**2))
        fitted = float(np.sum(codes * row.astype(np.float64))) / energy if energy else 0.0
        stored = exact_stored(max(0.0, float(np.float32(fitted))), fmt.scale, False)
        if error(stored) < error(best):
            best = stored
    return best


@pytest.mark.parametrize("spec", ["e2m1/16:fp32:mse", "e2m1/16:e4m3:mse(0.5,1.2)", "int4/16:fp16:mse"])
def test_mse_over_a_float_scale(spec: str) -> None:
    fmt = block_format(spec)
    low, high = fmt.rule.arguments
    generator = np.random.default_rng(11)
    rows = generator.integers(-40, 41, (12, 16)).astype(np.float32) / 8
    rows[3] = 0
    expected = [least_squares_oracle(row, fmt, low, high) for row in rows]
    assert stored_values(torch.from_numpy(rows), fmt) == pytest.approx(expected, rel=2**-23)
    plain = BlockFormat(element=fmt.element, block=fmt.block, scale=fmt.scale, rule=ScaleRule.AMAX)
    values = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    better = (fake_quantize(values, fmt) - values).double().square().sum(-1)
    assert bool((better <= (fake_quantize(values, plain) - values).double().square().sum(-1)).all())


# -------------------------------------------------------------------------------------------------- two levels


@settings(max_examples=60, deadline=None)
@given(matrices(rows=(1, 3), cols=(16, 48), exponents=(-145, 125)))
def test_nvfp4_scales_step_by_step_in_float32(values: torch.Tensor) -> None:
    values = values[:, : values.shape[1] // 16 * 16]
    fmt = block_format("nvfp4")
    packed = quantize(values, fmt)
    inv_scale = exact.f32_inverse_scale(float(values.abs().max()), 448.0 * 6.0)
    assert packed.parts["tensor_inv_scale"].item() == float(inv_scale)
    restored = dequantize(packed)
    for row in range(values.shape[0]):
        for block in range(values.shape[1] // 16):
            place = slice(16 * block, 16 * block + 16)
            expected = exact.quantize_float_scale_block(as_floats(values[row, place]), fmt, inv_scale)
            assert packed.parts["scale"][row, block].item() == expected.scale
            assert same_bits(restored[row, place], torch.tensor(expected.values))


@pytest.mark.parametrize("spec", ["mxfp4:prescale(0.1)", "e2m1/16:e4m3+fp32:threshold(0.001)", "mxint8:prescale(0.01)"])
def test_no_scale_reaches_infinity(spec: str) -> None:
    """A factor past float32 stops at its largest number: zeros stay zeros beside the largest float32."""
    values = torch.zeros(1, 32)
    values[0, 0], values[0, 1] = FLOAT32_MAX, 1.0
    restored = fake_quantize(values, spec)
    assert not bool(restored.isnan().any())
    assert not restored[0, 2:].any()


def test_the_second_level_of_a_tensor_of_zeros_and_of_subnormals() -> None:
    zeros = quantize(torch.zeros(2, 32), "nvfp4")
    assert zeros.parts["tensor_inv_scale"].item() == 1.0
    assert not zeros.parts["scale"].any() and not zeros.parts["codes"].any()
    tiny = quantize(torch.full((1, 16), SUBNORMAL), "nvfp4")
    assert tiny.parts["tensor_inv_scale"].item() == FLOAT32_MAX
    assert bool(dequantize(tiny).isfinite().all())
    huge = fake_quantize(torch.full((1, 16), 3e38), "nvfp4")
    assert huge[0, 0].item() == pytest.approx(3e38, rel=2**-20)


@pytest.mark.parametrize(
    "spec, numerator",
    [
        ("nvfp4", 448 * 6),
        ("nvfp4:threshold(7)", 448 * 7),
        ("int4/16:e4m3+fp32", 448 * 1.75),
        ("e2m1/16:fp16+fp32", 65504 * 6),
    ],
)
def test_the_second_level_maps_the_largest_scale_to_the_scales_maximum(spec: str, numerator: float) -> None:
    values = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    packed = quantize(values, spec)
    assert packed.parts["tensor_inv_scale"].item() == float(
        exact.f32_inverse_scale(float(values.abs().max()), numerator)
    )
    fmt = block_format(spec)
    stored = decode_scale(packed.parts["scale"], fmt.scale)
    assert float(stored.max()) == pytest.approx(fmt.scale.max_value, rel=2**-9)


# ------------------------------------------------------------------------------------- amax from a statistic


@pytest.mark.parametrize(
    "spec", ["mxfp4", "mxfp8:even", "mxfp4_plus", "e4m3/channel:fp32", "int8/16:fp16:rceil", "mxint8:ceil"]
)
def test_a_given_amax_of_each_block_replaces_the_measured_one(spec: str) -> None:
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    fmt = block_format(spec)
    grid = quantize(values, spec).parts["scale"].shape
    measured = values.reshape(grid[0], grid[1], -1).abs().amax(-1)
    assert same_bits(fake_quantize(values, spec, amax=measured), fake_quantize(values, spec))
    doubled = quantize(values, spec, amax=measured * 2)
    stored, plain = (decode_scale(q.parts["scale"], fmt.scale) for q in (doubled, quantize(values, spec)))
    assert torch.allclose(stored, plain * 2, rtol=2**-9)
    broadcast = quantize(values, spec, amax=measured.max())
    assert broadcast.parts["scale"].unique().numel() == 1


@pytest.mark.parametrize(
    "spec", ["nvfp4", "nvfp4_plus", "int4/16:e4m3+fp32:threshold(1.5)", "e4m3/tensor:fp32", "int8/tensor:e8m0"]
)
def test_a_given_amax_of_the_tensor(spec: str) -> None:
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(4))
    largest = values.abs().max()
    assert same_bits(fake_quantize(values, spec, amax=largest), fake_quantize(values, spec))
    wider = fake_quantize(values, spec, amax=largest * 8)
    assert bool(wider.isfinite().all()) and float(wider.abs().max()) <= float(largest) * 1.2
    clipped = fake_quantize(values, spec, amax=largest / 8)
    assert float(clipped.abs().max()) < float(largest) / 4, "what lies above a given maximum saturates"
