"""Print a format record as its canonical spec, the inverse of :mod:`microscale.formats.grammar`."""

from __future__ import annotations

from microscale.errors import FormatError, check_kind
from microscale.formats.block import BlockFormat, SparseTable, ZeroPoint
from microscale.formats.block_shape import Block, ChannelBlock, TensorBlock, TileBlock, VectorBlock
from microscale.formats.elements import FloatElement, IntElement, SpecialValues, int_element
from microscale.formats.policies import InfPolicy, NaNPolicy, Overflow, Rounding
from microscale.formats.rules import number_word
from microscale.formats.segmented import RECORDS, Format, SegmentedFormat


def spec_text(fmt: Format) -> str:
    """Return the spec that parses back to an equal record; the scale rule is always written out."""
    check_kind(fmt, RECORDS, "a format", "a format record (parse_format makes one)", error=FormatError)
    if isinstance(fmt, BlockFormat):
        return _block_format_text(fmt) + sparse_text(fmt.sparse)
    if isinstance(fmt, SegmentedFormat):
        pieces = [f"{spec_text(segment.format)}*{segment.cols}" for segment in fmt.segments]
        return f"segments({','.join(pieces)})"
    percent = number_word(fmt.high_percent)
    return f"pair({spec_text(fmt.low)},{spec_text(fmt.high)},{percent}%)" + sparse_text(fmt.sparse)


def _block_format_text(fmt: BlockFormat) -> str:
    element = fmt.element
    if fmt.zero_point is not None and isinstance(element, IntElement):
        element = int_element(element.bits)
    scale = scale_text(fmt.scale) + ("+fp32" if fmt.tensor_scale is not None else "")
    words = [f"{element.name}/{block_text(fmt.block)}", scale, *option_words(fmt)]
    return ":".join(words)


def scale_text(scale: FloatElement) -> str:
    """Return the grammar's word for a scale: as an element's, but a bare ``eXm0`` is a power of two."""
    if scale.mantissa_bits or scale.is_power_of_two or not scale.signed or scale.specials is not SpecialValues.NONE:
        return scale.name
    word, bias, value = scale.name.partition("-b")
    return f"{word}-none{bias}{value}"


def option_words(fmt: BlockFormat) -> list[str]:
    """Return the words after the scale: rule or zero point, extension, sub-groups, rounding, policies."""
    words: list[str] = []
    if fmt.zero_point is not None:
        words.append("asym" if fmt.zero_point is ZeroPoint.INT else f"asym({fmt.zero_point.value})")
    else:
        words.append(str(fmt.rule))
    if fmt.is_extended:
        words.append(fmt.extension.value)
    if fmt.sub_scale is not None:
        words.append(f"sub({fmt.sub_scale.size},{fmt.sub_scale.bits},{fmt.sub_scale.kind.value})")
    if fmt.rounding is Rounding.STOCHASTIC:
        words.append(f"stochastic({fmt.seed})")
    elif fmt.rounding is not Rounding.NEAREST_EVEN:
        words.append(fmt.rounding.value)
    if fmt.overflow is not Overflow.SATURATE:
        words.append(fmt.overflow.value)
    default_nan = NaNPolicy.RAISE if fmt.scale.nan_code is None else NaNPolicy.POISON_BLOCK
    if fmt.nan_policy is not default_nan:
        words.append(fmt.nan_policy.value)
    if fmt.inf_policy is not InfPolicy.AS_NAN:
        words.append(fmt.inf_policy.value)
    return words


def block_text(block: Block) -> str:
    """Return the grammar's word for a block: ``32``, ``16x16``, ``channel`` or ``tensor``."""
    match block:
        case VectorBlock(size=size):
            return str(size)
        case TileBlock(rows=rows, cols=cols):
            return f"{rows}x{cols}"
        case ChannelBlock():
            return "channel"
        case TensorBlock():
            return "tensor"


def sparse_text(sparse: SparseTable | None) -> str:
    """Return the ``+sparse…`` ending of a spec, empty without a table."""
    return "" if sparse is None else f"+sparse{number_word(sparse.percent)}%:{sparse.element.value}"
