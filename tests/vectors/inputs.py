"""Inputs of the tests: float32 numbers that hurt, and hypothesis strategies for blocks and matrices."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st

FLOAT32_MAX = float(np.finfo(np.float32).max)
SUBNORMAL = 2.0**-149

# In units of the scale: every tie of E2M1, the ends of the elements, the thresholds of the rules.
MULTIPLES = (
    *(0.0, -0.0, 0.25, 0.5, 0.75, 1.0, -1.25, 1.5, 1.75, -2.5, 3.5, 5.0, -5.0, 6.0, 6.999, 7.0, 7.25, -7.75, 7.99),
    *(8.0, 28.0, 30.0, 240.0, 416.0, 448.0, 464.0, -480.0, 496.0, 511.0, 57344.0, 61440.0, 0.001953125, 127 / 64, 1.99),
)


def float32_matrix(numbers: np.ndarray) -> torch.Tensor:
    """The numbers as a finite float32 matrix."""
    with np.errstate(over="ignore", under="ignore"):
        single = np.clip(numbers, -FLOAT32_MAX, FLOAT32_MAX).astype(np.float32)
    return torch.from_numpy(single)


@st.composite
def matrices(
    draw: st.DrawFn,
    rows: tuple[int, int] = (1, 3),
    cols: tuple[int, int] = (1, 80),
    exponents: tuple[int, int] = (-40, 40),
) -> torch.Tensor:
    """Finite float32 matrices: random numbers around 2^e with some spread, and a few hard ones in places."""
    shape = (draw(st.integers(*rows)), draw(st.integers(*cols)))
    exponent = draw(st.integers(*exponents))
    spread = draw(st.sampled_from([0, 1, 4, 12]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    numbers = generator.standard_normal(shape) * np.exp2(generator.integers(-spread, spread + 1, shape))
    flat = numbers.reshape(-1)
    hard = st.tuples(st.integers(0, flat.size - 1), st.sampled_from(MULTIPLES))
    for place, value in draw(st.lists(hard, max_size=6)):
        flat[place] = value
    if draw(st.integers(0, 15)) == 0:
        numbers[draw(st.integers(0, shape[0] - 1))] = 0.0
    return float32_matrix(np.ldexp(numbers, exponent))


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Same shape, dtype and bits; any NaN is the same NaN."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    equal = left.contiguous().view(integer) == right.contiguous().view(integer)
    return bool((equal | (left.isnan() & right.isnan())).all())


def as_floats(row: torch.Tensor) -> list[float]:
    """A row as Python floats (exact)."""
    return [float(value) for value in row.tolist()]


def ulp_neighbours(values: list[float]) -> list[float]:
    """Every float32 value with the ones beside it, finite and not negative."""
    single = np.array(values, dtype=np.float32)
    with np.errstate(over="ignore", under="ignore"):
        near = np.concatenate([single, np.nextafter(single, np.float32(np.inf)), np.nextafter(single, np.float32(0))])
    return sorted({float(v) for v in near if math.isfinite(v) and v >= 0})
