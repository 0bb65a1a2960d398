"""Value grids: exact values where they are listed, exact counts where they are not, ticks in the right columns."""

from __future__ import annotations

import itertools

import pytest
from torch import tensor

from microscale.formats import NAMED_FORMATS, BlockFormat, parse_format
from microscale.kernels import fake_quantize
from microscale.report.grids import largest_element_values, positive_values, value_grid_text

E2M1 = "0  0.5  1  1.5  2  3  4  6"


def test_mxfp4_shows_its_eight_values_on_one_axis() -> None:
    assert value_grid_text("mxfp4", 49).splitlines() == [
        "e2m1: 8 values from 0 to 6, times the block's",
        "scale; the same below zero",
        "0  0.5  1  1.5  2       3       4               6",
        "├───┼───┼───┼───┼───────┼───────┼───────────────┤",
        E2M1,
    ]


def test_mxfp4_plus_shows_the_largest_element_on_the_same_axis() -> None:
    lines = value_grid_text("mxfp4_plus", 61).splitlines()
    axes = [line for line in lines if "┼" in line]
    assert E2M1 in lines
    assert "4  4.5  5  5.5  6  6.5  7  7.5" in lines
    assert "the block's largest element: 8 values from 4 to 7.5, step 0.5" in lines
    assert len(axes) == 2
    assert [axis.index("┼") for axis in axes] == [4, 32]  # 0.5 and 4 on an axis of 0 to 7.5 in 60 steps
    assert axes[0][48] == axes[1][48] == "┼"  # 6 belongs to both
    assert axes[1].startswith("╶")
    assert axes[0].endswith("╴")


def test_every_value_of_a_six_bit_element_is_listed() -> None:
    for name in ("mxfp6_e2m3", "mxfp6_e3m2"):
        record = NAMED_FORMATS[name].format
        assert isinstance(record, BlockFormat)
        text = value_grid_text(record)
        values = " ".join(line for line in text.splitlines()[3:] if not line.startswith(("2^", "binade"))).split()
        assert [float(value) for value in values] == positive_values(record.element)


def test_crowded_ticks_are_marked_and_counted_by_binade() -> None:
    text = value_grid_text("mxfp6_e3m2")
    assert "╋" in text
    assert "2^-2 … 2^4       4  ████" in text
    assert "╋" not in value_grid_text("mxfp6_e2m3")


def test_eight_bit_elements_show_the_number_of_values_in_each_binade() -> None:
    lines = value_grid_text("mxfp8_e4m3").splitlines()
    assert [line.split()[:-1] for line in lines[2:]] == [
        ["2^-9", "1"],
        ["2^-8", "2"],
        ["2^-7", "4"],
        ["2^-6", "…", "2^7", "8"],
        ["2^8", "7"],
    ]
    counted = 1 + 1 + 2 + 4 + 14 * 8 + 7
    assert lines[0].startswith(f"e4m3: {counted} values from 0 to 448")


def test_bars_are_proportional() -> None:
    bars = {line.split()[0]: line.count("█") for line in value_grid_text("mxint8").splitlines() if "█" in line}
    assert bars["2^0"] == 2 * bars["2^-1"] == 4 * bars["2^-2"] or abs(bars["2^0"] - 2 * bars["2^-1"]) <= 1
    assert bars["2^-6"] == 1


@pytest.mark.parametrize("spec", ["mxfp4_plus", "mxfp6_plus", "mxfp8_plus", "mxint8_plus", "mxint4_plus"])
def test_the_grid_of_the_largest_element_is_what_quantizing_gives(spec: str) -> None:
    record = parse_format(spec)
    assert isinstance(record, BlockFormat)
    values = largest_element_values(record)
    blocks = [[value] + [0.0] * 31 for value in values]
    assert fake_quantize(tensor(blocks), record)[:, 0].tolist() == values
    between = [[(low + high) / 2 * (1 + 1e-6)] + [0.0] * 31 for low, high in itertools.pairwise(values)]
    assert fake_quantize(tensor(between), record)[:, 0].tolist() == values[1:]


@pytest.mark.parametrize("spec", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxint8", "mxint4"])
def test_positive_values_are_what_quantizing_keeps(spec: str) -> None:
    record = parse_format(f"{spec}:floor")
    assert isinstance(record, BlockFormat)
    values = positive_values(record.element)
    blocks = [[values[-1], value] + [0.0] * 30 for value in values]
    assert fake_quantize(tensor(blocks), record)[:, 1].tolist() == values


def test_kinds_of_negative_values_are_said() -> None:
    assert "the same below zero" in value_grid_text("mxint8", 100)
    assert "below zero the same and -2" in value_grid_text("int4-full/32:e8m0", 100)
    assert "no negative values" in value_grid_text("ue4m3/32:e8m0", 100)
    assert "minus the block's zero point" in value_grid_text("int4_asym", 100)


def test_a_pair_shows_both_formats() -> None:
    text = value_grid_text("pair(int2/32:fp16:asym,mxfp4,50%)")
    assert "0  1  2  3\n" in text
    assert E2M1 in text


@pytest.mark.parametrize("width", [10, 40, 78, 200])
def test_no_line_is_wider_than_asked(width: int) -> None:
    for spec in (*NAMED_FORMATS, "bf16/32:e8m0", "e2m1-b40/32:e8m0", "e3m0/32:e8m0", "e0m1/32:e8m0"):
        for line in value_grid_text(spec, width).splitlines():
            assert len(line) <= max(width, 40), spec
            assert line == line.rstrip()
