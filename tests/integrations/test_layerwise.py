"""A checkpoint read layer by layer gives the tensors of the whole model, and is told from any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import microscale
from microscale.errors import CheckpointNotFoundError, ModelError
from microscale.integrations.layerwise import LayerFile, files_identity, outline_model, weights_identity
from small_models import same_bits
from tiny_models import save_tiny, tiny_model


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "jamba", "qwen2_5_vl"])
def test_layers_and_the_rest_are_the_whole_model(family: str, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "source")
    whole = dict(microscale.load(source).state_dict())
    file = LayerFile(source)
    rest = file.model()
    places = rest.state_dict()
    seen: set[str] = set()
    for name in file.names:
        for key, tensor in file.read(name).state_dict().items():
            assert same_bits(tensor, whole[f"{name}.{key}"])
            assert (
                rest.get_parameter(f"{name}.{key}").is_meta
                if key in dict(rest.get_submodule(name).named_parameters())
                else True
            )
            seen.add(f"{name}.{key}")
    others = {name: tensor for name, tensor in places.items() if not tensor.is_meta}
    assert all(same_bits(tensor, whole[name]) for name, tensor in others.items())
    assert seen | set(others) == set(whole) and not seen & set(others)


def test_a_layer_that_the_file_lacks(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        LayerFile(source).read("model.layers.1")


def test_what_cannot_be_read_layer_by_layer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="is no directory here"):
        LayerFile("somebody/model")
    microscale.quantize(save_tiny("llama", tmp_path / "source"), "mxfp4", output=tmp_path / "out")
    with pytest.raises(ModelError, match="holds packed weights"):
        LayerFile(tmp_path / "out")


def test_an_outline_has_all_modules_and_no_weight(tmp_path: Path) -> None:
    source = save_tiny("mixtral", tmp_path / "source")
    outline, whole = outline_model(source), microscale.load(source)
    assert outline is not None and all(parameter.is_meta for parameter in outline.parameters())
    shapes = {name: parameter.shape for name, parameter in outline.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in whole.named_parameters()}
    (source / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    assert outline_model(source) is None


def test_one_bit_makes_another_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = weights_identity(model)
    assert weights_identity(tiny_model("llama")) == before
    with torch.no_grad():
        model.lm_head.weight[3, 5] *= -1
    assert weights_identity(model) != before
    source = save_tiny("llama", tmp_path / "source")
    identity = files_identity(source)
    assert files_identity(source) == identity
    save_file(load_file(source / "model.safetensors"), source / "model.safetensors", metadata={"format": "pt"})
    assert files_identity(source) != identity, "a file that was written again may hold other numbers"
