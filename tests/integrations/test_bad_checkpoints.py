"""Damaged, contradictory and hostile checkpoints: each case has its own error, never a traceback or random weights."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import microscale
from command_line import fail, microscale_command, succeed
from microscale.checkpoint.reader import CheckpointReader
from microscale.checkpoint.registry import read_stored_layers
from microscale.checkpoint.schema import TensorInfo
from microscale.errors import CheckpointError, CheckpointNotFoundError, MicroscaleError, ModelError
from small_models import (
    edit_config,
    edit_tensors,
    logits,
    read_config,
    read_tensors,
    same_bits,
    save_random_model,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def made(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a format to a checkpoint in our layout, made once and not to be changed."""
    folder = tmp_path_factory.mktemp("made")

    def make(spec: str, layout: str = "microscale") -> Path:
        path = folder / f"{spec.replace('/', '_')} {layout}"
        if not path.exists():
            microscale.save(microscale.quantize(plain, spec), path, layout=layout)
        return path

    return make


@pytest.fixture
def copied(made: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function from a format to a fresh copy of its checkpoint, to be damaged."""

    def copy(*arguments: str) -> Path:
        path = tmp_path / "copy"
        shutil.copytree(made(*arguments), path)
        return path

    return copy


def refused(path: Path, error: type[Exception], *words: str) -> None:
    """Check that every way in refuses a checkpoint with the same class."""
    with pytest.raises(error) as caught:
        microscale.load(path)
    for word in words:
        assert word in str(caught.value)
    assert fail("generate", path, "a")
    text = path.parent / "text.txt"
    text.write_text("some words to score\n" * 3)
    assert fail("eval", path, "--text", text, "--window", "16")


# Directories that are no checkpoint


def test_a_missing_path(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path / "a" / "b", Path("./no/such/place")):
        refused_early(path, CheckpointNotFoundError, str(path))


def refused_early(path: Path, error: type[Exception], *words: str) -> None:
    """Check loading, quantizing, and that nothing was written."""
    for call in (lambda: microscale.load(path), lambda: microscale.quantize(path, "mxfp4")):
        with pytest.raises(error) as caught:
            call()
        for word in words:
            assert word in str(caught.value)


def test_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused_early(tmp_path / "empty", CheckpointNotFoundError, "config.json", "does not exist")


def test_a_directory_without_weights(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(plain / "config.json", tmp_path / "bare")
    refused_early(tmp_path / "bare", CheckpointNotFoundError, "holds no safetensors file")


def test_a_file_in_place_of_a_directory(plain: Path) -> None:
    refused_early(plain / "config.json", CheckpointNotFoundError, "not a model directory")
    assert "not a directory" in fail("inspect", plain / "config.json")


def test_a_config_that_is_no_json(plain: Path, tmp_path: Path) -> None:
    for name, content in {
        "cut": '{"model_type": "lla',
        "empty": "",
        "binary": "\xff\xfe",
        "nested": "[" * 100_000,
    }.items():
        shutil.copytree(plain, tmp_path / name)
        (tmp_path / name / "config.json").write_bytes(content.encode("latin-1"))
        refused_early(tmp_path / name, CheckpointError, "config.json", "JSON")


def test_a_config_that_is_no_object(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "list")
    (tmp_path / "list" / "config.json").write_text("[1, 2]")
    refused_early(tmp_path / "list", CheckpointError, "must hold a JSON object")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": None},
        {"model_type": "no such family"},
        {"model_type": 3},
        {"model_type": "t5"},
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"hidden_act": "none"},
        {"dtype": "float7"},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["none", "microscale", "compressed-tensors"])
def test_a_config_with_wrong_fields(
    changes: dict[str, Any], layout: str, plain: Path, made: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(plain if layout == "none" else made("mxfp4", layout), tmp_path / "copy")
    edit_config(tmp_path / "copy", **changes)
    with pytest.raises((ModelError, CheckpointError)):
        microscale.load(tmp_path / "copy")
    microscale_command("generate", tmp_path / "copy", "a")  # no other exception either


def test_a_generation_config_that_is_no_json(copied: Callable[..., Path]) -> None:
    path = copied("mxfp4", "compressed-tensors")
    (path / "generation_config.json").write_text("{")
    with pytest.raises(MicroscaleError, match="generation_config"):
        microscale.load(path)


# Files


def header_length(file: Path) -> int:
    return 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]


@pytest.mark.parametrize("layout", ["none", "microscale", "compressed-tensors"])
def test_truncated_weights(layout: str, plain: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    source = plain if layout == "none" else made("mxfp4", layout)
    data = (source / "model.safetensors").read_bytes()
    header = header_length(source / "model.safetensors")
    for cut in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
        path = tmp_path / str(cut)
        shutil.copytree(source, path)
        (path / "model.safetensors").write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            microscale.load(path)
        assert "truncated or damaged" in fail("inspect", path)
        if layout == "none":
            message = fail("quantize", path, "-f", "mxfp4", "-o", tmp_path / "out")
            assert "truncated or damaged" in message
    assert not [entry for entry in tmp_path.iterdir() if "out" in entry.name]


def test_garbage_in_place_of_weights(plain: Path, tmp_path: Path) -> None:
    for name, data in {"text": b"no weights at all", "huge": b"\xff" * 64, "zeros": bytes(64)}.items():
        shutil.copytree(plain, tmp_path / name)
        (tmp_path / name / "model.safetensors").write_bytes(data)
        refused_early(tmp_path / name, CheckpointError, "not a whole safetensors file")


def rewrite_header(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file and nothing else."""
    data = file.read_bytes()
    content = json.loads(data[8 : header_length(file)])
    edit(content)
    header = json.dumps(content).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[header_length(file) :])


HEADER_LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "offsets past the end": lambda header: header["lm_head.weight"].update(data_offsets=[0, 1 << 40]),
    "overlapping tensors": lambda header: header["lm_head.weight"].update(
        data_offsets=header["model.norm.weight"]["data_offsets"]
    ),
    "a larger shape": lambda header: header["lm_head.weight"].update(shape=[1 << 20, 64]),
    "a negative shape": lambda header: header["lm_head.weight"].update(shape=[-1, 64]),
    "another dtype": lambda header: header["lm_head.weight"].update(dtype="F64"),
    "an unknown dtype": lambda header: header["lm_head.weight"].update(dtype="F3"),
}


@pytest.mark.parametrize("lie", HEADER_LIES)
def test_a_header_that_lies(lie: str, plain: Path, tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "untied", tie_word_embeddings=False)
    rewrite_header(source / "model.safetensors", HEADER_LIES[lie])
    refused_early(source, CheckpointError, "safetensors")


def test_a_tensor_of_another_shape_than_the_config(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "copy")
    edit_tensors(tmp_path / "copy", **{"model.norm.weight": torch.ones(3, dtype=torch.bfloat16)})
    refused_early(tmp_path / "copy", ModelError, "cannot be loaded")


def test_a_missing_tensor(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "copy")
    edit_tensors(tmp_path / "copy", **{"model.layers.1.mlp.up_proj.weight": None})
    refused_early(tmp_path / "copy", ModelError, "lacks 1 tensor", "model.layers.1.mlp.up_proj.weight")


# Shards and their index


@pytest.fixture
def sharded(plain: Path, tmp_path: Path) -> Path:
    path = tmp_path / "sharded"
    succeed(
        *("quantize", plain, "-f", "mxfp4", "--layout", "microscale", "--max-shard-size", "20KB", "-o", path),
    )
    assert len(list(path.glob("*.safetensors"))) >= 3
    return path


def index_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "model.safetensors.index.json").read_text())


def write_index(path: Path, content: Any) -> None:
    (path / "model.safetensors.index.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_missing_shard(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    refused(sharded, CheckpointError, gone.name, "is missing")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', '{"weight_map": {"a": 3}}']
)
def test_an_index_that_is_no_index(content: str, sharded: Path) -> None:
    write_index(sharded, content)
    refused(sharded, CheckpointError)


def test_an_index_that_names_a_tensor_that_is_not_there(sharded: Path) -> None:
    index = index_of(sharded)
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = sorted(set(index["weight_map"].values()))[0]
    write_index(sharded, index)
    refused(sharded, CheckpointError, "promises 1 tensor", "model.layers.9.mlp.up_proj.weight")


def test_an_index_that_names_the_wrong_shard(sharded: Path) -> None:
    index = index_of(sharded)
    files = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == files[0])
    index["weight_map"][name] = files[1]
    write_index(sharded, index)
    refused(sharded, CheckpointError, "promises 1 tensor", name)


@pytest.mark.parametrize("name", ["../plain/model.safetensors", "/etc/passwd", "..", "", "."])
def test_an_index_that_points_elsewhere(name: str, sharded: Path) -> None:
    index = index_of(sharded)
    index["weight_map"][next(iter(index["weight_map"]))] = name
    write_index(sharded, index)
    refused(sharded, CheckpointError)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    one, other = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(other)
    double = next(iter(load_file(one)))
    tensors[double] = load_file(one)[double]
    save_file(tensors, other, metadata={"format": "pt"})
    refused(sharded, CheckpointError, double, one.name, other.name)


# The quantization_config of our layout


def with_quantization(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    config = read_config(path)["quantization_config"]
    edit(config)
    edit_config(path, quantization_config=config)
    return path


LAYER = "model.layers.0.mlp.up_proj"
CONFIG_LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a newer version": (lambda config: config.update(format_version=3), "format_version 3"),
    "an older version": (lambda config: config.update(format_version=0), "format_version 0"),
    "no version": (lambda config: config.pop("format_version"), "format_version None"),
    "another method": (lambda config: config.update(quant_method="hqq"), "'hqq' is not one that microscale reads"),
    "no method": (lambda config: config.pop("quant_method"), "quant_method None"),
    "no schemes": (lambda config: config.pop("schemes"), "'schemes'"),
    "no layers": (lambda config: config.pop("layers"), "'layers'"),
    "empty layers": (lambda config: config.update(layers={}), "layers"),
    "a scheme out of range": (lambda config: config["layers"][LAYER].update(scheme=1), LAYER),
    "a negative scheme": (lambda config: config["layers"][LAYER].update(scheme=-1), LAYER),
    "a scheme that is no number": (lambda config: config["layers"][LAYER].update(scheme=[0]), LAYER),
    "an infinite scheme": (lambda config: config["layers"][LAYER].update(scheme=float("inf")), LAYER),
    "a fraction of a scheme": (lambda config: config["layers"][LAYER].update(scheme=0.5), LAYER),
    "another shape": (lambda config: config["layers"][LAYER].update(shape=[64, 96]), LAYER),
    "a flat shape": (lambda config: config["layers"][LAYER].update(shape=[96 * 64]), LAYER),
    "a negative shape": (lambda config: config["layers"][LAYER].update(shape=[-96, -64]), LAYER),
    "an infinite shape": (lambda config: config["layers"][LAYER].update(shape=[float("inf"), 64]), LAYER),
    "a huge shape": (lambda config: config["layers"][LAYER].update(shape=[1 << 80, 64]), LAYER),
    "a shape that is no list": (lambda config: config["layers"][LAYER].update(shape=None), LAYER),
    "a layer without a scheme": (lambda config: config["layers"].update({LAYER: {}}), LAYER),
    "a layer that is no object": (lambda config: config["layers"].update({LAYER: 0}), LAYER),
    "an unknown format": (lambda config: config["schemes"][0].update(format="mxfp5"), "mxfp5"),
    "no format": (lambda config: config["schemes"][0].pop("format"), "format"),
    "another format": (lambda config: config["schemes"][0].update(format="e4m3/32:e8m0"), "weight_codes"),
    "a format with more parts": (lambda config: config["schemes"][0].update(format="mxfp4_plus"), "weight_index"),
    "a format with a larger block": (lambda config: config["schemes"][0].update(format="e2m1/64:e8m0"), "weight_scale"),
    "unknown activations": (lambda config: config["schemes"][0].update(activations="mxfp5"), "mxfp5"),
    "activations with a range": (lambda config: config["schemes"][0].update(activations="nvfp4@static"), "amax"),
    "a window of a petabyte": (lambda config: config["schemes"][0].update(activations="nvfp4@window(1e15)"), "amax"),
    "an unknown dtype": (lambda config: config["schemes"][0].update(dtype="float99"), "float99"),
    "a dtype that is a function": (lambda config: config["schemes"][0].update(dtype="abs"), "abs"),
    "an integer dtype": (lambda config: config["schemes"][0].update(dtype="int8"), "int8"),
    "a layer of another model": (
        lambda config: config["layers"].update({"model.layers.7.mlp.up_proj": config["layers"][LAYER]}),
        "model.layers.7.mlp.up_proj",
    ),
}


@pytest.mark.parametrize("lie", CONFIG_LIES)
def test_a_quantization_config_that_lies(lie: str, copied: Callable[..., Path]) -> None:
    edit, word = CONFIG_LIES[lie]
    refused(with_quantization(copied("mxfp4"), edit), CheckpointError, word)


@pytest.mark.parametrize("value", [3, [1], "mxfp4", True])
def test_a_quantization_config_that_is_no_object(value: Any, copied: Callable[..., Path]) -> None:
    path = copied("mxfp4")
    edit_config(path, quantization_config=value)
    refused(path, CheckpointError, "quantization_config must be an object")


def test_the_config_of_another_model(copied: Callable[..., Path], tmp_path: Path) -> None:
    """Names and shapes that the model does not have, in both directions."""
    path = copied("mxfp4")
    narrow = save_random_model(tmp_path / "narrow", hidden_size=32, num_attention_heads=2)
    quantization = read_config(path)["quantization_config"]
    edit_config(path, **(read_config(narrow) | {"quantization_config": quantization}))
    refused(path, CheckpointError, "in the model")


def test_the_config_of_another_family(copied: Callable[..., Path], tmp_path: Path) -> None:
    path = copied("mxfp4")
    other = save_random_model(tmp_path / "other", "gpt2")
    quantization = read_config(path)["quantization_config"]
    edit_config(path, **(read_config(other) | {"quantization_config": quantization}))
    refused(path, CheckpointError, "another model")
    import transformers

    import microscale.hf

    assert microscale.hf.MicroscaleConfig
    with pytest.raises(CheckpointError, match="another model"):
        transformers.AutoModelForCausalLM.from_pretrained(path)


# Tensors of our layout


@pytest.mark.parametrize("leaf", ["weight_codes", "weight_scale"])
def test_a_missing_part(leaf: str, copied: Callable[..., Path]) -> None:
    path = copied("mxfp4")
    edit_tensors(path, **{f"{LAYER}.{leaf}": None})
    refused(path, CheckpointError, f"{LAYER}.{leaf}", "missing")


WRONG_PARTS = {
    "another dtype": ("mxfp4", "weight_codes", lambda part: part.to(torch.int16)),
    "a shorter row": ("mxfp4", "weight_codes", lambda part: part[:, :-1]),
    "a transposed part": ("mxfp4", "weight_codes", lambda part: part.T),
    "a flat part": ("mxfp4", "weight_scale", lambda part: part.reshape(-1)),
    "float scales": ("mxfp4", "weight_scale", lambda part: part.to(torch.bfloat16)),
    "a scale too many": ("nvfp4", "weight_tensor_inv_scale", lambda part: part.repeat(2)),
}


@pytest.mark.parametrize("case", WRONG_PARTS)
def test_a_part_of_another_shape_or_dtype(case: str, copied: Callable[..., Path]) -> None:
    spec, leaf, change = WRONG_PARTS[case]
    path = copied(spec)
    edit_tensors(path, **{f"{LAYER}.{leaf}": change(read_tensors(path)[f"{LAYER}.{leaf}"])})
    refused(path, CheckpointError, f"{LAYER}.{leaf}")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_tensor_scale(value: float, copied: Callable[..., Path]) -> None:
    path = copied("nvfp4")
    edit_tensors(path, **{f"{LAYER}.weight_tensor_inv_scale": torch.tensor([value])})
    refused(path, CheckpointError, LAYER, "finite and positive")


def test_a_leftover_float_weight_is_ignored_and_a_bias_that_is_missing_is_not(tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "source", "opt")
    microscale.save(microscale.quantize(source, "mxfp4"), tmp_path / "out", layout="microscale")
    edit_tensors(tmp_path / "out", **{"model.decoder.layers.0.fc1.bias": None})
    with pytest.raises(ModelError, match=r"fc1\.bias"):
        microscale.load(tmp_path / "out")


SPARSE = "mxfp4+sparse1%:fp8"
HOSTILE: dict[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "offsets past the end": (SPARSE, "sparse_offsets", lambda part: part + (torch.arange(part.numel()) > 5).int() * 99),
    "offsets that fall": (SPARSE, "sparse_offsets", lambda part: part.flip(0)),
    "offsets below zero": (SPARSE, "sparse_offsets", lambda part: part - 1),
    "offsets that overflow": (SPARSE, "sparse_offsets", lambda part: torch.full_like(part, 2**31 - 1)),
    "columns past the row": (SPARSE, "sparse_columns", lambda part: torch.full_like(part, 64)),
    "columns below zero": (SPARSE, "sparse_columns", lambda part: torch.full_like(part, -1)),
    "an index past a block of 24": ("e2m1/24:e8m0:plus", "index", lambda part: torch.full_like(part, 255)),
    "all blocks wide": ("adaptive_2_4", "bitmap", lambda part: torch.full_like(part, 255)),
    "no block wide": ("adaptive_2_4", "bitmap", torch.zeros_like),
    "an infinite scale": ("int4_asym", "scale", lambda part: torch.full_like(part, float("inf"))),
    "a negative scale": ("int4_asym", "scale", lambda part: -part),
    "NaN against nan_raise": ("mxfp4:nan_raise", "scale", lambda part: torch.full_like(part, 255)),
    "NaN against nan_raise in fp16": (
        "int4/32:fp16:asym:nan_raise",
        "scale",
        lambda part: torch.full_like(part, float("nan")),
    ),
    "an infinite sparse scale": (SPARSE, "sparse_scale", lambda part: torch.full_like(part, float("inf"))),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_content_that_no_quantization_writes(case: str, copied: Callable[..., Path]) -> None:
    spec, leaf, change = HOSTILE[case]
    path = copied(spec)
    name = f"{LAYER}.weight_{leaf}"
    edit_tensors(path, **{name: change(read_tensors(path)[name])})
    refused(path, CheckpointError, LAYER)


def test_the_copies_themselves_load(copied: Callable[..., Path], made: Callable[..., Path]) -> None:
    """Else the refusals above would prove nothing."""
    for spec in {case[0] for case in (*HOSTILE.values(), *WRONG_PARTS.values())}:
        assert bool(torch.isfinite(logits(microscale.load(made(spec)))).all())


# Fuzzing

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def paths_of(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the place of every value inside a JSON value."""
    found = [prefix] if prefix else []
    if isinstance(value, dict):
        return found + [place for key, item in value.items() for place in paths_of(item, (*prefix, key))]
    if isinstance(value, list):
        return found + [place for key, item in enumerate(value) for place in paths_of(item, (*prefix, key))]
    return found


def replaced(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return copy


FUZZED = [("mxfp4", "microscale"), ("mxfp4", "compressed-tensors"), ("nvfp4", "compressed-tensors"), ("mxfp4", "quark")]


@pytest.mark.parametrize(("spec", "layout"), FUZZED)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_quantization_config_gives_layers_or_an_error_of_ours(
    spec: str, layout: str, data: st.DataObject, made: Callable[..., Path]
) -> None:
    """One value of the config, of our object or of the whole is replaced by any JSON; a special word now and then."""
    reader = CheckpointReader(made(spec, layout))
    config = {key: reader.config[key] for key in ("quantization_config", "microscale")}
    place = data.draw(st.sampled_from(paths_of(config)))
    special = st.sampled_from(["re:(", "re:.*", "Linear", "mxfp4@static", "mixed-precision", -1, 1e400, 2**70, {}, []])
    changed = replaced(config, place, data.draw(JSON | special))
    try:
        found_layout, layers = read_stored_layers(changed, reader.infos, reader.dtype)
        for layer in layers.values():
            found_layout.tensor_names(layer)
    except MicroscaleError:
        pass


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tensor_headers_give_layers_or_an_error_of_ours(data: st.DataObject, made: Callable[..., Path]) -> None:
    spec, layout = data.draw(st.sampled_from(FUZZED))
    reader = CheckpointReader(made(spec, layout))
    infos = dict(reader.infos)
    name = data.draw(st.sampled_from(sorted(name for name in infos if "_proj" in name)))
    shape = tuple(data.draw(st.lists(st.integers(0, 1 << 40), max_size=4)))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.float32, torch.float8_e4m3fn, torch.int64]))
    if data.draw(st.booleans()):
        infos[name] = TensorInfo(dtype=dtype, shape=shape)
    else:
        del infos[name]
    try:
        read_stored_layers(reader.config, infos, reader.dtype)
    except MicroscaleError:
        return
    # What is not refused by its header is what the file says: only other tools' layouts leave a dtype to the reader.
    assert layout != "microscale" or infos.get(name) == reader.infos[name]


@pytest.mark.parametrize(("spec", "layout"), [("mxfp4", "compressed-tensors"), ("nvfp4", "compressed-tensors")])
@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale"])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_a_tensor_of_another_dtype_in_their_layout(
    spec: str, layout: str, leaf: str, dtype: torch.dtype, copied: Callable[..., Path]
) -> None:
    path = copied(spec, layout)
    old = read_tensors(path)[f"{LAYER}.{leaf}"]
    edit_tensors(path, **{f"{LAYER}.{leaf}": old.to(torch.float32).to(dtype)})
    refused(path, CheckpointError, LAYER)


def test_a_file_that_was_replaced_after_the_header_was_read(copied: Callable[..., Path]) -> None:
    path = copied("mxfp4")
    reader = CheckpointReader(path)
    os.truncate(path / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match="cannot be read"):
        reader.load(f"{LAYER}.weight_codes")


def test_an_unharmed_checkpoint_still_gives_its_logits(made: Callable[..., Path], plain: Path) -> None:
    assert same_bits(logits(microscale.load(made("mxfp4"))), logits(microscale.quantize(plain, "mxfp4")))
