"""A quantized directory as one of floats: its tensor table, what it tells, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import foreign_files as files
from microscale.checkpoint.float_reader import FloatReader, open_floats, quantization_of
from microscale.checkpoint.reader import CheckpointReader
from microscale.errors import CheckpointError
from small_models import edit_config, read_tensors, same_bits, save_two_layers


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_two_layers(tmp_path_factory.mktemp("models") / "llama")


def test_the_table_is_that_of_the_floats(original: Path, tmp_path: Path) -> None:
    said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    meant = files.write_foreign(original, tmp_path / "in", files.fp8_blocks, said)
    reader = open_floats(tmp_path / "in")
    assert isinstance(reader, FloatReader) and reader.quantization_config is None
    assert reader.stored_as == "FP8 (blocks of 128 x 128)" and len(reader.told) == 1
    plain = CheckpointReader(original)
    assert {name: info.shape for name, info in reader.infos.items()} == {
        name: info.shape for name, info in plain.infos.items()
    }
    name = "model.layers.0.mlp.up_proj.weight"
    assert reader.infos[name].dtype == torch.bfloat16
    assert same_bits(reader.load(name), meant[name].to(torch.bfloat16))
    assert same_bits(reader.load(name, torch.float32), meant[name])
    kept = "model.norm.weight"
    assert same_bits(reader.load(kept), read_tensors(original)[kept])
    assert reader.load(kept, torch.float32).dtype == torch.float32
    with pytest.raises(CheckpointError, match="absent"):
        reader.load("absent")


def test_an_unquantized_directory_stays_what_it_is(original: Path) -> None:
    assert type(open_floats(original)) is CheckpointReader
    assert quantization_of(CheckpointReader(original)) is None


def test_an_unknown_quantization_is_refused_with_what_is_read(original: Path, tmp_path: Path) -> None:
    files.write_foreign(original, tmp_path / "in", files.fp8_tensor, {"quant_method": "hqq"})
    with pytest.raises(CheckpointError, match=r"'hqq' .* it reads awq, .*gptq"):
        open_floats(tmp_path / "in")
    edit_config(tmp_path / "in", quantization_config={"quant_method": "modelopt_fp4", "quant_algo": "FP8"})
    assert open_floats(tmp_path / "in").infos.keys() >= {"model.layers.1.mlp.down_proj.weight"}
