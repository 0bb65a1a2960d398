"""The enums that the extension and its Python wrappers share (``csrc/cpu/enums.h``), under the same names.

The extension exports its own (``_native.enums()``); a test compares the two, so that no number can drift.
"""

from __future__ import annotations

from enum import IntEnum

import torch


class Dtype(IntEnum):
    """The dtype of values and results."""

    F32 = 0
    BF16 = 1
    F16 = 2


DTYPES = {torch.float32: Dtype.F32, torch.bfloat16: Dtype.BF16, torch.float16: Dtype.F16}


class Rounding(IntEnum):
    """:class:`microscale.formats.Rounding`."""

    NEAREST_EVEN = 0
    NEAREST_AWAY = 1
    TOWARD_ZERO = 2
    STOCHASTIC = 3


class Storage(IntEnum):
    """How a scale lies in memory."""

    CODE8 = 0
    F16 = 1
    BF16 = 2
    F32 = 3


class Statistic(IntEnum):
    """Which number of the block a scale rule looks at."""

    AMAX = 0
    PERCENTILE = 1
    RANGE = 2
    DEVIATION = 3


class Rule(IntEnum):
    """What a scale rule makes of its statistic."""

    EXPONENT = 0
    NEAREST = 1
    UP = 2
    SEARCH = 3
    FIT = 4


class Extension(IntEnum):
    """:class:`microscale.formats.Extension`."""

    NONE = 0
    PLUS = 1
    PLUSPLUS = 2


class ZeroPoint(IntEnum):
    """Whether a block has a zero point, and of which kind."""

    NONE = 0
    INTEGER = 1
    NUMBER = 2


class Decoding(IntEnum):
    """How codes of an element become float32 in vectors."""

    TABLE = 0
    TABLE16 = 1
    SMALL_FLOAT = 2
    INTEGER = 3


class ScaleKind(IntEnum):
    """How a stored scale becomes a factor in linear."""

    POWER_OF_TWO = 0
    TABLE = 1
    F16 = 2
    BF16 = 3
    F32 = 4


class Extra(IntEnum):
    """What a block of a weight has beside elements and scale."""

    NONE = 0
    LOW = 1
    LARGEST = 2
    ZERO_POINT = 3


class ElementKind(IntEnum):
    """How element codes become floats in linear."""

    TABLE = 0
    INTEGER = 1
    FLOAT8 = 2


class ZeroKind(IntEnum):
    """How a stored zero point becomes a float in linear."""

    TABLE = 0
    F16 = 1


class ActRule(IntEnum):
    """How activations are used: as they are, as integers of a format, or rounded to a format."""

    KEEP = 0
    INTEGER = 1
    NUMBER = 2


class Combine(IntEnum):
    """What becomes of the outputs of several weights."""

    CONCATENATE = 0
    """They stand side by side."""
    SILU_MUL = 1
    """Of two weights: silu(first) * second."""


class FusedOperation(IntEnum):
    """An operation that quantizes what it computes."""

    RMS_NORM = 0
    SILU_MUL = 1
    GATHER = 2
    HADAMARD = 3


class Gate(IntEnum):
    """The activation function of a gated layer."""

    SILU = 0
    GELU_TANH = 1
