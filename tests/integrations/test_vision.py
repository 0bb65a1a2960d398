"""Models that see: parts of them are quantized, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import microscale
import microscale.hf  # pyright: ignore[reportUnusedImport]  # registers with transformers
from family_models import family_model, image_inputs, run
from microscale.errors import ModelError
from microscale.nn.packed import PackedModule
from small_models import read_config, read_tensors, same_bits, same_tensors

VISION = 2 * 5
"""Linear layers of two blocks."""
CONNECTOR = 2
"""Those of the merger, which lies in the vision tower and belongs to neither side."""
LANGUAGE = 2 * 7
COUNTS = {"language": LANGUAGE, "vision": VISION, "connector": CONNECTOR, "all": VISION + CONNECTOR + LANGUAGE}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vision") / "source"
    family_model("qwen2_5_vl", dtype=torch.bfloat16).save_pretrained(path)
    return path


def see(model: Any) -> Tensor:
    return run(model, image_inputs(torch.bfloat16))


def packed(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, PackedModule)}


def test_an_original_model_is_loaded_with_its_eyes(source: Path) -> None:
    loaded = microscale.load(source)
    assert type(loaded).__name__ == "Qwen2_5_VLForConditionalGeneration"
    original = family_model("qwen2_5_vl", dtype=torch.bfloat16).state_dict()
    assert same_tensors(dict(loaded.state_dict()), dict(original)) == []


@pytest.mark.parametrize("part", list(COUNTS))
@pytest.mark.parametrize("format", ["mxfp4", "mxfp4_plus"])
def test_parts_are_quantized_saved_and_loaded(source: Path, tmp_path: Path, part: str, format: str) -> None:
    in_memory = microscale.quantize(source, format, part=part)
    names = packed(in_memory)
    assert len(names) == COUNTS[part]
    is_visual = {name.startswith("model.visual.") for name in names}
    assert is_visual == {"language": {False}, "all": {False, True}}.get(part, {True})
    expected = see(in_memory)
    assert not same_bits(expected, see(microscale.load(source)))
    layout = microscale.save(in_memory, tmp_path / "out")
    assert layout == ("compressed-tensors" if format == "mxfp4" else "microscale")
    loaded = microscale.load(tmp_path / "out")
    assert packed(loaded) == names
    assert same_bits(see(loaded), expected)
    stock = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert same_bits(see(stock), expected)
    if layout == "microscale":
        for model, name in ((loaded, "again"), (stock, "once more")):
            model.save_pretrained(tmp_path / name)
            assert same_tensors(read_tensors(tmp_path / "out"), read_tensors(tmp_path / name)) == []
            assert read_config(tmp_path / "out") == read_config(tmp_path / name)


def test_activations_and_what_is_included(source: Path, tmp_path: Path) -> None:
    in_memory = microscale.quantize(source, "mxfp4_plus", activations="mxfp8", include=["visual.merger.*"])
    assert len(packed(in_memory)) == LANGUAGE + 2
    microscale.save(in_memory, tmp_path / "out")
    assert same_bits(see(microscale.load(tmp_path / "out")), see(in_memory))


def test_text_alone(source: Path) -> None:
    model = microscale.quantize(source, "mxfp8")
    tokens = torch.arange(3, 30)[None]
    assert run(model, {"input_ids": tokens}).shape == (1, 27, 96)


def test_a_text_model_has_no_vision_part() -> None:
    with pytest.raises(ModelError, match="no vision part"):
        microscale.quantize(family_model("llama", dtype=torch.float32), "mxfp4", part="vision")
