"""The named formats: the list, the records, bits per value by number, aliases and titles."""

from __future__ import annotations

import pytest

from microscale.errors import FormatSpecError
from microscale.formats import (
    ALIASES,
    NAMED_FORMATS,
    BlockFormat,
    Extension,
    RuleKind,
    ScaleRule,
    VectorBlock,
    format_name,
    parse_format,
    spec_text,
)
from microscale.formats.elements import E8M0, FP32

# name: (canonical spec, bits per value, title)
EXPECTED = {
    "mxfp8_e4m3": ("e4m3/32:e8m0:rceil", 8.25, "MXFP8 E4M3"),
    "mxfp8_e5m2": ("e5m2/32:e8m0:rceil", 8.25, "MXFP8 E5M2"),
    "mxfp6_e2m3": ("e2m3/32:e8m0:floor", 6.25, "MXFP6 E2M3"),
    "mxfp6_e3m2": ("e3m2/32:e8m0:floor", 6.25, "MXFP6 E3M2"),
    "mxfp4": ("e2m1/32:e8m0:floor", 4.25, "MXFP4"),
    "mxint8": ("int8/32:e8m0:rceil", 8.25, "MXINT8"),
    "mxint4": ("int4/32:e8m0:rceil", 4.25, "MXINT4"),
    "nvfp4": ("e2m1/16:e4m3+fp32:amax", 4.5, "NVFP4"),
    "mxfp4_plus": ("e2m1/32:e8m0:floor:plus", 4.5, "MXFP4+"),
    "mxfp6_plus": ("e2m3/32:e8m0:floor:plus", 6.5, "MXFP6+"),
    "mxfp8_plus": ("e4m3/32:e8m0:floor:plus", 8.5, "MXFP8+"),
    "mxint8_plus": ("int8/32:e8m0:floor:plus", 8.5, "MXINT8+"),
    "mxint4_plus": ("int4/32:e8m0:floor:plus", 4.5, "MXINT4+"),
    "nvfp4_plus": ("e2m1/16:e4m3+fp32:amax:plus", 4.75, "NVFP4+"),
    "mxfp4_plusplus": ("e2m1/32:e8m0:floor:plusplus", 4.5, "MXFP4++"),
    "mxfp6_plusplus": ("e2m3/32:e8m0:floor:plusplus", 6.5, "MXFP6++"),
    "mxfp8_plusplus": ("e4m3/32:e8m0:floor:plusplus", 8.5, "MXFP8++"),
    "int4_asym": ("int4/64:fp16:asym", 4.3125, "INT4 asymmetric"),
    "int3_asym": ("int3/64:fp16:asym", 3.296875, "INT3 asymmetric"),
    "int2_asym": ("int2/32:fp16:asym", 2.5625, "INT2 asymmetric"),
    "int4_asym_fp8": ("int4/64:e4m3+fp32:asym(fp8)", 4.25, "INT4 asymmetric, fp8"),
    "mxfp4_sparse": ("e2m1/32:e8m0:floor+sparse0.5%:fp8", 4.37, "MXFP4 + sparse"),
    "adaptive_2_4": ("pair(int2/32:fp16:asym,int4/32:fp16:asym,50%)", 3.625, "adaptive 2/4 bits"),
}


def test_the_list_and_its_order() -> None:
    assert list(NAMED_FORMATS) == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_record_bits_and_title(name: str) -> None:
    spec, bits, title = EXPECTED[name]
    named = NAMED_FORMATS[name]
    assert spec_text(named.format) == spec
    assert parse_format(name) == parse_format(spec) == named.format
    assert named.format.bits_per_value() == pytest.approx(bits, rel=1e-15)
    assert (named.name, named.title) == (name, title)
    assert named.summary and named.source
    assert format_name(named.format) == name


def test_names_are_unique_records() -> None:
    assert len({named.format for named in NAMED_FORMATS.values()}) == len(NAMED_FORMATS)


def test_aliases() -> None:
    assert dict(ALIASES) == {"mxfp8": "mxfp8_e4m3"}
    assert parse_format("mxfp8") == parse_format("mxfp8_e4m3")
    assert format_name(parse_format("mxfp8")) == "mxfp8_e4m3"
    assert parse_format("mxfp8:even(1)") == parse_format("e4m3/32:e8m0:even(1)")


def test_rules_of_the_named_formats() -> None:
    """OCP's floor for FP4, FP6 and all of MX+; round-up for 8-bit floats and integers; amax / 6 for NVFP4."""
    for name, named in NAMED_FORMATS.items():
        fmt = named.format
        if not isinstance(fmt, BlockFormat) or fmt.zero_point is not None:
            continue
        if name.startswith("nvfp4"):
            assert fmt.rule == ScaleRule.AMAX and fmt.tensor_scale == FP32 and fmt.block == VectorBlock(16)
            continue
        assert fmt.scale == E8M0 and fmt.block == VectorBlock(32) and fmt.tensor_scale is None
        rounds_up = name.startswith(("mxfp8", "mxint")) and fmt.extension is Extension.NONE
        assert fmt.rule.kind is (RuleKind.RCEIL if rounds_up else RuleKind.FLOOR)


def test_records_pass_through_and_unnamed_formats_print_their_spec() -> None:
    fmt = parse_format("e3m2/16:e8m0:rceil")
    assert parse_format(fmt) is fmt
    assert format_name(fmt) == "e3m2/16:e8m0:rceil"
    assert isinstance(fmt, BlockFormat)


@pytest.mark.parametrize(
    "spec, name",
    [
        ("e2m1/32:e8m0:even", "mxfp4:even"),
        ("e2m1/32:e8m0", "mxfp4"),
        ("e4m3/32:e8m0:even(1):stochastic(3)", "mxfp8_e4m3:even(1):stochastic(3)"),
        ("mxfp8:nonfinite:nan_raise", "mxfp8_e4m3:nonfinite:nan_raise"),
        ("e2m1/32:e8m0:plus:toward_zero", "mxfp4_plus:toward_zero"),
        ("nvfp4:threshold(7)", "nvfp4:threshold(7)"),
        ("mxfp4:even+sparse1%:fp16", "mxfp4:even+sparse1%:fp16"),
        ("mxfp4+sparse0.5%:fp8", "mxfp4_sparse"),
        ("int4/64:fp16:asym:inf_saturate", "int4_asym:inf_saturate"),
        ("e2m1/16:e8m0", "e2m1/16:e8m0:floor"),
        ("pair(mxfp4,mxfp8,25%)", "pair(e2m1/32:e8m0:floor,e4m3/32:e8m0:rceil,25%)"),
    ],
)
def test_format_name_is_a_name_with_options_where_that_is_enough(spec: str, name: str) -> None:
    assert format_name(parse_format(spec)) == name


@pytest.mark.parametrize("base", EXPECTED)
def test_format_name_parses_back_for_every_option_of_every_name(base: str) -> None:
    options = [*(rule.value for rule in RuleKind if rule is not RuleKind.THRESHOLD), "threshold(7)", "percentile(9)"]
    options += ["even(1)", "toward_zero", "stochastic(0)", "stochastic(5)", "nonfinite", "nan_raise", "inf_saturate"]
    options += ["plus", "plusplus", "asym", "asym(fp8)", "sub(8,2,linear)", "even:toward_zero:nan_raise"]
    parsed = 0
    for option in options:
        for sparse in ("", "+sparse2%:fp16"):
            try:
                fmt = parse_format(f"{base}:{option}{sparse}")
            except FormatSpecError:
                continue  # the option does not fit this format
            parsed += 1
            assert parse_format(format_name(fmt)) == fmt
    assert parsed >= 6 or base in ("adaptive_2_4",)


def test_an_unknown_name_lists_all_names() -> None:
    with pytest.raises(FormatSpecError) as caught:
        parse_format("mxfp5")
    assert all(name in str(caught.value) for name in EXPECTED)
