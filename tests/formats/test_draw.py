"""Draws of stochastic rounding: the key by its formula, places by name, and what is refused."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microscale.errors import FormatError
from microscale.formats import BlockFormat, Draw, parse_format, tensor_place
from microscale.formats.codec import random_bits
from microscale.formats.draw import part_draw
from vectors import exact

numbers = st.integers(0, 2**70)


@given(numbers, numbers, numbers, st.integers(0, 2**40))
def test_random_bits_follow_their_formula(seed: int, step: int, place: int, index: int) -> None:
    draw = Draw(seed=seed, step=step, place=place)
    assert random_bits(torch.tensor([index]), draw).tolist() == [exact.random_bits(index, seed, step, place)]


def test_the_seed_of_a_format_is_its_default_draw() -> None:
    fmt = parse_format("mxfp4:stochastic(42)")
    assert isinstance(fmt, BlockFormat) and fmt.default_draw == Draw(seed=42) == Draw(seed=42, step=0, place=0)
    assert random_bits(torch.arange(4), fmt.default_draw).tolist() == [7297672, 16741821, 13293177, 3862093]


def test_draws_of_other_steps_places_and_seeds_are_independent() -> None:
    """Two independent streams of 24 bits agree in a number with a chance of 2^-24, and correlate by 1 / sqrt(n)."""
    indices = torch.arange(20_000)
    first = random_bits(indices, Draw(seed=1, step=1, place=1)).double()
    for fields in ({"seed": 2}, {"step": 2}, {"place": 2}, {"step": 0}, {"place": 0}, {"step": 0, "place": 0}):
        other = random_bits(indices, Draw(**{"seed": 1, "step": 1, "place": 1, **fields})).double()
        assert int((first == other).sum()) <= 2
        assert abs(float(torch.corrcoef(torch.stack([first, other]))[0, 1])) < 5 / 20_000**0.5
    swapped = random_bits(torch.arange(5), Draw(seed=1, step=2, place=3))
    assert not torch.equal(swapped, random_bits(torch.arange(5), Draw(seed=1, step=3, place=2)))
    keys = {Draw(seed=3, step=step, place=place).key for step in range(100) for place in range(100)}
    assert len(keys) >= 10_000 - 2


def test_places_come_from_names() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    digest = hashlib.sha256(name.encode()).digest()
    assert tensor_place(name) == sum(byte << (8 * i) for i, byte in enumerate(digest[:8])) % 2**62
    assert len({tensor_place(f"layers.{i}.weight") for i in range(1000)}) == 1000


def test_parts_draw_at_places_of_their_own() -> None:
    draw = Draw(seed=1, step=2, place=3)
    assert [part_draw(draw, index) for index in (0, 2)] == [draw, Draw(seed=1, step=2, place=5)]
    assert part_draw(None, 1) is None


@pytest.mark.parametrize("value", [-1, 1.0, True, None, "7"])
@pytest.mark.parametrize("field", ["seed", "step", "place"])
def test_draws_that_are_none(field: str, value: object) -> None:
    with pytest.raises(FormatError, match=f"{field} of a draw must be a whole number from 0 on, got"):
        Draw(**{field: value})  # type: ignore[arg-type]
