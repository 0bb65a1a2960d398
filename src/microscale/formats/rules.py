"""Scale rules as named values: how a block's numbers decide its scale.

Written for a scale that is a power of two (``e8m0``), with ``amax = max |x|`` over the block, ``max`` the
element's largest value, ``e_max = floor(log2(max))``:

=================  =====================================================================================
floor              2^(floor(log2 amax) - e_max)                        OCP MX v1.0 section 6.3
ceil               2^(ceil(log2 amax) - e_max)
rceil              2^ceil(log2(amax / max)): round-up, never clips     arXiv 2506.08027
even               floor of amax rounded half up to the element's mantissa bits
even(m)            the same with m mantissa bits; compressed-tensors uses even(1) for E4M3 too
threshold(t)       rceil with t in place of max                        arXiv 2603.08713 (7), 2607.24377 (7.25)
prescale(p)        floor, then divided by p: 4/3 * 2^k for p = 3/4     arXiv 2502.20586, 2601.09555
std(c)             2^floor(log2(c * std / max))                        arXiv 2505.14669 (c = 2.92247856)
mse(lo,hi)         the exponent in floor + [lo, hi] with the least squared error; the lowest of equal ones
percentile(p)      rceil of the p-th percentile (nearest rank) of |x|
=================  =====================================================================================

For a float scale (``e4m3``, ``fp16``, ``bf16``, ``fp32``): ``amax`` rounds amax / max to the nearest scale
value, ``rceil`` rounds it up, ``threshold``, ``std`` and ``percentile`` as above without the power of two, and
``mse(lo,hi)`` is a least-squares fit started from amax / max times factors in [lo, hi]. ``minmax`` belongs to
formats with a zero point: S = (max - min) / (2^b - 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from microscale.errors import FormatError, counted
from microscale.formats.fields import check_fields


class RuleKind(Enum):
    """The words of the grammar."""

    FLOOR = "floor"
    CEIL = "ceil"
    RCEIL = "rceil"
    EVEN = "even"
    THRESHOLD = "threshold"
    PRESCALE = "prescale"
    STD = "std"
    MSE = "mse"
    PERCENTILE = "percentile"
    AMAX = "amax"
    MINMAX = "minmax"


GAUSSIAN_E2M1_CLIP = 2.92247856
"""Clip point of E2M1 in standard deviations with the least squared error on a Gaussian (arXiv 2505.14669)."""

MSE_FLOAT_STEPS = 16
"""Number of start factors in [lo, hi] that ``mse`` tries for a float scale."""

_ARGUMENT_COUNTS: dict[RuleKind, tuple[int, ...]] = {
    RuleKind.EVEN: (0, 1),
    RuleKind.THRESHOLD: (1,),
    RuleKind.PRESCALE: (1,),
    RuleKind.STD: (1,),
    RuleKind.MSE: (2,),
    RuleKind.PERCENTILE: (1,),
}

POWER_OF_TWO_RULES = frozenset(RuleKind) - {RuleKind.AMAX, RuleKind.MINMAX}
FLOAT_SCALE_RULES = frozenset(
    {RuleKind.AMAX, RuleKind.RCEIL, RuleKind.THRESHOLD, RuleKind.STD, RuleKind.MSE, RuleKind.PERCENTILE}
)
ZERO_POINT_RULES = frozenset({RuleKind.MINMAX})
AMAX_RULES = frozenset(RuleKind) - {RuleKind.STD, RuleKind.MSE, RuleKind.PERCENTILE, RuleKind.MINMAX}
"""Rules that look at nothing but amax, and so accept the amax of a given (calibrated) statistic."""


@dataclass(frozen=True, slots=True)
class ScaleRule:
    """A scale rule with its arguments; use the constants and constructors.

    Raises:
        FormatError: a wrong number of arguments or one out of range.
    """

    kind: RuleKind
    arguments: tuple[float, ...] = ()

    FLOOR: ClassVar[ScaleRule]
    CEIL: ClassVar[ScaleRule]
    RCEIL: ClassVar[ScaleRule]
    EVEN: ClassVar[ScaleRule]
    AMAX: ClassVar[ScaleRule]
    MINMAX: ClassVar[ScaleRule]

    def __post_init__(self) -> None:
        check_fields(self)
        expected = _ARGUMENT_COUNTS.get(self.kind, (0,))
        if len(self.arguments) not in expected:
            counts = " or ".join(counted(count, "argument") for count in expected)
            raise FormatError(f"scale rule {self.kind.value} takes {counts}, got {len(self.arguments)}")
        problem = self._argument_problem()
        if problem:
            raise FormatError(f"scale rule {self.kind.value}: {problem}, got {self.arguments}")

    def _argument_problem(self) -> str:
        a = self.arguments
        if any(not (abs(v) < 1e30) for v in a):
            return "arguments must be finite"
        if self.kind in (RuleKind.THRESHOLD, RuleKind.STD) and a[0] <= 0:
            return "the argument must be positive"
        if self.kind is RuleKind.EVEN and a and a[0] not in range(24):
            return "the mantissa width must be a whole number from 0 to 23"
        if self.kind is RuleKind.PRESCALE and not 0 < a[0] <= 1:
            return "the factor must be in (0, 1]"
        if self.kind is RuleKind.PERCENTILE and not 0 < a[0] <= 100:
            return "the percentile must be in (0, 100]"
        if self.kind is RuleKind.MSE and a[0] > a[1]:
            return "the window must be (low, high) with low <= high"
        return ""

    @staticmethod
    def threshold(value: float) -> ScaleRule:
        """Round-up of amax / value: scaled numbers up to ``value`` may clip to the element's maximum."""
        return ScaleRule(RuleKind.THRESHOLD, (float(value),))

    @staticmethod
    def prescale(factor: float = 0.75) -> ScaleRule:
        """Floor rule on numbers multiplied by ``factor``, which the scale divides out again."""
        return ScaleRule(RuleKind.PRESCALE, (float(factor),))

    @staticmethod
    def std(clip: float = GAUSSIAN_E2M1_CLIP) -> ScaleRule:
        """Clip at ``clip`` standard deviations (population, per block)."""
        return ScaleRule(RuleKind.STD, (float(clip),))

    @staticmethod
    def mse(low: float = -1, high: float = 1) -> ScaleRule:
        """Search for the least squared error: exponents floor+low to floor+high, or factors for a float scale."""
        return ScaleRule(RuleKind.MSE, (float(low), float(high)))

    @staticmethod
    def percentile(percent: float) -> ScaleRule:
        """Clip at a percentile (nearest rank) of |x| in the block."""
        return ScaleRule(RuleKind.PERCENTILE, (float(percent),))

    @property
    def multiplier(self) -> float:
        """Constant that multiplies the stored power of two when decoding (1 / p for prescale, else 1)."""
        return 1 / self.arguments[0] if self.kind is RuleKind.PRESCALE else 1.0

    def __str__(self) -> str:
        if not self.arguments:
            return self.kind.value
        return f"{self.kind.value}({','.join(number_word(a) for a in self.arguments)})"


def number_word(value: float) -> str:
    """Print a float so that it reads back equal, whole numbers without a point."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


ScaleRule.FLOOR = ScaleRule(RuleKind.FLOOR)
ScaleRule.CEIL = ScaleRule(RuleKind.CEIL)
ScaleRule.RCEIL = ScaleRule(RuleKind.RCEIL)
ScaleRule.EVEN = ScaleRule(RuleKind.EVEN)
ScaleRule.AMAX = ScaleRule(RuleKind.AMAX)
ScaleRule.MINMAX = ScaleRule(RuleKind.MINMAX)

DEFAULT_ARGUMENTS: dict[RuleKind, tuple[float, ...]] = {
    RuleKind.PRESCALE: (0.75,),
    RuleKind.STD: (GAUSSIAN_E2M1_CLIP,),
    RuleKind.MSE: (-1.0, 1.0),
}
"""What the bare word stands for in the grammar; ``mse`` on a float scale: (0.5, 1)."""

DEFAULT_MSE_FACTORS = (0.5, 1.0)


def mse_factors(rule: ScaleRule) -> list[float]:
    """Return the factors in [lo, hi] by which ``mse`` multiplies amax / max for its starts over a float scale."""
    low, high = rule.arguments
    return [low + (high - low) * step / (MSE_FLOAT_STEPS - 1) for step in range(MSE_FLOAT_STEPS)]
