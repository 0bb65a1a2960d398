"""The job `inspect` in Python: what a checkpoint says of itself equals what its files hold."""

from __future__ import annotations

from pathlib import Path

import pytest

import microscale
from command_line import succeed
from microscale.errors import CheckpointError, CheckpointNotFoundError, OptionError
from microscale.jobs.printing import json_value
from microscale.nn.attention_setting import NOT_ROUNDED, AttentionFormats
from small_models import LLAMA_6M, read_tensors, save_random_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    source = save_random_model(folder / "model", num_hidden_layers=3)
    rules = ["down_proj=mxfp8/mxfp8", "layers.1.self_attn.*=none"]
    microscale.quantize(source, "mxfp4_plus", rules=rules, exclude=["o_proj"], output=folder / "out")
    return folder / "out"


def test_layers_and_tensors(checkpoint: Path) -> None:
    found = microscale.inspect(checkpoint)
    tensors = read_tensors(checkpoint)
    assert (found.path, found.layout, found.attention) == (str(checkpoint), "microscale", NOT_ROUNDED)
    assert found.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    names = {layer.name for layer in found.quantized}
    assert len(names) == 15 and not any("o_proj" in name for name in names)
    for layer in found.quantized:
        stored = [tensor for name, tensor in tensors.items() if name.startswith(f"{layer.name}.weight_")]
        assert layer.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in stored)
        rows, cols = layer.shape
        assert layer.num_weights == rows * cols
        assert layer.bits_per_weight == pytest.approx(8 * layer.num_bytes / (rows * cols), rel=1e-12)
        word = "mxfp8_e4m3" if layer.name.endswith("down_proj") else "mxfp4_plus"
        assert (layer.format, layer.method) == (word, "rtn")
        assert layer.activations == ("mxfp8_e4m3" if layer.name.endswith("down_proj") else None)
    others = {layer.name: layer for layer in found.others}
    assert set(others) == {name for name in tensors if not any(name.startswith(f"{layer}.") for layer in names)}
    assert others["model.norm.weight"].format == "bfloat16"
    assert found.num_weights == sum(layer.num_weights for layer in (*found.quantized, *found.others))
    assert found.bits_per_weight == pytest.approx(8 * found.num_bytes / found.num_weights, rel=1e-12)


def test_python_and_the_command_line_say_the_same(checkpoint: Path) -> None:
    assert json_value(microscale.inspect(checkpoint)) == succeed("inspect", checkpoint, "--json").json


def test_an_unquantized_model() -> None:
    found = microscale.inspect(LLAMA_6M)
    assert (found.layout, found.quantized, found.bits_per_weight) == ("none", (), 16)
    assert found.num_bytes + 8 < (LLAMA_6M / "model.safetensors").stat().st_size < found.num_bytes + 20_000


def test_the_rounding_of_attention(checkpoint: Path, tmp_path: Path) -> None:
    source = checkpoint.parent / "model"
    microscale.quantize(source, "mxfp4", attention="mxfp4", kv_cache="mxfp8", output=tmp_path / "out")
    found = microscale.inspect(str(tmp_path / "out"))
    assert found.attention == AttentionFormats.parse("mxfp4", "mxfp8")
    shown = json_value(found)
    assert (shown["attention"], shown["kv_cache"]) == ("mxfp4", "mxfp8_e4m3")


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="not a directory"):
        microscale.inspect(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        microscale.inspect(tmp_path)
    with pytest.raises(OptionError, match="path is a path"):
        microscale.inspect(5)
