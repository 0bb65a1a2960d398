"""The picture of allocate: what can be written, and what it shows."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from microscale.errors import AllocationError, DependencyError
from microscale.report.allocation import allocation_plot, check_picture

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("name", ["a.jpg", "a", ".svg", "a.svg.txt"])
def test_suffixes_that_are_no_picture(name: str, tmp_path: Path) -> None:
    with pytest.raises(AllocationError) as caught:
        check_picture(tmp_path / name)
    assert str(caught.value) == f"a plot is written as .png, .svg, .pdf, got {name!r}"


def test_pictures_are_checked_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_picture(tmp_path / "A.PNG")
    with pytest.raises(AllocationError, match="absent of the plot does not exist"):
        check_picture(tmp_path / "absent" / "a.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r"the plot needs matplotlib.*microscale\[report\]"):
        check_picture(tmp_path / "a.png")


@pytest.mark.parametrize(("lowest", "is_log"), [(1e-3, True), (0.9, False), (0.0, False)])
def test_the_axis_is_logarithmic_where_numbers_span_much(lowest: float, is_log: bool, tmp_path: Path) -> None:
    """A power of ten is a label of the logarithmic axis alone; zero has no place there and does not count."""
    file = tmp_path / "a.svg"
    front = [(4.0, 1.0), (8.0, lowest)]
    allocation_plot(file, front, {"mxfp4": (4.0, 1.0)}, front[1], across="bits", up="harm", title="of a model")
    svg = file.read_text("utf-8")
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    for words in ("<!-- bits -->", "<!-- harm -->", "<!-- of a model -->", "<!-- mxfp4 -->", "<!-- this recipe -->"):
        assert words in svg, words
    assert (r"10^{" in svg) is is_log
