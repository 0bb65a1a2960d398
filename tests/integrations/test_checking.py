"""What was written is opened before it takes its name: missing, surplus and misshapen tensors are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import microscale
from microscale.errors import CheckpointWriteError
from microscale.integrations.checking import UnreadableError, check_readable
from small_models import same_bits
from tiny_models import logits, save_tiny, tiny_model


def test_what_cannot_be_loaded_is_found_before_it_takes_its_name(tmp_path: Path) -> None:
    """RWKV reads the weight of every linear layer when it starts, which a packed layer of other tools does not have."""
    source = save_tiny("rwkv", tmp_path / "source")
    model = microscale.quantize(source, "mxfp4")
    with pytest.raises(CheckpointWriteError, match="transformers cannot open what was written"):
        microscale.save(model, tmp_path / "out", layout="compressed-tensors")
    assert list(tmp_path.iterdir()) == [source], "nothing is left"
    assert microscale.save(model, tmp_path / "out", layout="compressed-tensors", check=False) == "compressed-tensors"
    with pytest.warns(microscale.errors.QuantizationNote, match="written in layout microscale"):
        assert microscale.save(model, tmp_path / "auto") == "microscale"
    assert same_bits(logits(microscale.load(tmp_path / "auto")), logits(model))


@pytest.mark.parametrize("format", ["mxfp4", "mxfp4_plus"])
def test_names_and_shapes_are_compared(format: str, tmp_path: Path) -> None:
    model = microscale.quantize(tiny_model("llama", dtype=torch.bfloat16), format)
    layout = microscale.save(model, tmp_path / "out")
    check_readable(tmp_path / "out", layout)
    file = tmp_path / "out" / "model.safetensors"
    whole = load_file(file)
    norm = "model.layers.1.input_layernorm.weight"
    changes: dict[str, dict[str, Tensor]] = {
        "finds no tensor for": {name: tensor for name, tensor in whole.items() if name != norm},
        "would leave out": whole | {"model.layers.9.input_layernorm.weight": whole[norm].clone()},
        "shape": whole | {norm: torch.ones(3, dtype=torch.bfloat16)},
    }
    for said, tensors in changes.items():
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(UnreadableError, match=said):
            check_readable(tmp_path / "out", layout)
    save_file(changes["would leave out"], file, metadata={"format": "pt"})
    check_readable(tmp_path / "out", layout, ["model.layers.9.input_layernorm.weight"])
