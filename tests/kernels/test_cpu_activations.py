"""How linear rounds its input on the fly: which formats count in integers, and which are refused."""

from __future__ import annotations

import pytest

from microscale.formats import parse_format
from microscale.kernels.cpu import native
from microscale.kernels.cpu.activations import activation_refusal, plan_activations
from microscale.kernels.cpu.descriptors import FormatStruct
from microscale.kernels.cpu.enums import ActRule


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (None, None),
        ("mxfp4", None),
        ("segments(mxfp4*32,mxfp8*32)", None),
        ("adaptive_2_4", "adaptive_2_4 chooses among all numbers of a tensor"),
        ("mxfp4_sparse", "mxfp4_sparse chooses among all numbers of a tensor"),
        ("int4_asym", "int4_asym has zero points"),
        ("mxfp4:nan_raise", "mxfp4:nan_raise refuses NaN with an error of its own"),
        ("e4m3/16x16:fp32", "takes blocks along the last axis (a vector or a channel), not tiles or the whole tensor"),
        ("e2m1/channel:fp16:percentile(90)", "leaves rule percentile(90) of whole rows to the reference"),
    ],
)
def test_what_is_refused(spec: str | None, reason: str | None) -> None:
    assert activation_refusal(None if spec is None else parse_format(spec)) == reason


def test_segments_are_refused_where_one_of_them_is() -> None:
    spec = "segments(mxfp4*32,mxfp8:nan_raise*32)"
    assert activation_refusal(parse_format(spec)) == "mxfp8_e4m3:nan_raise refuses NaN with an error of its own"


@pytest.mark.skipif(native.NATIVE is None, reason="the extension is not built")
@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        (None, ActRule.KEEP),
        ("mxfp4", ActRule.INTEGER),  # 0, 1, 2, 3, 4, 6, 8, 12 halves
        ("mxint8", ActRule.INTEGER),
        ("int8/channel:fp32:amax", ActRule.INTEGER),
        ("int8/20:fp32:amax", ActRule.NUMBER),  # blocks that do not fill chunks of 32
        ("mxfp6_e2m3", ActRule.INTEGER),  # 7.5 is 60 steps of an eighth
        ("mxfp6_e3m2", ActRule.NUMBER),  # 28 is 448 steps of a sixteenth
        ("mxfp8", ActRule.NUMBER),
        ("mxfp4_plusplus", ActRule.NUMBER),  # an exponent difference scales the others
    ],
)
def test_small_integers_are_counted_and_all_else_is_rounded(spec: str | None, rule: ActRule) -> None:
    plan = plan_activations(None if spec is None else parse_format(spec))
    assert plan.rule is rule
    assert isinstance(plan.kept, FormatStruct) == (spec is not None), "the memory that the handle points into is held"
