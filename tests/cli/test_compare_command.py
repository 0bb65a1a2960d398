"""`microscale compare`: its JSON contract, the same numbers as eval, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import fail, microscale_command, succeed
from microscale.cli.output import console
from microscale.errors import QuantizationNote
from small_models import read_tensors, save_random_model

TEXT = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "model", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT)
    return path


ASKED = ["mxfp8", "e2m1/16:e8m0:rceil", "pair(int2/32:fp16:asym,mxfp4,50%)", "mxfp4"]


def test_the_json_contract(model: Path, text: Path, tmp_path: Path) -> None:
    """A list: the unquantized row, then w and w+a of each format in the order asked, under the string asked for."""
    rows = succeed(
        *("compare", model, "--formats", " , ".join(ASKED), "--text", text, "--window", "32", "--tokens", "120"),
        "--json",
    ).json
    assert isinstance(rows, list)
    assert [(row["format"], row["mode"]) for row in rows[1:]] == [
        (name, mode) for name in ASKED for mode in ("w", "w+a")
    ]
    assert {"format", "mode", "bits_per_weight", "bytes", "perplexity"} <= set(rows[0])
    assert rows[0]["format"] == "bfloat16" and rows[0]["mode"] not in ("w", "w+a")
    assert rows[0]["bits_per_weight"] == 16
    num_weights = sum(tensor.numel() for tensor in read_tensors(model).values())
    assert rows[0]["bytes"] == 2 * num_weights
    arguments = ("--text", text, "--window", "32", "--tokens", "120", "--json")
    assert rows[0]["perplexity"] == pytest.approx(succeed("eval", model, *arguments).json["perplexity"], rel=1e-6)
    for name, weights, both in zip(ASKED, rows[1::2], rows[2::2], strict=True):
        for row, extra in ((weights, []), (both, ["-a", name])):
            place = tmp_path / f"{ASKED.index(name)}{row['mode']}"
            made = succeed("quantize", model, "-f", name, *extra, "--layout", "microscale", "-o", place, "--json").json
            assert row["bits_per_weight"] == pytest.approx(made["bits_per_weight"], rel=1e-12)
            assert row["bytes"] == made["bytes"]
            score = succeed("eval", place, *arguments).json["perplexity"]
            assert row["perplexity"] == pytest.approx(score, rel=1e-6), (name, row["mode"])
    assert rows[1]["perplexity"] != rows[2]["perplexity"] != rows[0]["perplexity"]


@pytest.mark.parametrize("tied", [True, False])
def test_everything(tied: bool, text: Path, tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", tie_word_embeddings=tied)
    options = ("--text", text, "--window", "32", "--tokens", "120")
    rows = succeed("compare", model, "--formats", "mxfp4,nvfp4_plus", *options, "--full", "--json").json
    assert [row["mode"] for row in rows] == ["none", *["w", "w+a", "all"] * 2]
    for row in rows[3::3]:
        out, word = tmp_path / row["format"], row["format"]
        full = ("-f", word, "-a", word, "--attention", word, "--include", "lm_head", "--exclude", "embedding")
        full += ("--layout", "microscale")
        made = succeed("quantize", model, *full, "-o", out, "--json").json
        assert row["bits_per_weight"] == pytest.approx(made["bits_per_weight"], rel=1e-12)
        assert row["bytes"] == made["bytes"]
        assert made["attention"] == {"products": word, "kv_cache": None}
        score = succeed("eval", out, *options, "--json").json["perplexity"]
        assert row["perplexity"] == pytest.approx(score, rel=1e-6)
    without = succeed("compare", model, "--formats", "mxfp4,nvfp4_plus", *options, "--json").json
    assert [row["perplexity"] for row in without] == [row["perplexity"] for row in rows if row["mode"] != "all"]
    assert "all: head and attention too" in " ".join(succeed("compare", model, *options, "--full").stdout.split())


def test_the_table_and_the_page(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jinja2")
    monkeypatch.setattr(console, "width", 120)
    page = tmp_path / "deep" / "page.html"
    outcome = succeed(*("compare", model, "--formats", "mxfp8,nvfp4", "--text", text, "--window", "32", "--html", page))
    for word in ("bfloat16", "mxfp8", "nvfp4", "8.25", "4.5", "w+a"):
        assert word in outcome.stdout
    assert "<html" in page.read_text("utf-8") and "nvfp4" in page.read_text("utf-8")
    assert [entry.name for entry in page.parent.iterdir()] == ["page.html"]


REFUSED = {
    "an unknown format": (["--formats", "mxfp8,mxfp5"], "unknown format 'mxfp5'"),
    "no format": (["--formats", " , "], "no format to compare"),
    "too many tokens": (["--formats", "mxfp8", "--tokens", "100000"], "fewer than the 100000"),
    "a window longer than the model": (["--formats", "mxfp8", "--window", "9999"], "positions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_request(case: str, model: Path, text: Path) -> None:
    arguments, words = REFUSED[case]
    assert words in fail("compare", model, "--text", text, *arguments)
    error = microscale_command("compare", model, "--text", text, *arguments, "--json").json["error"]
    assert words in error["message"]


def test_a_page_that_cannot_be_written(model: Path, text: Path) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs Linux's /proc")
    common = ("compare", model, "--formats", "mxfp8", "--text", text, "--window", "32", "--tokens", "31")
    assert "writing /proc" in fail(*common, "--html", "/proc/microscale-test/page.html")


def test_a_quantized_model_is_compared_as_the_floats_that_it_means(model: Path, text: Path, tmp_path: Path) -> None:
    succeed("quantize", model, "-f", "mxfp4", "-o", tmp_path / "out")
    asked = ("compare", tmp_path / "out", "--formats", "mxfp4", "--text", text, "--window", "16", "--json")
    with pytest.warns(QuantizationNote, match="lost stays lost"):
        before, again, *_ = json.loads(succeed(*asked).stdout)
    assert before["perplexity"] == again["perplexity"], "numbers of a format stay what they are"


def test_a_format_that_gives_nan_is_null_in_json(model: Path, text: Path) -> None:
    """Overflow to NaN breaks the model; its score is no number, and the JSON stays strict."""
    rows = succeed(
        *("compare", model, "--formats", "e4m3/32:e8m0:floor:nonfinite", "--text", text, "--window", "32", "--json")
    )
    assert json.loads(rows.stdout)[1]["perplexity"] is None
