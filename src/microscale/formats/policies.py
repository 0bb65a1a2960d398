"""Named policies of a format: rounding, overflow, NaN and Inf.

They are values in the format record (never booleans) and so travel with the checkpoint.
"""

from __future__ import annotations

from enum import Enum


class Rounding(Enum):
    """How a scaled number becomes one of the element's values."""

    NEAREST_EVEN = "nearest_even"
    """To the nearest value; a tie goes to the even code (OCP MX v1.0 section 5.3 asks for it)."""
    NEAREST_AWAY = "nearest_away"
    """To the nearest value; a tie goes away from zero."""
    TOWARD_ZERO = "toward_zero"
    """To the next value toward zero."""
    STOCHASTIC = "stochastic"
    """Up with a probability equal to the position between the two neighbours; repeatable by its draw (see ``Draw``)."""


class Overflow(Enum):
    """What a scaled number past the element's largest finite value becomes after rounding."""

    SATURATE = "saturate"
    """The largest finite value with the number's sign."""
    NONFINITE = "nonfinite"
    """The element's infinity, or its NaN where it has no infinity (only elements that have one of them)."""


class NaNPolicy(Enum):
    """What NaN in the input does."""

    POISON_BLOCK = "nan_poison"
    """The block's scale becomes NaN, so that every value of the block reads NaN (OCP MX v1.0 section 6.2)."""
    RAISE = "nan_raise"
    """:class:`~microscale.errors.NonFiniteError`."""


class InfPolicy(Enum):
    """What an infinity in the input does."""

    AS_NAN = "inf_nan"
    """The same as NaN."""
    SATURATE = "inf_saturate"
    """It counts as the largest finite float32 with its sign."""
