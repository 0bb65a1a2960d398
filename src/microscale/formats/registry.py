"""The named formats, and the two functions every other room uses: :func:`parse_format` and :func:`format_name`.

To add a named format, add its row to ``_ROWS`` and to the table of docs/reference/formats.md; then run
``python tests/vectors/make_blocks.py``, which adds its bytes to the vectors and must change no others. A rule, an
element or an option that no spec can say yet comes first: its module in this folder, and the grammar.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from microscale.errors import FormatError, check_kind
from microscale.formats.block import BlockFormat
from microscale.formats.grammar import parse_spec
from microscale.formats.segmented import RECORDS, Format, SegmentedFormat
from microscale.formats.spec_text import option_words, sparse_text, spec_text


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedFormat:
    """A name with its record, how it is shown, and one sentence of what it is."""

    name: str
    title: str
    format: Format
    summary: str
    source: str


_OCP = "OCP MX v1.0"
_MXPLUS = "arXiv 2510.14557"
_GROUPS = "group integers"

_FP8_ZERO = "int4/64:e4m3+fp32:asym(fp8)"
_SPARSE = "mxfp4+sparse0.5%:fp8"
_PAIR = "pair(int2/32:fp16:asym,int4/32:fp16:asym,50%)"

_ROWS = (
    ("mxfp8_e4m3", "MXFP8 E4M3", "e4m3/32:e8m0:rceil", "8-bit floats, near lossless", _OCP),
    ("mxfp8_e5m2", "MXFP8 E5M2", "e5m2/32:e8m0:rceil", "8-bit floats with a wide range (gradients)", _OCP),
    ("mxfp6_e2m3", "MXFP6 E2M3", "e2m3/32:e8m0:floor", "6-bit floats with a fine grid", _OCP),
    ("mxfp6_e3m2", "MXFP6 E3M2", "e3m2/32:e8m0:floor", "6-bit floats with a wide range", _OCP),
    ("mxfp4", "MXFP4", "e2m1/32:e8m0:floor", "4-bit floats", _OCP),
    ("mxint8", "MXINT8", "int8/32:e8m0:rceil", "8-bit integers with a fraction", _OCP),
    ("mxint4", "MXINT4", "int4/32:e8m0:rceil", "4-bit integers with a fraction", "arXiv 2510.14557 table 10"),
    ("nvfp4", "NVFP4", "e2m1/16:e4m3+fp32:amax", "4-bit floats, E4M3 scale for 16, fp32 scale per tensor", "NVIDIA"),
    ("mxfp4_plus", "MXFP4+", "e2m1/32:e8m0:floor:plus", "MXFP4, largest element with 3 mantissa bits", _MXPLUS),
    ("mxfp6_plus", "MXFP6+", "e2m3/32:e8m0:floor:plus", "MXFP6, largest element with 5 mantissa bits", _MXPLUS),
    ("mxfp8_plus", "MXFP8+", "e4m3/32:e8m0:floor:plus", "MXFP8, largest element with 7 mantissa bits", _MXPLUS),
    ("mxint8_plus", "MXINT8+", "int8/32:e8m0:floor:plus", "MXINT8, largest element with one more bit", _MXPLUS),
    ("mxint4_plus", "MXINT4+", "int4/32:e8m0:floor:plus", "MXINT4, largest element with one more bit", _MXPLUS),
    ("nvfp4_plus", "NVFP4+", "e2m1/16:e4m3+fp32:amax:plus", "NVFP4, largest element with 3 mantissa bits", _MXPLUS),
    ("mxfp4_plusplus", "MXFP4++", "e2m1/32:e8m0:floor:plusplus", "MXFP4+, a finer scale for all others", _MXPLUS),
    ("mxfp6_plusplus", "MXFP6++", "e2m3/32:e8m0:floor:plusplus", "MXFP6+, a finer scale for all others", _MXPLUS),
    ("mxfp8_plusplus", "MXFP8++", "e4m3/32:e8m0:floor:plusplus", "MXFP8+, a finer scale for all others", _MXPLUS),
    ("int4_asym", "INT4 asymmetric", "int4/64:fp16:asym", "4-bit integers with a zero point, groups of 64", _GROUPS),
    ("int3_asym", "INT3 asymmetric", "int3/64:fp16:asym", "3-bit integers with a zero point, groups of 64", _GROUPS),
    ("int2_asym", "INT2 asymmetric", "int2/32:fp16:asym", "2-bit integers with a zero point, groups of 32", _GROUPS),
    ("int4_asym_fp8", "INT4 asymmetric, fp8", _FP8_ZERO, "the same with fp8 scale and zero point", _GROUPS),
    ("mxfp4_sparse", "MXFP4 + sparse", _SPARSE, "MXFP4, top 0.5 % of the tensor kept in fp8", "dense-and-sparse"),
    ("adaptive_2_4", "adaptive 2/4 bits", _PAIR, "a bitmap picks 2 or 4 bits for each block", "block-adaptive pair"),
)

ALIASES: Mapping[str, str] = MappingProxyType({"mxfp8": "mxfp8_e4m3"})
"""Other spellings that the grammar accepts; the canonical name is what we print."""


def _build() -> dict[str, NamedFormat]:
    records: dict[str, Format] = {}
    named: dict[str, NamedFormat] = {}
    for name, title, spec, summary, source in _ROWS:
        record = parse_spec(spec, records)
        records[name] = record
        named[name] = NamedFormat(name=name, title=title, format=record, summary=summary, source=source)
    return named


NAMED_FORMATS: Mapping[str, NamedFormat] = MappingProxyType(_build())
"""Every named format, in the order that ``microscale formats`` lists them."""

_RECORDS: dict[str, Format] = {
    **{name: named.format for name, named in NAMED_FORMATS.items()},
    **{alias: NAMED_FORMATS[name].format for alias, name in ALIASES.items()},
}
_NAMES: dict[Format, str] = {named.format: name for name, named in NAMED_FORMATS.items()}


def parse_format(spec: str | Format) -> Format:
    """Return the format that a name or spec stands for; a record passes through.

    Raises:
        FormatSpecError: pointing at the word that is wrong, with what is possible.
        FormatError: neither a text nor a record.
    """
    expected = "a name, a spec such as 'e2m1/32:e8m0', or a format record"
    check_kind(spec, (str, *RECORDS), "a format", expected, error=FormatError)
    return parse_spec(spec, _RECORDS) if isinstance(spec, str) else spec


def format_name(fmt: Format) -> str:
    """Return the shortest spec that parses back: a name, a name with options (``mxfp4:even``), or the full spec."""
    check_kind(fmt, RECORDS, "a format", "a format record (parse_format makes one)", error=FormatError)
    if fmt in _NAMES:
        return _NAMES[fmt]
    if isinstance(fmt, BlockFormat):
        for base, name in _NAMES.items():
            if isinstance(base, BlockFormat) and base.sparse is None and _same_shape(fmt, base):
                known = option_words(base)
                words = [word for word in option_words(fmt) if word not in known]
                candidate = ":".join([name, *words]) + sparse_text(fmt.sparse)
                if parse_spec(candidate, _RECORDS) == fmt:
                    return candidate
    if isinstance(fmt, SegmentedFormat):
        pieces = [f"{format_name(segment.format)}*{segment.cols}" for segment in fmt.segments]
        return f"segments({','.join(pieces)})"
    return spec_text(fmt)


def _same_shape(one: BlockFormat, other: BlockFormat) -> bool:
    """Whether two formats differ in rules and policies only."""
    fields = ("element", "block", "scale", "tensor_scale", "sub_scale", "zero_point", "extension")
    return all(getattr(one, field) == getattr(other, field) for field in fields)
