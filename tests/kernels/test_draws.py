"""Stochastic rounding by a given draw: repeatable, new at each step and place, unbiased, the same on every backend."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernel_levels import LEVELS
from microscale.errors import ArgumentError
from microscale.formats import Draw, parse_format, tensor_place
from microscale.kernels import dequantize, fake_quantize, quantize, reference
from microscale.kernels.cpu import native
from small_models import same_bits
from vectors import exact

SPECS = (
    *("mxfp4:stochastic", "mxfp8:stochastic(3)", "nvfp4:stochastic(1)", "mxint8:stochastic", "int4_asym:stochastic(5)"),
    *(
        "mxfp4_plus:stochastic(2)",
        "mxfp6_plusplus:stochastic",
        "e4m3/channel:fp32:stochastic",
        "e2m1/24:e8m0:stochastic",
    ),
    *("mxfp4:stochastic+sparse2%:fp16", "pair(mxfp4:stochastic,mxfp8:stochastic(2),40%)", "e2m1/4x8:e8m0:stochastic"),
    "segments(mxfp4:stochastic*64,mxfp6_e2m3:stochastic(9)*37)",
)
DRAW = Draw(seed=11, step=3, place=tensor_place("layers.0.weight"))


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.use_level(request.param):
        yield request.param


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spec", SPECS)
def test_backends_agree_at_every_level(level: str, spec: str) -> None:
    values = numbers(13, 101)
    fmt = parse_format(spec)
    expected = reference.quantize(values, fmt, draw=DRAW)
    got = quantize(values, spec, draw=DRAW)
    assert set(got.parts) == set(expected.parts)
    assert all(same_bits(got.parts[name], part) for name, part in expected.parts.items())
    assert same_bits(fake_quantize(values, spec, draw=DRAW), reference.fake_quantize(values, fmt, draw=DRAW))
    assert same_bits(fake_quantize(values, spec, draw=DRAW), dequantize(got))


@pytest.mark.parametrize("spec", SPECS)
def test_a_draw_repeats_and_any_other_is_another(spec: str) -> None:
    values = numbers(13, 101)
    first = fake_quantize(values, spec, draw=DRAW)
    assert same_bits(fake_quantize(values, spec, draw=Draw(seed=11, step=3, place=DRAW.place)), first)
    others = (
        Draw(seed=12, step=3, place=DRAW.place),
        Draw(seed=11, step=4, place=DRAW.place),
        Draw(seed=11, step=3, place=tensor_place("layers.1.weight")),
        None,
    )
    for other in others:
        assert not same_bits(fake_quantize(values, spec, draw=other), first)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.startswith(("pair", "segments"))])
def test_a_seed_in_the_spec_is_that_of_the_default_draw(spec: str) -> None:
    values = numbers(13, 101)
    seed = int(spec.partition("(")[2].partition(")")[0] or 0)
    assert same_bits(fake_quantize(values, spec), fake_quantize(values, spec, draw=Draw(seed=seed)))


def test_a_draw_goes_before_the_seed_of_the_format() -> None:
    values = numbers(4, 64)
    one, other = (fake_quantize(values, f"mxfp4:stochastic({seed})", draw=DRAW) for seed in (1, 2))
    assert same_bits(one, other)
    assert same_bits(fake_quantize(values, "mxfp4", draw=DRAW), fake_quantize(values, "mxfp4"))


def test_parts_of_a_compound_draw_apart() -> None:
    """Segment p draws at place + p."""
    values = numbers(5, 64)
    fmt = "segments(mxfp4:stochastic*32,mxfp4:stochastic*32)"
    pieces = [
        fake_quantize(values[:, 32 * p : 32 * p + 32], "mxfp4:stochastic", draw=Draw(seed=5, step=1, place=9 + p))
        for p in (0, 1)
    ]
    assert same_bits(fake_quantize(values, fmt, draw=Draw(seed=5, step=1, place=9)), torch.cat(pieces, dim=1))


def test_every_element_goes_by_its_own_bits() -> None:
    """Between 1 and 1.5, at position f, an element goes up where f > r / 2^24."""
    values = torch.full((3, 64), 1.3)
    values[:, ::32] = 4.0
    got = fake_quantize(values, "mxfp4:stochastic", draw=DRAW).flatten().tolist()
    position = (values.flatten().double() - 1.0) / 0.5
    for index, f in enumerate(position.tolist()):
        if index % 32:
            bits = exact.random_bits(index, DRAW.seed, DRAW.step, DRAW.place)
            dropped = round(f * 2**22)  # the 22 bits that E2M1 drops of a float32 mantissa
            assert got[index] == (1.5 if dropped > bits >> 2 else 1.0)


@pytest.mark.parametrize("spec", ["mxfp4:stochastic", "mxint8:stochastic", "mxfp4_plus:stochastic"])
def test_the_mean_over_steps_is_the_number(spec: str) -> None:
    """Each element's mean lies within 5.5 standard errors of the number: 64 elements, none in a million by chance."""
    values = numbers(1, 64, seed=4)
    steps = torch.stack([fake_quantize(values, spec, draw=Draw(seed=1, step=step, place=2)) for step in range(4000)])
    inside = values.abs() <= steps.abs().amax(0)  # what saturates is biased
    assert int(inside.sum()) >= 60
    error = (steps.double().mean(0) - values.double()).abs()
    bound = 5.5 * steps.double().std(0) / math.sqrt(len(steps)) + 1e-6 * values.abs()
    assert bool((error <= bound)[inside].all())


@pytest.mark.parametrize("draw", [7, (1, 2, 3), "stochastic"])
def test_what_is_no_draw(draw: object) -> None:
    for call in (quantize, fake_quantize):
        with pytest.raises(ArgumentError, match=r"Draw\(seed=, step=, place=\) or None, got"):
            call(numbers(2, 32), "mxfp4:stochastic", draw=draw)  # type: ignore[arg-type]
