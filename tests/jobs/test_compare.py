"""The job ``compare`` in Python: rows, facts and page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import microscale
from command_line import succeed
from microscale.errors import FormatError, ModelError
from microscale.evaluation import DEFAULT_BATCH, DEFAULT_WINDOW
from microscale.jobs.compare import split_formats
from microscale.jobs.compare_options import CompareOptions
from microscale.jobs.printing import json_value
from small_models import save_random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("It was a dark and stormy night; the rain fell in torrents. " * 3)
    return path


def test_python_and_the_command_line_say_the_same_words(model: Path, text: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    found = microscale.compare(
        model, text=text, formats=["mxfp8", "mxfp4"], window=32, progress=lambda *step: seen.append(step)
    )
    shown = succeed("compare", model, "--text", text, "--formats", "mxfp8,mxfp4", "--window", "32", "--json").json
    rows = json_value(found)
    assert [row["mode"] for row in rows] == ["none", "w", "w+a", "w", "w+a"]
    for row, other in zip(rows, shown, strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}
    assert seen[-1][0] == seen[-1][1] and seen[-1][2] == "mxfp4 w+a"


def test_the_page_and_its_facts(model: Path, text: Path) -> None:
    pytest.importorskip("jinja2")
    found = microscale.compare(model, text=text, formats="mxfp8", window=32)
    assert found.facts | {"date": "", "versions": "", "computation": ""} == {
        "model": "model",
        "text": "text.txt",
        "tokens": str(len(text.read_text())),
        "window": "32",
        "computation": "",
        "versions": "",
        "date": "",
    }
    assert f"microscale {microscale.__version__}" in found.facts["versions"]
    page = found.page([("before", "a sample of text")])
    assert "model in 1 formats" in page and "a sample of text" in page
    assert [row.difference for row in found.report_rows] == [
        row.perplexity - found.rows[0].perplexity for row in found.rows
    ]


def test_a_loaded_model(model: Path, text: Path) -> None:
    """It computes in its own dtype, which counts as what it is stored in; it is as before afterwards."""
    tokenizer = microscale.load_tokenizer(model)
    loaded = microscale.load(model, dtype=torch.float32)
    words = {"text": text, "formats": "mxfp4", "window": 32}
    found, by_path = microscale.compare(loaded, tokenizer=tokenizer, **words), microscale.compare(model, **words)
    assert [row.perplexity for row in found.rows] == [row.perplexity for row in by_path.rows]
    assert (found.rows[0].format, found.rows[0].bits_per_weight) == ("float32", 32.0)
    with pytest.raises(ModelError, match="quantized already"):
        microscale.compare(microscale.quantize(loaded, "mxfp4"), tokenizer=tokenizer, **words)


def test_formats_are_split_outside_parentheses() -> None:
    expected = ["mxfp8", "mxfp4:mse(-1,1)", "pair(mxfp4,mxfp8,25%)"]
    assert split_formats("mxfp8, mxfp4:mse(-1,1) ,pair(mxfp4,mxfp8,25%)") == split_formats(expected) == expected
    for wrong in ("", ",", [], "mxfp4,pair(mxfp4,mxfp8", "mxfp4;mxfp8", ["mxfp4,mxfp8"]):
        with pytest.raises(FormatError):
            split_formats(wrong)


def test_the_defaults_are_those_of_the_protocol() -> None:
    options = CompareOptions(model="m", text=Path("t"))
    assert (options.window, options.batch) == (DEFAULT_WINDOW, DEFAULT_BATCH)
