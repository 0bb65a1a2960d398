"""Formats as data: what a number means.

Start with :func:`parse_format` (a name or a spec to a record) and :data:`NAMED_FORMATS`. The records are in
:mod:`~microscale.formats.elements` and :mod:`~microscale.formats.block`, the rounding of single numbers in
:mod:`~microscale.formats.codec`, the scale rules in :mod:`~microscale.formats.rules`.
"""

from microscale.formats.activation import ActivationSpec, RangeKind, parse_activation
from microscale.formats.block import (
    BlockFormat,
    Extension,
    PairFormat,
    SparseElement,
    SparseTable,
    SubScale,
    SubScaleKind,
    ZeroPoint,
)
from microscale.formats.block_shape import Block, ChannelBlock, TensorBlock, TileBlock, VectorBlock
from microscale.formats.draw import Draw, tensor_place
from microscale.formats.elements import (
    NAMED_ELEMENTS,
    Element,
    FloatElement,
    IntElement,
    SpecialValues,
    float_element,
    int_element,
    power_of_two_scale,
    uint_element,
)
from microscale.formats.lists import list_items, split_outside
from microscale.formats.policies import InfPolicy, NaNPolicy, Overflow, Rounding
from microscale.formats.registry import ALIASES, NAMED_FORMATS, NamedFormat, format_name, parse_format
from microscale.formats.rules import RuleKind, ScaleRule
from microscale.formats.segmented import Format, Segment, SegmentedFormat
from microscale.formats.spec_text import spec_text
from microscale.formats.written import (
    NONE,
    Written,
    WrittenInputs,
    WrittenWeights,
    parse_inputs,
    parse_weights,
    parse_weights_and_inputs,
)

__all__ = [
    "ALIASES",
    "NAMED_ELEMENTS",
    "NAMED_FORMATS",
    "NONE",
    "ActivationSpec",
    "Block",
    "BlockFormat",
    "ChannelBlock",
    "Draw",
    "Element",
    "Extension",
    "FloatElement",
    "Format",
    "InfPolicy",
    "IntElement",
    "NaNPolicy",
    "NamedFormat",
    "Overflow",
    "PairFormat",
    "RangeKind",
    "Rounding",
    "RuleKind",
    "ScaleRule",
    "Segment",
    "SegmentedFormat",
    "SparseElement",
    "SparseTable",
    "SpecialValues",
    "SubScale",
    "SubScaleKind",
    "TensorBlock",
    "TileBlock",
    "VectorBlock",
    "Written",
    "WrittenInputs",
    "WrittenWeights",
    "ZeroPoint",
    "float_element",
    "format_name",
    "int_element",
    "list_items",
    "parse_activation",
    "parse_format",
    "parse_inputs",
    "parse_weights",
    "parse_weights_and_inputs",
    "power_of_two_scale",
    "spec_text",
    "split_outside",
    "tensor_place",
    "uint_element",
]
