"""MX+ as a step: the largest element of each block keeps more mantissa bits, in weights, inputs or both.

The formats themselves are in ``formats/`` (``mxfp4_plus``, ``mxfp4_plusplus`` and any spec with ``plus`` or
``plusplus``). As a step the extension goes onto whatever format a layer has: ``mxplus`` for both sides,
``mxplus:weights=keep`` for the inputs alone (A-MXFP4+), ``mxplus:weights=plusplus,activations=plusplus`` for MX++.

Source: arXiv 2510.14557, sections 4 and 5.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from microscale.algorithms.contract import FormatStep
from microscale.errors import FormatError, RecipeError
from microscale.formats import ActivationSpec, BlockFormat, Extension, Format, RangeKind, ScaleRule

KEEP = "keep"
"""The word that leaves a side as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MxPlus(FormatStep):
    """Extended formats where they can be; over a power-of-two scale with the rule floor, which they need."""

    name: ClassVar[str] = "mxplus"
    source: ClassVar[str] = "arXiv 2510.14557"

    weights: str = "plus"
    activations: str = "plus"

    def __post_init__(self) -> None:
        words = (Extension.PLUS.value, Extension.PLUSPLUS.value, KEEP)
        for side, word in (("weights", self.weights), ("activations", self.activations)):
            if word not in words:
                raise RecipeError(f"step mxplus: {side} must be one of {', '.join(words)}, got {word!r}")

    def refusal(self, fmt: Format, activations: ActivationSpec | None) -> str | None:
        """Refuse formats that the extension does not fit, in the words of the format."""
        try:
            self.adapt(fmt, activations)
        except FormatError as error:
            return str(error)
        return None

    def adapt(self, fmt: Format, activations: ActivationSpec | None) -> tuple[Format, ActivationSpec | None]:
        """Return the extended formats.

        Raises:
            FormatError: a format that cannot have the extension.
        """
        weights = _extended(fmt, self.weights)
        if activations is None or activations.range is not RangeKind.DYNAMIC:
            return weights, activations
        inputs = _extended(activations.format, self.activations)
        return weights, dataclasses.replace(activations, format=inputs)


def _extended(fmt: Format, word: str) -> Format:
    if word == KEEP or not isinstance(fmt, BlockFormat):
        return fmt
    rule = ScaleRule.FLOOR if fmt.scale.is_power_of_two else ScaleRule.AMAX
    return dataclasses.replace(fmt, extension=Extension(word), rule=rule)
