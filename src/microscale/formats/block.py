"""Format records: element, block, scale, zero point, extensions and policies in one frozen value.

:class:`BlockFormat` covers every format with one element type; :class:`PairFormat` picks one of two block
formats for each block by a bitmap. Both may carry a :class:`SparseTable` (dense-and-sparse). A record is data:
kernels, layouts and checkpoints read it, nothing about a format is stated anywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from microscale.errors import FormatError
from microscale.formats.block_shape import Block, ChannelBlock, TensorBlock, TileBlock, VectorBlock
from microscale.formats.draw import Draw
from microscale.formats.elements import FP32, Element, FloatElement, IntElement
from microscale.formats.fields import check_fields
from microscale.formats.policies import InfPolicy, NaNPolicy, Overflow, Rounding
from microscale.formats.rules import (
    FLOAT_SCALE_RULES,
    POWER_OF_TWO_RULES,
    ZERO_POINT_RULES,
    RuleKind,
    ScaleRule,
)


class Extension(Enum):
    """Extra precision for the block's largest element (arXiv 2510.14557)."""

    NONE = "none"
    PLUS = "plus"
    """MX+: the largest element spends its exponent bits on mantissa; an index says where it stands."""
    PLUSPLUS = "plusplus"
    """MX++: besides, the other elements get a scale of their own, up to 2^7 smaller."""


PLUSPLUS_DELTA_BITS = 3


class SubScaleKind(Enum):
    """What the code k of a sub-group of a block stands for."""

    POWER_OF_TWO = "pow2"
    """The block's scale times 2^-k."""
    LINEAR = "linear"
    """The block's scale times (k + 1) / 2^bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubScale:
    """Second scale level inside the block: ``bits`` for each ``size`` consecutive elements."""

    size: int
    bits: int
    kind: SubScaleKind

    def __post_init__(self) -> None:
        check_fields(self)
        if not 1 <= self.bits <= 8:
            raise FormatError(f"a sub-group scale has 1 to 8 bits, got {self.bits}")
        if self.size < 1:
            raise FormatError(f"a sub-group holds at least one element, got {self.size}")


class ZeroPoint(Enum):
    """How the zero point of an asymmetric integer block is stored."""

    INT = "int"
    """As an integer of the element's width; the range is widened to include 0."""
    FP8 = "fp8"
    """As an E4M3 number (Z is rounded to it, exact up to 16)."""
    FP16 = "fp16"
    """As an fp16 number (exact up to 2048)."""


ZERO_POINT_BITS: Mapping[ZeroPoint, int | None] = {ZeroPoint.INT: None, ZeroPoint.FP8: 8, ZeroPoint.FP16: 16}


class SparseElement(Enum):
    """What the sparse side table stores its values in."""

    FP8 = "fp8"
    """E4M3 with one fp32 scale for the table (its largest magnitude maps to 448)."""
    FP16 = "fp16"
    """fp16, saturating."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTable:
    """The ``percent`` largest magnitudes of a tensor are kept apart, with their place (dense-and-sparse)."""

    percent: float
    element: SparseElement

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.percent <= 100:
            raise FormatError(f"a sparse table keeps more than 0 and at most 100 percent, got {self.percent}")

    @property
    def value_bits(self) -> int:
        """Width of one stored value."""
        return 8 if self.element is SparseElement.FP8 else 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """An element type, a block shape and a scale, with every policy that decides the bits.

    ``seed`` is that of the default draw of stochastic rounding, for who gives no other with the numbers.

    Raises:
        FormatError: parts that contradict each other; the message says which and why.
    """

    element: Element
    block: Block
    scale: FloatElement
    rule: ScaleRule
    tensor_scale: FloatElement | None = None
    sub_scale: SubScale | None = None
    zero_point: ZeroPoint | None = None
    extension: Extension = Extension.NONE
    rounding: Rounding = Rounding.NEAREST_EVEN
    seed: int = 0
    overflow: Overflow = Overflow.SATURATE
    nan_policy: NaNPolicy = NaNPolicy.POISON_BLOCK
    inf_policy: InfPolicy = InfPolicy.AS_NAN
    sparse: SparseTable | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for problem in (*self._scale_problems(), *self._element_problems(), *self._level_problems()):
            raise FormatError(f"{self._short_name}: {problem}")

    @property
    def _short_name(self) -> str:
        return f"{self.element.name} with scale {self.scale.name}"

    def _scale_problems(self) -> list[str]:
        problems: list[str] = []
        refusal = self.rule_refusal(self.rule)
        if refusal:
            problems.append(refusal)
        if self.scale.bits > 8 and self.scale.name not in ("fp16", "bf16", "fp32"):
            problems.append("a scale has at most 8 bits or is fp16, bf16 or fp32")
        if self.scale.exponent_bits == 0:
            problems.append("a scale needs exponent bits")
        if self.tensor_scale is not None and (self.scale.is_power_of_two or self.scale.exponent_bits == 8):
            problems.append("a second scale per tensor is for float scales of a narrow range, such as e4m3+fp32")
        if self.tensor_scale not in (None, FP32):
            problems.append("the second scale per tensor is fp32")
        if self.tensor_scale is not None and isinstance(self.block, TensorBlock):
            problems.append("a block that is the whole tensor needs no second scale per tensor")
        if self.nan_policy is NaNPolicy.POISON_BLOCK and self.scale.nan_code is None:
            problems.append("the scale has no NaN code, so NaN cannot poison a block; use nan_raise")
        return problems

    def _element_problems(self) -> list[str]:
        problems: list[str] = []
        element = self.element
        if isinstance(element, FloatElement) and (not element.subnormals or element == FP32):
            problems.append("this record is a scale, not an element")
        if self.overflow is Overflow.NONFINITE and (isinstance(element, IntElement) or element.nan_code is None):
            problems.append("the element has neither Inf nor NaN, so overflow can only saturate")
        unsigned_int = isinstance(element, IntElement) and not element.signed
        if self.zero_point is not None and not unsigned_int:
            problems.append("a zero point needs an unsigned integer element (uint2 to uint8)")
        if self.zero_point is not None and isinstance(element, IntElement) and element.fraction_bits != 0:
            problems.append("an asymmetric integer has no fraction bits: the scale covers them")
        if self.zero_point is not None and self.scale.is_power_of_two:
            problems.append("a zero point needs a float scale (fp16, bf16, fp32, e4m3+fp32)")
        if self.seed and self.rounding is not Rounding.STOCHASTIC:
            problems.append("a seed belongs to stochastic rounding")
        if self.seed < 0:
            problems.append(f"a seed is a whole number from 0 on, got {self.seed}")
        return problems

    def _level_problems(self) -> list[str]:
        problems: list[str] = []
        size = self.block.size if isinstance(self.block, VectorBlock) else None
        if self.is_extended:
            if size is None or not 2 <= size <= 256:
                problems.append("plus and plusplus need blocks of 2 to 256 elements of the last axis")
            if self.zero_point is not None or self.sub_scale is not None:
                problems.append("plus and plusplus do not combine with a zero point or sub-group scales")
            if isinstance(self.element, IntElement) and not (self.element.signed and self.element.symmetric):
                problems.append("plus needs a symmetric signed integer: the largest element is sign and magnitude")
            if isinstance(self.element, FloatElement) and not self.element.signed:
                problems.append("plus needs a signed element")
            if self.extension is Extension.PLUSPLUS and not self.scale.is_power_of_two:
                problems.append("plusplus lowers a power-of-two scale; use e8m0")
            if self.overflow is not Overflow.SATURATE:
                problems.append("the largest element of plus and plusplus saturates (arXiv 2510.14557)")
        if self.sub_scale is not None:
            if size is None or size % self.sub_scale.size or size == self.sub_scale.size:
                problems.append("sub-groups must divide a block of the last axis into at least two")
            if self.zero_point is not None:
                problems.append("sub-group scales do not combine with a zero point")
        return problems

    def rule_refusal(self, rule: ScaleRule) -> str | None:
        """Return why this format forbids a scale rule, or None where it allows it."""
        if self.zero_point is not None or rule.kind in ZERO_POINT_RULES:
            if self.zero_point is not None and rule.kind in ZERO_POINT_RULES:
                return None
            return "rule minmax belongs to formats with a zero point, and they take no other"
        if self.scale.is_power_of_two:
            if self.is_extended and rule.kind is not RuleKind.FLOOR:
                return (
                    f"MX+ and MX++ over a power-of-two scale need rule floor, not {rule}: only floor puts the block's"
                    " largest element into the top binade, which is what frees its exponent bits (arXiv 2510.14557)"
                )
            allowed = POWER_OF_TWO_RULES
        else:
            allowed = FLOAT_SCALE_RULES
            if self.is_extended:
                allowed = frozenset({RuleKind.AMAX})
        if rule.kind in allowed:
            return self._window_refusal(rule)
        names = ", ".join(sorted(kind.value for kind in allowed))
        return f"rule {rule} does not fit scale {self.scale.name}; possible: {names}"

    def _window_refusal(self, rule: ScaleRule) -> str | None:
        if rule.kind is not RuleKind.MSE:
            return None
        if self.scale.is_power_of_two and not all(float(argument).is_integer() for argument in rule.arguments):
            return f"rule {rule} over a power-of-two scale searches exponents: the window is two whole numbers"
        if not self.scale.is_power_of_two and rule.arguments[0] <= 0:
            return f"rule {rule} over a float scale searches factors: the window is two positive numbers"
        return None

    @property
    def default_draw(self) -> Draw:
        """What stochastic rounding draws from where no draw is given."""
        return Draw(seed=self.seed)

    @property
    def is_extended(self) -> bool:
        """Whether the largest element of a block has a code of its own: MX+ and MX++."""
        return self.extension is not Extension.NONE

    @property
    def has_zero_code(self) -> bool:
        """Whether scale code 0 says that a block is zero, largest element and all (MX+ over a power-of-two scale).

        Over a float scale a block whose scale is too small has no largest element apart
        (:func:`microscale.formats.codec.is_plain_block`).
        """
        return self.is_extended and self.scale.is_power_of_two

    @property
    def place_bits(self) -> int:
        """The low bits of an index that say where in its block the largest element stands: ceil(log2 block)."""
        return math.ceil(math.log2(self.block.size)) if self.is_extended and isinstance(self.block, VectorBlock) else 0

    @property
    def delta_bits(self) -> int:
        """Bits above the place that say how much smaller the scale of the others is: 3 for MX++, else 0."""
        return PLUSPLUS_DELTA_BITS if self.extension is Extension.PLUSPLUS else 0

    @property
    def index_bits(self) -> int:
        """Bits of the largest element's index as stored: ceil(log2 block), plus 3 for MX++; one byte for block 32."""
        if not self.is_extended or not isinstance(self.block, VectorBlock):
            return 0
        return 8 if self.block.size == 32 else self.place_bits + self.delta_bits

    @property
    def zero_point_bits(self) -> int:
        """Bits of a stored zero point (0 without one)."""
        if self.zero_point is None:
            return 0
        return ZERO_POINT_BITS[self.zero_point] or self.element.bits

    @property
    def magnitude_bits(self) -> int:
        """Bits of an element beside its sign: the fraction bits of the largest element under MX+."""
        return self.element.bits - 1

    def largest_values(self) -> list[float]:
        """Return the value of every code of a block's largest element under MX+, times the factor of the block.

        Formula: (-1)^sign * 2^e_max * (1 + f / 2^B) with B magnitude bits (arXiv 2510.14557 equation 2).
        """
        steps = 2**self.magnitude_bits
        values = [(1 + fraction / steps) * 2.0**self.element.max_exponent for fraction in range(steps)]
        return values + [-value for value in values]

    def block_bits(self) -> int:
        """Bits stored once for each block: scale, index and zero point."""
        return self.scale.bits_stored + self.index_bits + self.zero_point_bits

    def bits_per_value(self, rows: int | None = None, cols: int | None = None) -> float:
        """Bits stored for each element of an unpadded tensor; per-tensor constants count only with its shape.

        A row count and a width are needed only for the part that depends on them (channel and tensor blocks,
        the row offsets of a sparse table); without them that part counts as nothing.
        """
        bits = float(self.element.bits)
        match self.block:
            case VectorBlock(size=size):
                bits += self.block_bits() / size
            case TileBlock(rows=tile_rows, cols=tile_cols):
                bits += self.block_bits() / (tile_rows * tile_cols)
            case ChannelBlock():
                bits += self.block_bits() / cols if cols else 0
            case TensorBlock():
                bits += self.block_bits() / (rows * cols) if rows and cols else 0
        if self.sub_scale is not None:
            bits += self.sub_scale.bits / self.sub_scale.size
        if self.tensor_scale is not None and rows and cols:
            bits += self.tensor_scale.bits / (rows * cols)
        return bits + sparse_bits_per_value(self.sparse, rows, cols)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFormat:
    """A block-adaptive pair: a bitmap picks ``low`` or ``high`` for each block; two packed streams.

    The ``high_percent`` blocks whose squared error shrinks most get the wider format.

    Raises:
        FormatError: different or unsuitable blocks, or parts with a second level of their own.
    """

    low: BlockFormat
    high: BlockFormat
    high_percent: float
    sparse: SparseTable | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for part in (self.low, self.high):
            if not isinstance(part.block, VectorBlock):
                raise FormatError("pair: both formats need blocks along the last axis")
            if part.sparse is not None or part.tensor_scale is not None:
                raise FormatError(
                    "pair: a sparse table or a per-tensor scale inside a pair is not possible; add +sparse after it"
                )
        if self.low.block != self.high.block:
            raise FormatError("pair: both formats need the same block size")
        if self.low.element.bits > self.high.element.bits:
            raise FormatError("pair: the first format must be the narrower one")
        if self.low.inf_policy is not self.high.inf_policy:
            raise FormatError("pair: both formats need the same policy for Inf")
        if not 0 <= self.high_percent <= 100:
            raise FormatError(f"pair: the share of wide blocks is 0 to 100 percent, got {self.high_percent}")

    @property
    def block(self) -> VectorBlock:
        """The common block."""
        assert isinstance(self.low.block, VectorBlock)
        return self.low.block

    @property
    def nan_policy(self) -> NaNPolicy:
        """Raise where either part raises."""
        raises = NaNPolicy.RAISE in (self.low.nan_policy, self.high.nan_policy)
        return NaNPolicy.RAISE if raises else NaNPolicy.POISON_BLOCK

    @property
    def inf_policy(self) -> InfPolicy:
        """The common policy."""
        return self.low.inf_policy

    def bits_per_value(self, rows: int | None = None, cols: int | None = None) -> float:
        """Bits for each element: the mean of both parts by their share, one bitmap bit for each block."""
        share = self.high_percent / 100
        bits = (1 - share) * self.low.bits_per_value() + share * self.high.bits_per_value() + 1 / self.block.size
        return bits + sparse_bits_per_value(self.sparse, rows, cols)


def sparse_column_bits(cols: int | None) -> int:
    """Width of a stored column index: 16 bits up to 32767 columns (and where unknown), else 32."""
    return 16 if cols is None or cols <= 32767 else 32


def sparse_bits_per_value(sparse: SparseTable | None, rows: int | None, cols: int | None) -> float:
    """Bits that a sparse table adds to each element of the tensor."""
    if sparse is None:
        return 0.0
    bits = sparse.percent / 100 * (sparse.value_bits + sparse_column_bits(cols))
    if rows and cols:
        constants = 32 if sparse.element is SparseElement.FP8 else 0
        bits += (32 * (rows + 1) + constants) / (rows * cols)
    return bits
