"""Another scale rule for the same format: round-up, threshold (overflow-aware), pre-scale, search.

The rule of a block scale decides how much of the largest numbers is clipped. ``threshold(7)`` is overflow-aware scaling
and ``threshold(7.25)`` the best threshold for E2M1; ``prescale(0.75)`` divides by 3/4; ``mse(-1,1)`` searches the
exponent of every block.

Source: arXiv 2603.08713 (7), arXiv 2607.24377 (7.25), arXiv 2502.20586 and 2601.09555 (pre-scale 3/4).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from microscale.algorithms.contract import FormatStep
from microscale.errors import FormatError
from microscale.formats import ActivationSpec, BlockFormat, Format, RangeKind
from microscale.formats.grammar import parse_scale_rule

KEEP = "keep"
"""The word that leaves a rule as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRuleStep(FormatStep):
    """Scale rules of weights and activations where their formats can take them; others stay as they are.

    MX+ and MX++ keep the floor rule, which puts their largest element where it must be, and formats with a float scale
    have no use for a rule about powers of two.
    """

    name: ClassVar[str] = "rule"
    source: ClassVar[str] = "arXiv 2603.08713, 2607.24377, 2502.20586"

    weights: str = "threshold(7.25)"
    activations: str = "threshold(7.25)"

    def adapt(self, fmt: Format, activations: ActivationSpec | None) -> tuple[Format, ActivationSpec | None]:
        """Return the formats with these rules."""
        changed = self._with_rule(fmt, self.weights)
        if activations is None:
            return changed, None
        is_free = activations.range is RangeKind.DYNAMIC
        inputs = self._with_rule(activations.format, self.activations) if is_free else activations.format
        return changed, dataclasses.replace(activations, format=inputs)

    def idleness(self, fmt: Format, activations: ActivationSpec | None) -> str | None:
        """Return why neither side gets another rule."""
        if self.adapt(fmt, activations) != (fmt, activations):
            return None
        return why_not_ruled(fmt, self.weights) or f"it has the rule {self.weights} already"

    @staticmethod
    def _with_rule(fmt: Format, word: str) -> Format:
        if why_not_ruled(fmt, word) is not None or not isinstance(fmt, BlockFormat):
            return fmt
        return dataclasses.replace(fmt, rule=parse_scale_rule(word, fmt.scale))


def why_not_ruled(fmt: Format, word: str) -> str | None:
    """Return why a format keeps its own scale rule, or None where it takes that of the word.

    Raises:
        FormatSpecError: no rule of that word.
    """
    if word == KEEP:
        return f"{KEEP} leaves its rule as it is"
    if not isinstance(fmt, BlockFormat):
        return "it is made of several formats, each with its rule"
    rule = parse_scale_rule(word, fmt.scale)
    if not fmt.scale.is_power_of_two:
        return "its block scales are no powers of two, which the rule is about"
    if fmt.is_extended:
        return f"{fmt.extension.value} needs the rule that it has"
    if fmt.zero_point is not None:
        return "a format with a zero point takes minimum and maximum"
    if "threshold" in word and fmt.element.bits > 4:
        return "the threshold is a fact about elements of up to 4 bits"
    try:
        dataclasses.replace(fmt, rule=rule)
    except FormatError as error:
        return str(error)
    return None
