"""The enums that the extension and its Python wrappers share (``csrc/cpu/enums.h``), under the same names.

Members count from 0. The extension exports its own (``_native.enums()``); a test compares the two, so that no number
can drift.
"""

from __future__ import annotations

from enum import IntEnum

import torch

Dtype = IntEnum("Dtype", "F32 BF16 F16", start=0)
"""The dtype of values and results."""

DTYPES = {torch.float32: Dtype.F32, torch.bfloat16: Dtype.BF16, torch.float16: Dtype.F16}

Rounding = IntEnum("Rounding", "NEAREST_EVEN NEAREST_AWAY TOWARD_ZERO STOCHASTIC", start=0)
""":class:`microscale.formats.Rounding`."""

Storage = IntEnum("Storage", "CODE8 F16 BF16 F32", start=0)
"""How a scale lies in memory."""

Statistic = IntEnum("Statistic", "AMAX PERCENTILE RANGE DEVIATION", start=0)
"""Which number of the block a scale rule looks at."""

Rule = IntEnum("Rule", "EXPONENT NEAREST UP SEARCH FIT", start=0)
"""What a scale rule makes of its statistic."""

Extension = IntEnum("Extension", "NONE PLUS PLUSPLUS", start=0)
""":class:`microscale.formats.Extension`."""

ZeroPoint = IntEnum("ZeroPoint", "NONE INTEGER NUMBER", start=0)
"""Whether a block has a zero point, and of which kind."""

Decoding = IntEnum("Decoding", "TABLE TABLE16 SMALL_FLOAT INTEGER", start=0)
"""How codes of an element become float32 in vectors."""

ScaleKind = IntEnum("ScaleKind", "POWER_OF_TWO TABLE F16 BF16 F32", start=0)
"""How a stored scale becomes a factor in linear."""

Extra = IntEnum("Extra", "NONE LOW LARGEST ZERO_POINT", start=0)
"""What a block of a weight has beside elements and scale."""

ElementKind = IntEnum("ElementKind", "TABLE INTEGER FLOAT8", start=0)
"""How element codes become floats in linear."""

ZeroKind = IntEnum("ZeroKind", "TABLE F16", start=0)
"""How a stored zero point becomes a float in linear."""

ActRule = IntEnum("ActRule", "KEEP INTEGER NUMBER", start=0)
"""How activations are used: as they are, as integers of a format, or rounded to a format."""

Combine = IntEnum("Combine", "CONCATENATE SILU_MUL", start=0)
"""What becomes of the outputs of several weights: :class:`microscale.kernels.operands.Combine`."""

FusedOperation = IntEnum("FusedOperation", "RMS_NORM SILU_MUL GATHER HADAMARD", start=0)
"""An operation that quantizes what it computes."""

Gate = IntEnum("Gate", "SILU GELU_TANH", start=0)
"""The activation function of a gated layer: :class:`microscale.kernels.operands.Gate`."""
