"""`microscale analyze`: the page, the JSON, and errors as a user sees them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from command_line import fail, succeed
from small_models import save_random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("analyze")
    save_random_model(root / "tiny")
    (root / "book.txt").write_text("The harbour was quiet. " * 60)
    return root


def test_a_page_that_needs_nothing_else(folder: Path) -> None:
    text = ["--calibration", folder / "book.txt", "--samples", "2", "--window", "32"]
    found = succeed("analyze", folder / "tiny", *text, "-o", folder / "report.html", "--json").json
    layer = found["layers"][0]
    assert layer["role"] == "attention.qkv" and set(layer["errors"]) == set(found["formats"])
    assert layer["inputs"]["percentiles"]["50.0"] > 0 and found["recommendations"][0]["reason"]
    page = (folder / "report.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=|url\(|@import|https?://""", page)
    for words in ("model.layers.1.mlp.down_proj", "mxfp6_e3m2", "Bits against error", "Channels that stand out"):
        assert words in page
    assert page.count("<svg") == page.count("</svg>") > 10
    assert "What suits each class" in succeed("analyze", folder / "tiny", *text, "-f", "mxfp4,mxfp8").stdout


def test_gradients(folder: Path) -> None:
    text = ["--calibration", folder / "book.txt", "--samples", "2", "--window", "32", "-f", "mxfp4"]
    page = folder / "gradients.html"
    found = succeed("analyze", folder / "tiny", *text, "--gradients", "-o", page, "--json").json
    layer = found["layers"][0]
    assert layer["output_gradients"]["rows"] == 64 and layer["weight_gradients"]["std"] > 0
    assert layer["errors"]["mxfp4"]["gradient_qsnr_db"] > 5
    for words in ("mlp.down, output gradients", "<option>weight gradients</option>"):
        assert words in page.read_text()
    plain = succeed("analyze", folder / "tiny", *text, "--json").json
    assert plain["layers"][0]["inputs"] == layer["inputs"] and plain["layers"][0]["weight_gradients"] is None


def test_reasons_are_told_where_there_is_no_page(folder: Path) -> None:
    text = ["--calibration", folder / "book.txt", "--samples", "1", "--window", "32", "-f", "mxfp4"]
    assert "mlp.down, inputs: Blocks of 32 have" in succeed("analyze", folder / "tiny", *text).stdout


def test_errors(folder: Path) -> None:
    assert "give --calibration FILE" in fail("analyze", folder / "tiny")
    assert "mxfp5" in fail("analyze", folder / "tiny", "--calibration", folder / "book.txt", "-f", "mxfp5")
    assert "none.txt" in fail("analyze", folder / "tiny", "--calibration", folder / "none.txt", "--window", "32")
