"""How activations are quantized: a format, and where its range comes from.

Written ``FORMAT[@RANGE]``: ``mxfp8``, ``nvfp4@static``, ``e4m3/tensor:fp32@ema(0.99)``, ``nvfp4@window(16)``.
Ranges other than dynamic need a format whose scale belongs to the tensor or a channel: the scale of a small block
always comes from the numbers at hand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from microscale.errors import FormatError, FormatSpecError
from microscale.formats.block import BlockFormat
from microscale.formats.block_shape import ChannelBlock, TensorBlock
from microscale.formats.fields import check_fields
from microscale.formats.registry import format_name, parse_format
from microscale.formats.rules import AMAX_RULES, number_word
from microscale.formats.segmented import Format


class RangeKind(Enum):
    """Where the maximum of an activation tensor comes from."""

    DYNAMIC = "dynamic"
    """From the tensor at hand."""
    STATIC = "static"
    """From calibration; the checkpoint holds it."""
    EMA = "ema"
    """An exponential moving average over the calls so far."""
    WINDOW = "window"
    """The maximum over the last calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationSpec:
    """A format for activations with its range.

    ``argument`` is the decay of ``ema`` (0 to 1) or the number of calls of ``window``; 0 for the others.

    Raises:
        FormatError: a range that the format's scale cannot take, or an argument out of range.
    """

    format: Format
    range: RangeKind = RangeKind.DYNAMIC
    argument: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.range is RangeKind.EMA and not 0 < self.argument < 1:
            raise FormatError(f"the decay of ema is between 0 and 1, got {self.argument}")
        if self.range is RangeKind.WINDOW and not (self.argument >= 1 and float(self.argument).is_integer()):
            raise FormatError(f"the length of a window is a whole number of calls, got {self.argument}")
        if self.range not in (RangeKind.EMA, RangeKind.WINDOW) and self.argument != 0:
            raise FormatError(f"range {self.range.value} takes no argument, got {self.argument}")
        if self.range is RangeKind.DYNAMIC:
            return
        fmt = self.format
        takes_range = isinstance(fmt, BlockFormat) and (
            fmt.tensor_scale is not None or isinstance(fmt.block, TensorBlock | ChannelBlock)
        )
        uses_amax = isinstance(fmt, BlockFormat) and fmt.rule.kind in AMAX_RULES
        if not (takes_range and uses_amax):
            raise FormatError(
                f"range {self.range.value} needs a format whose scale is per tensor or channel and follows from amax,"
                f" such as nvfp4 or e4m3/tensor:fp32; {format_name(fmt)} takes its scales from each block at hand"
            )

    @property
    def num_ranges(self) -> int:
        """How many maxima are kept from call to call: none for dynamic, one, or the length of the window."""
        if self.range is RangeKind.DYNAMIC:
            return 0
        return int(self.argument) if self.range is RangeKind.WINDOW else 1

    def __str__(self) -> str:
        text = format_name(self.format)
        if self.range is RangeKind.DYNAMIC:
            return text
        argument = f"({number_word(self.argument)})" if self.range in (RangeKind.EMA, RangeKind.WINDOW) else ""
        return f"{text}@{self.range.value}{argument}"


_RANGE = re.compile(r"(static|dynamic|ema|window)(?:\(([0-9.eE+-]+)\))?$")
_DEFAULT_ARGUMENT = {RangeKind.EMA: 0.99, RangeKind.WINDOW: 16.0}


def parse_activation(spec: str | Format | ActivationSpec) -> ActivationSpec:
    """Return the activation setting that a spec stands for; records pass through.

    Raises:
        FormatSpecError: an unknown format or range, with a pointer to it.
    """
    if isinstance(spec, ActivationSpec):
        return spec
    if not isinstance(spec, str):
        return ActivationSpec(format=parse_format(spec))
    spec = spec.strip()
    head, at, tail = spec.partition("@")
    fmt = parse_format(head)
    if not at:
        return ActivationSpec(format=fmt)
    match = _RANGE.match(tail)
    remedy = "a range is @dynamic, @static, @ema(0.99) or @window(16)"
    if not match:
        raise FormatSpecError(spec, len(head) + 1, f"unknown range {tail!r}", remedy)
    kind = RangeKind(match[1])
    try:
        argument = float(match[2]) if match[2] else _DEFAULT_ARGUMENT.get(kind, 0.0)
        return ActivationSpec(format=fmt, range=kind, argument=argument)
    except ValueError as error:  # FormatError is one, and so is what float() raises
        raise FormatSpecError(spec, len(head) + 1, str(error), remedy) from None
