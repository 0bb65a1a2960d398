"""`microscale explain`: equal layers are counted, `--layers` names each, and the JSON is that of Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import microscale
from command_line import fail, succeed
from small_models import save_random_model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explain")
    source = save_random_model(path / "source")
    microscale.quantize(source, "mxfp4", rules=["*.down_proj=mxfp8/mxfp8"], output=path / "out")
    return path / "out"


def table(text: str) -> list[list[str]]:
    """Return the cells of the table in a text."""
    return [line.strip("│ ").replace(" ", "").split("│") for line in text.splitlines() if line.startswith("│")]


def test_equal_layers_are_counted(written: Path) -> None:
    text = succeed("explain", written).stdout
    rows = [row[:3] for row in table(text)]
    assert rows[1:3] == [["12", "mxfp4", "kept"], ["2", "mxfp8_e4m3", "mxfp8_e4m3:even(1)"]]
    assert "12 layers such as model.layers.0.self_attn.q_proj: linear" in text
    assert "This is a forward call of the model, as eval makes it" in text


def test_every_layer_is_named_on_request(written: Path) -> None:
    names = [row[0] for row in table(succeed("explain", written, "--layers").stdout)]
    assert len(names) == len(set(names)) == 16 and names[-1] == "lm_head"


def test_the_json_is_what_python_says(written: Path) -> None:
    found = json.loads(succeed("explain", written, "--json").stdout)
    assert found.pop("model") == str(written)
    assert found == json.loads(json.dumps(microscale.explain(str(written)).as_json()))
    passed_over = {other["backend"] for layer in found["layers"] for other in layer["passed_over"]}
    assert passed_over.isdisjoint({layer["backend"] for layer in found["layers"]})


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "is not a model directory" in fail("explain", tmp_path / "nothing")
