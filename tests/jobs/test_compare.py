"""The job ``compare`` in Python: rows, facts and page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import microscale
from command_line import succeed
from microscale.errors import FormatError, ModelError
from microscale.evaluation.perplexity import DEFAULT_BATCH, DEFAULT_WINDOW
from microscale.jobs.compare import split_formats
from microscale.jobs.printing import json_value
from microscale.jobs.small_options import CompareOptions
from microscale.kernels import Operation, count_executions, linear, preferred_layout, to_layout
from microscale.planning.executed import linear_words, summed
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
    assert "model in 1 format" in page and "a sample of text" in page
    assert [row.difference for row in found.report_rows] == [
        row.perplexity - found.rows[0].perplexity for row in found.rows
    ]


def test_what_ran_is_counted(model: Path, text: Path) -> None:
    """Two batches of windows through 14 layers, for each row; whatever backend there is here."""
    found = microscale.compare(model, text=text, formats="mxfp8,nvfp4_plus", window=64, batch=2)
    counts = [sum(row.executed.get("linear", {}).values()) for row in found.rows]
    assert counts == [0, 28, 28, 28, 28]
    (backend,) = {name for row in found.rows[1:3] for name in row.executed["linear"]}
    assert backend == why_not_first(found.rows[1].format)
    assert f"float32; {linear_words(summed(row.executed for row in found.rows))};" in found.facts["computation"]
    assert [row["executed"] for row in json_value(found)] == [row.executed for row in found.rows]


def why_not_first(spec: str) -> str:
    """The backend that runs the linear layers of a format here."""
    layer = microscale.quantize_tensor(torch.zeros(64, 64), spec)
    with count_executions() as counts:
        linear(torch.zeros(1, 64), to_layout(layer, preferred_layout(layer, torch.float32)))
    (ran,) = (name for operation, name in counts if operation is Operation.LINEAR)
    return ran


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
