"""inspect_checkpoint reads headers only, and its numbers are those of the files."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest

import microscale
from microscale.errors import CheckpointError
from microscale.formats import NAMED_FORMATS
from microscale.nn.packed import PackedModule
from microscale.planning.inspection import inspect_checkpoint
from small_models import TOKENS, read_config, save_random_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "model", tie_word_embeddings=False)


def payload(path: Path) -> int:
    """Return the bytes of all tensors of all files: the files without their headers."""
    total = 0
    for file in path.glob("*.safetensors"):
        (length,) = struct.unpack("<Q", file.open("rb").read(8))
        total += file.stat().st_size - 8 - length
    return total


@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_the_numbers_are_those_of_the_files(name: str, source: Path, tmp_path: Path) -> None:
    model = microscale.quantize(source, name, include=["lm_head"])
    layout = microscale.save(model, tmp_path / "out")
    found = inspect_checkpoint(tmp_path / "out")
    assert found.layout == layout
    assert found.num_bytes == payload(tmp_path / "out")
    assert found.num_weights == sum(parameter.numel() for parameter in microscale.load(source).parameters())
    assert len(found.quantized) == 15
    assert {layer.format for layer in found.quantized} == {name}
    fmt = NAMED_FORMATS[name].format
    for layer in found.quantized:
        assert layer.num_weights == math.prod(layer.shape)
        # Rows of 64 and 96 are padded to whole blocks of 64, and every stream of bits to a byte.
        assert layer.bits_per_weight <= fmt.bits_per_value(*layer.shape) * 128 / 96 + 0.3
        assert layer.bits_per_weight >= fmt.bits_per_value(*layer.shape) - 0.01
    quantized = sum(layer.num_bytes for layer in found.quantized)
    assert found.bits_per_quantized_weight == 8 * quantized / sum(layer.num_weights for layer in found.quantized)
    assert found.bits_per_weight == 8 * found.num_bytes / found.num_weights
    assert found.float_size == inspect_checkpoint(source).size
    on_disk = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert (found.num_files, found.file_bytes) == (1, on_disk)
    before, after = inspect_checkpoint(source).size, found.size
    for piece in (
        f"{before.bits_per_weight:.3f} bits",
        f"{after.bits_per_weight:.3f} bits",
        f"{on_disk:,} bytes in 1 file",
    ):
        assert piece in found.size_words()


def test_no_data_is_read(source: Path, tmp_path: Path) -> None:
    """The data may even be noise: only the headers count."""
    microscale.save(microscale.quantize(source, "mxfp4_plus"), tmp_path / "out")
    expected = inspect_checkpoint(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    content[8 + length :] = b"\xff" * (len(content) - 8 - length)
    file.write_bytes(content)
    assert inspect_checkpoint(tmp_path / "out") == expected


def test_an_unquantized_checkpoint(source: Path) -> None:
    found = inspect_checkpoint(source)
    assert found.layout == "none" and found.quantized == () and found.bits_per_quantized_weight == 0
    assert found.num_bytes == payload(source) and found.bits_per_weight == 16


def test_an_unknown_method(source: Path, tmp_path: Path) -> None:
    microscale.save(microscale.quantize(source, "mxfp4"), tmp_path / "out")
    config = read_config(tmp_path / "out")
    config["quantization_config"]["quant_method"] = "gptq"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="gptq"):
        inspect_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("method", ["hadamard", "permute", "lowrank:rank=4", "micromix"])
def test_what_a_layer_keeps_for_run_time_is_counted(method: str, tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "model")
    model = microscale.quantize(source, "mxfp4", activations="mxfp4", method=method, calibration=TOKENS)
    microscale.save(model, tmp_path / "out")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    found = {layer.name: layer.num_bytes for layer in inspect_checkpoint(tmp_path / "out").quantized}
    assert found == {name: module.num_bytes for name, module in layers.items()}
    assert not any("transforms" in layer.name for layer in inspect_checkpoint(tmp_path / "out").others)
