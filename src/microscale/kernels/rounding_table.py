"""RoundingTable: the rounding of a format's elements as a look-up among the places where it steps.

Rounding never falls as its input rises, so it is known by its results and by the smallest float32 that gives each of
them. The places are found once for each element, by bisection on the float32 numbers with the reference encoder as the
judge; after that a number is rounded by one binary search in place of the encoder's bit arithmetic.
"""

from __future__ import annotations

import functools
from enum import Enum

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microscale.formats import BlockFormat, FloatElement
from microscale.formats.codec import decode, encode
from microscale.kernels.reference.decode import decode_largest
from microscale.kernels.reference.encode import encode_largest
from microscale.kernels.straight_through import RoundingFunction


class Zeros(Enum):
    """What sign a zero has: that of the number which was rounded to it, or always plus."""

    SIGNED = "signed"
    PLAIN = "plain"


class RoundingTable:
    """A rounding function of float32 numbers, tabulated.

    ``numbers`` [n]: its results in rising order, without NaN. ``steps`` [n - 1]: steps[i] is the smallest float32 that
    becomes numbers[i + 1]. ``nan``: what NaN becomes.
    """

    def __init__(self, function: RoundingFunction, numbers: Float[Tensor, "n"], zeros: Zeros) -> None:
        self.numbers = numbers
        self.steps = _steps(function, numbers)
        self.nan = float(function(torch.tensor([torch.nan]))[0])
        self.zeros = zeros

    def to(self, device: torch.device) -> RoundingTable:
        """Return the table on a device."""
        moved = object.__new__(RoundingTable)
        moved.numbers, moved.steps = self.numbers.to(device), self.steps.to(device)
        moved.nan, moved.zeros = self.nan, self.zeros
        return moved

    def __call__(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the rounded numbers."""
        rounded = self.numbers[torch.searchsorted(self.steps, values.contiguous(), right=True, out_int32=True)]
        if self.zeros is Zeros.SIGNED:
            rounded = torch.copysign(rounded, values)
        return torch.where(values.isnan(), self.nan, rounded)


@functools.lru_cache(maxsize=128)
def element_table(fmt: BlockFormat, device: torch.device) -> RoundingTable | None:
    """Return how the elements of a format are rounded, before the factor of their block; None for those of more than 8
    bits, and where overflow becomes NaN.
    """
    if fmt.element.bits > 8:
        return None

    def function(values: Tensor) -> Tensor:
        codes = encode(values, fmt.element, rounding=fmt.rounding, overflow=fmt.overflow)
        return decode(codes, fmt.element)

    every = decode(torch.arange(2**fmt.element.bits).to(torch.uint8), fmt.element)
    reached = function(torch.cat([every[~every.isnan()], torch.tensor([-torch.inf, torch.inf])]))
    if bool(reached.isnan().any()):
        return None
    zeros = Zeros.SIGNED if isinstance(fmt.element, FloatElement) and fmt.element.signed else Zeros.PLAIN
    return RoundingTable(function, torch.unique(reached), zeros).to(device)


@functools.lru_cache(maxsize=128)
def largest_table(fmt: BlockFormat, device: torch.device) -> RoundingTable:
    """Return how the largest elements of a format are rounded, before the factor of their block (MX+)."""

    def function(values: Tensor) -> Tensor:
        return decode_largest(encode_largest(values, fmt), fmt)

    numbers = torch.tensor(fmt.largest_values(), dtype=torch.float32)
    return RoundingTable(function, torch.unique(numbers), Zeros.PLAIN).to(device)


def _steps(function: RoundingFunction, numbers: Float[Tensor, "n"]) -> Float[Tensor, "m"]:
    """Find, between neighbours of ``numbers``, the smallest float32 that becomes the upper one."""
    upper = numbers[1:]
    below, found = _place_of(numbers[:-1]), _place_of(upper)  # the lower one becomes itself, as the upper one does
    while bool((found - below > 1).any()):
        middle = torch.div(found + below, 2, rounding_mode="floor")
        is_upper = function(_number_at(middle)) >= upper
        found, below = torch.where(is_upper, middle, found), torch.where(is_upper, below, middle)
    return _number_at(found)


def _place_of(values: Float[Tensor, "n"]) -> Int[Tensor, "n"]:
    """Return the place of float32 numbers among all of them in rising order, 0 at zero."""
    bits = (values + 0.0).view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _number_at(places: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    magnitudes = places.abs().to(torch.int32).view(torch.float32)
    return torch.where(places < 0, -magnitudes, magnitudes)
