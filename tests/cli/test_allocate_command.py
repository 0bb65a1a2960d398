"""`microscale allocate`: a recipe that quantizes, the front, and errors as a user sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import fail, succeed
from small_models import save_random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("allocate")
    save_random_model(root / "tiny")
    (root / "book.txt").write_text("The harbour was quiet. " * 60)
    return root


def arguments(folder: Path, budget: str) -> list[str | Path]:
    text = ["--calibration", folder / "book.txt", "--samples", "2", "--window", "32"]
    return ["allocate", folder / "tiny", "--budget", budget, "-o", folder / "recipe.yaml", "--points", "4", *text]


def test_a_recipe_that_quantizes_loads_and_scores(folder: Path) -> None:
    plot = folder / "front.svg"
    found = succeed(*arguments(folder, "5bits"), "--plot", plot, "--json").json
    assert found["budget"] == {"amount": 5.0, "unit": "bits"} and found["result"]["cost"] <= 5.0005
    assert len(found["layers"]) == 14 and found["layers"][0]["role"] == "attention.qkv"
    assert set(found["uniform"]) == {"mxfp4", "mxfp4_plus", "nvfp4", "mxfp6_e2m3", "mxfp8"}
    assert plot.read_text().startswith("<?xml")
    done = succeed("quantize", folder / "tiny", "--recipe", folder / "recipe.yaml", "-o", folder / "q", "--json").json
    assert done["bits_per_weight"] == pytest.approx(found["result"]["bits_per_weight"])
    score = succeed("eval", folder / "q", "--text", folder / "book.txt", "--window", "32", "--json").json
    assert score["perplexity"] > 0
    assert succeed("generate", folder / "q", "The", "-n", "4").stdout


def test_milliseconds_and_the_tables(folder: Path) -> None:
    answer = succeed(*arguments(folder, "500ms"), "--formats", "mxfp4,mxfp8/none", "--fuse")
    assert "Pareto front" in answer.stdout and "mlp.down" in answer.stdout and "of 500.000 ms" in answer.stdout
    assert "about 5 passes over 64 tokens" in " ".join(answer.stderr.split())


@pytest.mark.parametrize(
    ("budget", "options", "words"),
    [
        ("4.1bits", [], "smallest possible with these formats, 4.250 bits"),
        ("1kB", [], "smallest possible with these formats"),
        ("5", [], "must be a number with a unit"),
        ("5bits", ["--formats", "mxfp5"], "mxfp5"),
        ("5bits", ["--sensitivity", "hessian"], "possible: kl, fisher, error"),
        ("5bits", ["--method", "magic"], "unknown method or step 'magic'"),
        ("5bits", ["--plot", "front.gif"], "a plot is written as .png"),
        ("5bits", ["--fix", "norm=mxfp4"], "norms are"),
    ],
)
def test_errors(folder: Path, budget: str, options: list[str], words: str) -> None:
    assert words in " ".join(fail(*arguments(folder, budget), *options).split())


def test_text_is_needed(folder: Path) -> None:
    answer = fail("allocate", folder / "tiny", "--budget", "5bits", "-o", folder / "none.yaml")
    assert "give --calibration FILE" in answer and not (folder / "none.yaml").exists()
