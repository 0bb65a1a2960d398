"""`microscale allocate`: a recipe that quantizes, the front, and errors as a user sees them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import microscale
from command_line import fail, succeed
from microscale.errors import DependencyError
from microscale.jobs import allocate as allocate_job
from microscale.jobs.allocate_options import DEFAULT_CANDIDATES
from small_models import read_config, save_random_model


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


def test_the_cache_by_hand(folder: Path, tmp_path: Path) -> None:
    options = ("--formats", "mxfp4,mxfp8", "--fix", "kv_cache=mxfp6_e2m3", "--fix", "mlp.down=mxfp8", "--json")
    layers = succeed(*arguments(folder, "6bits"), *options).json["layers"]
    assert {layer["chosen"] for layer in layers} <= {"mxfp4", "mxfp8"}
    succeed("quantize", folder / "tiny", "--recipe", folder / "recipe.yaml", "-o", tmp_path / "q")
    assert succeed("inspect", tmp_path / "q", "--json").json["kv_cache"] == "mxfp6_e2m3"
    text = ("--calibration", folder / "book.txt", "--samples", "2", "--window", "32")
    auto = ("--method", "auto", "--bits", "6", "-f", "mxfp4,mxfp8", "--rule", "kv_cache=mxfp8", "--attention", "mxfp4")
    made = succeed("quantize", folder / "tiny", *auto, *text, "-o", tmp_path / "auto", "--json").json
    assert made["attention"] == {"products": "mxfp4", "kv_cache": "mxfp8_e4m3"}


def test_milliseconds_and_the_tables(folder: Path) -> None:
    answer = succeed(*arguments(folder, "500ms"), "--formats", "mxfp4,mxfp8/none", "--fuse")
    assert "Pareto front" in answer.stdout and "mlp.down" in answer.stdout and "of 500.000 ms" in answer.stdout
    assert "about 6 passes over 64 tokens" in " ".join(answer.stderr.split())


def test_errors(folder: Path) -> None:
    words = "smallest possible with these formats, 4.250 bits"
    assert words in " ".join(fail(*arguments(folder, "4.1bits")).split())


SEGMENTS = "mxfp4,micromix:bits=5.5,wider=(mxfp6_e2m3),mxfp6_e2m3"


def test_segments_are_a_candidate(folder: Path, tmp_path: Path) -> None:
    """What was measured is what the recipe makes, layer by layer, though not all layers of a group are cut."""
    found = succeed(*arguments(folder, "4.8bits"), "--formats", SEGMENTS, "--method", "gptq", "--json").json
    cut = {layer["name"]: layer for layer in found["layers"] if "micromix" in layer["chosen"]}
    assert 0 < len(cut) < 14
    out = tmp_path / "q"
    done = succeed(
        *("quantize", folder / "tiny", "--recipe", folder / "recipe.yaml", "-o", out, "--json"),
        *("--calibration", folder / "book.txt", "--samples", "2", "--window", "32"),
    ).json
    assert done["bits_per_weight"] == pytest.approx(found["result"]["bits_per_weight"])
    facts = {layer["name"]: layer for layer in succeed("inspect", out, "--json").json["layers"]}
    for name, layer in cut.items():
        assert "micromix" in layer["method"] and layer["method"].endswith("gptq")
        assert ("counts=" in layer["method"]) == facts[name]["format"].startswith("segments(")
    assert any(facts[name]["format"].startswith("segments(") for name in cut)
    assert succeed("eval", out, "--text", folder / "book.txt", "--window", "32", "--json").json["perplexity"] > 0


def automatic(folder: Path, out: Path, *options: str | Path) -> list[str | Path]:
    text = ["--calibration", folder / "book.txt", "--samples", "2", "--window", "32"]
    return ["quantize", folder / "tiny", "--method", "auto", "--bits", "5", "-o", out, *text, *options]


def test_auto_rounds_the_inputs_that_it_is_asked_to(folder: Path, tmp_path: Path) -> None:
    """None where no activations are named, as everywhere; those of --activations for candidates that name none."""
    made = succeed(*automatic(folder, tmp_path / "none", "--json")).json
    assert {scheme["activations"] for scheme in made["schemes"]} == {None}
    both = ("-a", "mxfp8", "-f", "mxfp4,nvfp4/none,mxfp8", "--layout", "microscale")
    made = succeed(*automatic(folder, tmp_path / "both", *both, "--json")).json
    inputs = {(scheme["weights"], scheme["activations"]) for scheme in made["schemes"]}
    assert inputs <= {("mxfp4", "mxfp8_e4m3"), ("mxfp8_e4m3", "mxfp8_e4m3"), ("nvfp4", None)} and len(inputs) > 1


def test_one_candidate_is_no_choice(folder: Path, tmp_path: Path) -> None:
    words = "alone leaves nothing to choose"
    assert words in fail(*arguments(folder, "5bits"), "--formats", "mxfp4")
    assert words in fail(*automatic(folder, tmp_path / "one", "-f", "mxfp8,mxfp8_e4m3"))


def test_the_solver_is_asked_for_before_anything_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise DependencyError("scipy", "allocate", "allocation under a budget")

    monkeypatch.setattr(allocate_job, "check_solver", refuse)
    monkeypatch.setattr(allocate_job, "measure_table", None)
    assert "run: pip install scipy" in " ".join(fail(*arguments(folder, "5bits")).split())


def test_perplexities_are_predicted(folder: Path) -> None:
    """The unquantized model's on the measuring text, times exp(sensitivity); the front's points say something new."""
    found = succeed(*arguments(folder, "5bits"), "--json").json
    model = microscale.load(folder / "tiny", dtype=torch.float32)
    assert found["perplexity_before"] > 1
    size = sum(parameter.numel() for parameter in model.parameters())
    for point in (*found["front"], found["result"], *found["uniform"].values()):
        expected = found["perplexity_before"] * math.exp(point["sensitivity"])
        assert point["predicted_perplexity"] == pytest.approx(expected)
        assert point["bits_per_weight_model"] == pytest.approx(8 * point["bytes"] / size)
    assert found["result"] in found["front"]
    steps = zip(found["front"], found["front"][1:], strict=False)
    assert all(b["sensitivity"] <= 0.99 * a["sensitivity"] and a["cost"] < b["cost"] for a, b in steps)
    error = succeed(*arguments(folder, "5bits"), "--sensitivity", "error", "--json").json
    assert error["perplexity_before"] is None and error["result"]["predicted_perplexity"] is None


def test_auto_is_allocate_and_quantize(folder: Path, tmp_path: Path) -> None:
    own = ",".join(f"{word}/{word}" for word in DEFAULT_CANDIDATES.split(","))
    succeed(*arguments(folder, "5bits"))
    succeed("quantize", folder / "tiny", "--recipe", folder / "recipe.yaml", "-o", tmp_path / "two")
    done = succeed(*automatic(folder, tmp_path / "one", "-f", own), "--json").json
    assert done["allocation"]["result"]["cost"] <= 5.0005
    one, two = read_config(tmp_path / "one"), read_config(tmp_path / "two")
    assert one["quantization_config"] == two["quantization_config"] and one["microscale"] == two["microscale"]
    (tmp_path / "again.yaml").write_text(done["allocation"]["recipe"])
    succeed("quantize", folder / "tiny", "--recipe", tmp_path / "again.yaml", "-o", tmp_path / "three")
    assert read_config(tmp_path / "three")["quantization_config"] == one["quantization_config"]
    answer = " ".join(succeed(*automatic(folder, tmp_path / "one"), "--overwrite").stdout.split())
    assert "chosen from a front of" in answer and "bits of 5.000 bits; whole model" in answer
    assert "predicted perplexity" in answer


def test_auto_with_choices(folder: Path, tmp_path: Path) -> None:
    options = ["-f", "mxfp4,mxfp8", "-a", "none", "--rule", "mlp.down=nvfp4/mxfp8", "--exclude", "*.o_proj", "--json"]
    text = ["--calibration", folder / "book.txt", "--samples", "2", "--window", "32"]
    done = succeed(
        *("quantize", folder / "tiny", "--method", "auto+gptq", "--bits", "5", "-o", tmp_path / "q"), *text, *options
    ).json
    assert {(s["weights"], s["activations"]) for s in done["schemes"]} == {
        ("mxfp4", None),
        ("mxfp8_e4m3", None),
        ("nvfp4", "mxfp8_e4m3:even(1)"),
    }
    assert done["layout"] == "compressed-tensors" and len(done["unquantized"]) == 3  # two o_proj and the head
    methods = {layer["method"] for layer in succeed("inspect", tmp_path / "q", "--json").json["layers"]}
    assert methods == {"gptq"}


def test_bits_of_a_method_with_a_budget_of_its_own(folder: Path, tmp_path: Path) -> None:
    text = ["--calibration", folder / "book.txt", "--samples", "2", "--window", "32"]
    formats = ["-f", "mxfp4", "-a", "mxfp4"]
    for method, word in (("micromix", "micromix:bits=5.5+rtn"), ("rule+micromix+gptq", "rule+micromix:bits=5.5+gptq")):
        out = tmp_path / method
        done = succeed(
            *("quantize", folder / "tiny", *formats, "--method", method, "--bits", "5.5", *text, "-o", out, "--json")
        ).json
        assert 4.25 < done["bits_per_weight"] <= 5.5
        assert {layer["method"] for layer in succeed("inspect", out, "--json").json["layers"]} == {word}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "auto"], "method auto needs a budget of bits per weight"),
        (["--method", "auto", "--bits", "4.1"], "smallest possible with these formats, 4.250 bits"),
        (["--method", "auto", "--bits", "-1"], "bits is a number above 0"),
        (["--method", "auto", "--bits", "5", "-f", "mxfp5"], "mxfp5"),
        (["--method", "auto+magic", "--bits", "5"], "unknown method or step 'magic'"),
        (["--method", "auto", "--bits", "5", "--part", "vision"], "does not reach part vision"),
        (["--method", "auto", "--bits", "5", "--effort", "good"], "add --method best"),
        (["-f", "mxfp4", "--bits", "5"], "method rtn has no budget"),
        (["-f", "mxfp4", "--method", "micromix:bits=6", "--bits", "5"], "has bits=6 already"),
        (["-f", "mxfp4", "--method", "rule+auto"], "auto is no step of a chain"),
        (["--recipe", "r.yaml", "--bits", "5"], "either --recipe or --bits"),
    ],
)
def test_bits_that_cannot_be(folder: Path, tmp_path: Path, options: list[str], words: str) -> None:
    text = ["--calibration", folder / "book.txt", "--samples", "2", "--window", "32"]
    answer = fail("quantize", folder / "tiny", "-o", tmp_path / "q", *text, *options)
    assert words in " ".join(answer.split()) and not (tmp_path / "q").exists()


def test_auto_without_text(folder: Path, tmp_path: Path) -> None:
    answer = fail("quantize", folder / "tiny", "-o", tmp_path / "q", "--method", "auto", "--bits", "5")
    assert "method auto measures layers on text" in answer
