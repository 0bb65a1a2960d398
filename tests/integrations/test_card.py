"""The model card: what it says of formats, methods and loading is what the directory holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import microscale
from tiny_models import save_tiny, tiny_model


@pytest.mark.parametrize(
    ("format", "layout", "said"),
    [
        ("mxfp4", "compressed-tensors", "install compressed-tensors"),
        ("mxfp4_plus", "microscale", "opens it WRONGLY"),
    ],
)
def test_a_written_model_has_a_card(format: str, layout: str, said: str, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    (source / "README.md").write_text("the card of the source")
    rules = ["*.down_proj=mxfp8/none"] if format == "mxfp4" else []
    microscale.quantize(source, format, rules=rules, output=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    fields = yaml.safe_load(head)
    assert fields["library_name"] == "transformers" and {"microscale", format} <= set(fields["tags"])
    assert "base_model" not in fields, "a place on this machine is no model of the hub"
    assert str(tmp_path) not in card and "# source, quantized" in body and f"File layout: {layout}." in body
    assert ("with `dtype=torch.float32` or float16 the first" in body) == (layout == "compressed-tensors")
    assert said in body and "No calibration text was used." in body
    if rules:
        assert "| 12 | mxfp4 | kept | rtn |" in body and "| 2 | mxfp8_e4m3 | kept | rtn |" in body


def test_a_model_of_the_hub_is_named_as_the_base(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config._name_or_path = model.name_or_path = "somebody/tiny-llama"
    microscale.save(microscale.quantize(model, "mxfp8"), tmp_path / "out")
    head = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])
    assert head["base_model"] == "somebody/tiny-llama" and head["base_model_relation"] == "quantized"
