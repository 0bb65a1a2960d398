"""The validating reader: one file, shards, and every way in which a directory can lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from microscale.checkpoint.reader import CheckpointReader, read_json
from microscale.checkpoint.schema import TensorInfo
from microscale.errors import CheckpointError, CheckpointNotFoundError

A, B = torch.arange(6, dtype=torch.float32).reshape(2, 3), torch.ones(4, dtype=torch.bfloat16)


def directory(path: Path, files: dict[str, dict[str, Tensor]], index: Any = None, config: Any = None) -> Path:
    """Write safetensors files, an index (a dict is its weight_map) and config.json."""
    path.mkdir()
    for name, tensors in files.items():
        save_file(tensors, path / name)
    if index is not None:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (path / "config.json").write_text(json.dumps({} if config is None else config))
    return path


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_one_file(tmp_path: Path) -> None:
    reader = CheckpointReader(directory(tmp_path / "m", {"model.safetensors": {"a": A, "b": B}}))
    assert reader.infos == {
        "a": TensorInfo(dtype=torch.float32, shape=(2, 3)),
        "b": TensorInfo(dtype=torch.bfloat16, shape=(4,)),
    }
    assert [reader.infos[name].num_bytes for name in ("a", "b")] == [24, 8]
    assert torch.equal(reader.load("a"), A) and torch.equal(reader.load("b"), B)
    with pytest.raises(CheckpointError, match="no tensor 'c'"):
        reader.load("c")


def test_shards(tmp_path: Path) -> None:
    reader = CheckpointReader(directory(tmp_path / "m", {ONE: {"a": A}, TWO: {"b": B}}, {"a": ONE, "b": TWO}))
    assert set(reader.infos) == {"a", "b"}
    assert torch.equal(reader.load("a"), A) and torch.equal(reader.load("b"), B)


def test_shards_without_an_index(tmp_path: Path) -> None:
    reader = CheckpointReader(directory(tmp_path / "m", {ONE: {"a": A}, TWO: {"b": B}}))
    assert set(reader.infos) == {"a", "b"}


def test_the_single_file_goes_before_others_without_an_index(tmp_path: Path) -> None:
    """As transformers picks it: an adapter or a consolidated copy beside model.safetensors is not part of the model."""
    reader = CheckpointReader(
        directory(tmp_path / "m", {"model.safetensors": {"a": A}, "consolidated.safetensors": {"b": B}})
    )
    assert set(reader.infos) == {"a"}


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool),
    ],
)
def test_every_dtype_of_a_header(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.zeros(2, 3, dtype=dtype)
    reader = CheckpointReader(directory(tmp_path / "m", {"model.safetensors": {"a": tensor}}))
    assert reader.infos["a"] == TensorInfo(dtype=dtype, shape=(2, 3))
    assert reader.load("a").dtype == dtype


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    reader = CheckpointReader(directory(tmp_path / "m", {"model.safetensors": tensors}))
    assert reader.infos["scalar"].shape == () and reader.infos["scalar"].num_bytes == 4
    assert reader.infos["empty"].num_bytes == 0


@pytest.mark.parametrize(
    ("files", "index", "words"),
    [
        ({ONE: {"a": A}}, {"a": ONE, "b": TWO}, f"{TWO} is missing"),
        ({ONE: {"a": A}, TWO: {"a": A}}, {"a": ONE, "b": TWO}, "'a' stands in both"),
        ({ONE: {"a": A}, TWO: {"b": B}}, {"a": TWO, "b": TWO}, "promises 1 tensor that are not there, e.g. 'a'"),
        ({ONE: {"a": A}}, {"a": ONE, "c": ONE}, "e.g. 'c'"),
        ({ONE: {"a": A}}, {}, "no weight_map"),
        ({ONE: {"a": A}}, [ONE], "no weight_map"),
        ({ONE: {"a": A}}, {"a": "../m/" + ONE}, "points outside"),
        ({ONE: {"a": A}}, {"a": None}, "no weight_map"),
        ({ONE: {"a": A}, "3": {"b": B}}, {"a": ONE, "b": 3}, "no weight_map"),
        ({ONE: {"a": A}, TWO: {"a": A}}, None, "'a' stands in both"),
    ],
)
def test_indices_that_lie(files: dict[str, dict[str, Tensor]], index: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(directory(tmp_path / "m", files, index))
    assert words in str(caught.value)


def test_what_is_no_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", Path(__file__)):
        with pytest.raises(CheckpointNotFoundError, match="is not a directory"):
            CheckpointReader(path)
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json does not exist"):
        CheckpointReader(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="holds no safetensors file"):
        CheckpointReader(directory(tmp_path / "m", {}))


def test_a_weights_file_that_is_a_directory(tmp_path: Path) -> None:
    path = directory(tmp_path / "m", {})
    (path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        CheckpointReader(path)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": "float32"}, torch.float32),
        ({"dtype": "float16", "torch_dtype": "float32"}, torch.float16),
        ({"dtype": "torch.float32"}, torch.float32),
        ({"dtype": None}, torch.bfloat16),
        ({"dtype": "bfloat16", "microscale": {"dtype": "float32"}}, torch.float32),
        ({"dtype": "float16", "microscale": {}}, torch.float16),
        ({"dtype": "float16", "microscale": 3}, torch.float16),
    ],
)
def test_the_dtype_of_the_model(config: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """Ours is in the microscale object: the layout of compressed-tensors needs another word in config.json."""
    reader = CheckpointReader(directory(tmp_path / "m", {"model.safetensors": {"a": A}}, config=config))
    assert reader.dtype == dtype


@pytest.mark.parametrize("word", ["float7", "nn", "abs", 3, ["float32"], {"text": "float32"}])
def test_a_dtype_that_is_none(word: Any, tmp_path: Path) -> None:
    reader = CheckpointReader(directory(tmp_path / "m", {"model.safetensors": {"a": A}}, config={"dtype": word}))
    with pytest.raises(CheckpointError, match="unknown dtype"):
        assert reader.dtype


@pytest.mark.parametrize("value", [3, "mxfp4", [], False])
def test_a_quantization_config_that_is_no_object(value: Any, tmp_path: Path) -> None:
    path = directory(tmp_path / "m", {"model.safetensors": {"a": A}}, config={"quantization_config": value})
    with pytest.raises(CheckpointError, match="must be an object"):
        assert CheckpointReader(path).quantization_config
    (path / "config.json").write_text('{"quantization_config": null}')
    assert CheckpointReader(path).quantization_config is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"nothing", b"\xff\xfe", b"\x00", b"[" * 50_000, b"{'a': 1}", b'{"a": 1} {"b": 2}']
)
def test_json_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_json(tmp_path / "config.json")


def test_json_that_is_no_object_or_no_file(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="must hold a JSON object, got list"):
        read_json(tmp_path / "list.json")
    with pytest.raises(CheckpointNotFoundError):
        read_json(tmp_path / "absent.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path)
