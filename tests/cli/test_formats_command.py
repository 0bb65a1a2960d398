"""`microscale formats`: the list of named formats, and one explained."""

from __future__ import annotations

import pytest

from command_line import fail, microscale_command, succeed
from microscale.cli.output import console
from microscale.formats import NAMED_FORMATS


def test_formats_lists_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 250)
    rows = succeed("formats", "--json").json
    assert [row["name"] for row in rows] == list(NAMED_FORMATS)
    answer = "".join(succeed("formats").stdout.split())
    assert all(name in answer for name in NAMED_FORMATS) and "mxfp8=mxfp8_e4m3" in answer


def test_formats_explains_one() -> None:
    found = succeed("formats", "mxfp4_plus", "--json").json
    assert (found["name"], found["spec"]) == ("mxfp4_plus", "e2m1/32:e8m0:floor:plus")
    assert found["bits_per_value"] == 4.5
    assert "4.25" in succeed("formats", "mxfp4").stdout
    assert succeed("formats", "e3m2/16:e8m0:rceil", "--json").json["bits_per_value"] == 6.5
    assert "unknown format 'mxfp5'" in fail("formats", "mxfp5")
    error = microscale_command("formats", "mxfp5", "--json").json["error"]
    assert error["class"] == "FormatSpecError" and "mxfp5" in error["message"]


@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_every_named_format_is_explained(name: str) -> None:
    assert len(succeed("formats", name).stdout.splitlines()) > 8
    assert succeed("formats", name, "--json").json["name"] == name
