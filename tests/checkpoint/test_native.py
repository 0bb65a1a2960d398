"""Our layout: golden config and bytes, every format through its tensors, and contradictions."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from microscale.checkpoint.native import FORMAT_VERSION, NativeLayout, range_name, read_layers
from microscale.checkpoint.schema import TensorInfo
from microscale.errors import CheckpointError, LayoutError
from microscale.formats import NAMED_FORMATS, parse_activation, parse_format
from microscale.kernels import dequantize, quantize
from microscale.layer_spec import LayerSpec
from microscale.tensor import join_rows
from small_models import same_bits

LAYOUT = NativeLayout()
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def stored(name: str, spec: str, activations: str | None = None, **fields: Any) -> LayerSpec:
    values: dict[str, Any] = {"shape": (4, 64), "dtype": torch.bfloat16} | fields
    act = None if activations is None else parse_activation(activations)
    return LayerSpec(name=name, format=parse_format(spec), activations=act, **values)


def weight(layer: LayerSpec) -> Tensor:
    return torch.randn(layer.shape, generator=torch.Generator().manual_seed(0)).to(layer.dtype)


def infos(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(dtype=value.dtype, shape=tuple(value.shape)) for name, value in tensors.items()}


def test_golden_config() -> None:
    layers = [
        stored(UP, "mxfp4_plus", "mxfp8"),
        stored(DOWN, "int4_asym", shape=(7, 96), dtype=torch.float16, method="other"),
        stored("a", "mxfp4_plus", "mxfp8"),
        stored("wte", "mxfp8", kind="embedding"),
    ]
    assert LAYOUT.config(layers, ["lm_head"]) == {
        "quant_method": "microscale",
        "format_version": 1,
        "schemes": [
            {
                "format": "e2m1/32:e8m0:floor:plus",
                "activations": "mxfp8_e4m3",
                "method": "rtn",
                "kind": "linear",
                "dtype": "bfloat16",
            },
            {
                "format": "int4/64:fp16:asym",
                "activations": None,
                "method": "other",
                "kind": "linear",
                "dtype": "float16",
            },
            {
                "format": "e4m3/32:e8m0:rceil",
                "activations": None,
                "method": "rtn",
                "kind": "embedding",
                "dtype": "bfloat16",
            },
        ],
        "layers": {
            UP: {"scheme": 0, "shape": [4, 64]},
            DOWN: {"scheme": 1, "shape": [7, 96]},
            "a": {"scheme": 0, "shape": [4, 64]},
            "wte": {"scheme": 2, "shape": [4, 64]},
        },
        "unquantized": ["lm_head"],
    }


def test_golden_bytes() -> None:
    """-0.5 2 3 and zeros with amax 3 under floor: scale 2^-1, so codes of -1 4 6: 0xA, 6, 7; low nibble first."""
    layer = stored(UP, "mxfp4", shape=(1, 32))
    row = torch.zeros(1, 32, dtype=torch.bfloat16)
    row[0, :3] = torch.tensor([-0.5, 2.0, 3.0])
    tensors = LAYOUT.pack(layer, quantize(row, layer.format))
    assert list(tensors) == [f"{UP}.weight_codes", f"{UP}.weight_scale"] == LAYOUT.tensor_names(layer)
    assert tensors[f"{UP}.weight_codes"].tolist() == [[0x6A, 0x07, *[0] * 14]]
    assert tensors[f"{UP}.weight_scale"].tolist() == [[126]]


SPECS = [*NAMED_FORMATS, "e2m1/16x16:e8m0", "e4m3/tensor:fp32", "e2m1/32:e8m0:sub(8,2,linear)", "int5/channel:bf16"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(4, 64), (3, 33), (1, 1), (130, 40)])
def test_every_format_comes_back(spec: str, shape: tuple[int, int]) -> None:
    layer = stored(UP, spec, "nvfp4@ema(0.5)", shape=shape)
    assert LAYOUT.refusal(layer) is None
    packed = quantize(weight(layer), layer.format)
    tensors = LAYOUT.pack(layer, packed)
    config = json.loads(json.dumps(LAYOUT.config([layer], [])))
    headers = infos(tensors) | {f"{UP}.activations.amax": TensorInfo(dtype=torch.float32, shape=(1,))}
    (found,) = LAYOUT.stored_layers(config, headers, torch.float32).values()
    assert found == layer
    restored = LAYOUT.unpack(found, tensors.__getitem__)
    assert all(same_bits(part, restored.parts[name]) for name, part in packed.parts.items())
    assert same_bits(dequantize(restored), dequantize(packed))
    assert set(LAYOUT.tensor_names(found)) == set(tensors)


@pytest.mark.parametrize(
    ("activations", "shape"), [("nvfp4@static", (1,)), ("nvfp4@ema(0.5)", (1,)), ("nvfp4@window(5)", (5,))]
)
def test_ranges_are_checked(activations: str, shape: tuple[int, ...]) -> None:
    layer = stored(UP, "mxfp4", activations)
    headers = infos(LAYOUT.pack(layer, quantize(weight(layer), layer.format)))
    config = LAYOUT.config([layer], [])
    name = range_name(layer)
    assert name is not None and name == f"{UP}.activations.amax"
    LAYOUT.stored_layers(config, headers | {name: TensorInfo(dtype=torch.float32, shape=shape)}, torch.float32)
    for wrong in (
        {},
        {name: TensorInfo(dtype=torch.float32, shape=(shape[0] + 1,))},
        {name: TensorInfo(dtype=torch.float16, shape=shape)},
        {name: TensorInfo(dtype=torch.float32, shape=())},
    ):
        with pytest.raises(CheckpointError, match="range of activations"):
            LAYOUT.stored_layers(config, headers | wrong, torch.float32)
    assert range_name(stored(UP, "mxfp4", "mxfp8")) is None and range_name(stored(UP, "mxfp4")) is None


def test_versions() -> None:
    config = LAYOUT.config([stored(UP, "mxfp4")], [])
    assert read_layers(config)[UP] == stored(UP, "mxfp4")
    for version in (None, 0, FORMAT_VERSION + 1, "1", 1.5, [1]):
        with pytest.raises(CheckpointError, match="format_version"):
            read_layers(config | {"format_version": version})


BAD_ENTRIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no scheme": lambda config: config["layers"][UP].pop("scheme"),
    "no shape": lambda config: config["layers"][UP].pop("shape"),
    "scheme past the end": lambda config: config["layers"][UP].update(scheme=1),
    "negative scheme": lambda config: config["layers"][UP].update(scheme=-1),
    "scheme as text": lambda config: config["layers"][UP].update(scheme="0"),
    "scheme as truth": lambda config: config["layers"][UP].update(scheme=False),
    "one axis": lambda config: config["layers"][UP].update(shape=[64]),
    "no axis": lambda config: config["layers"][UP].update(shape=[]),
    "zero rows": lambda config: config["layers"][UP].update(shape=[0, 64]),
    "half a row": lambda config: config["layers"][UP].update(shape=[0.5, 64]),
    "shape as text": lambda config: config["layers"][UP].update(shape="46"),
    "shape as truth": lambda config: config["layers"][UP].update(shape=[True, True]),
    "entry as list": lambda config: config["layers"].update({UP: [0, [4, 64]]}),
    "entry as null": lambda config: config["layers"].update({UP: None}),
    "scheme as list": lambda config: config["schemes"].__setitem__(0, ["mxfp4"]),
    "format as number": lambda config: config["schemes"][0].update(format=4),
    "unknown format": lambda config: config["schemes"][0].update(format="mxfp5"),
    "unknown activations": lambda config: config["schemes"][0].update(activations="mxfp5"),
    "no dtype": lambda config: config["schemes"][0].pop("dtype"),
    "dtype of no float": lambda config: config["schemes"][0].update(dtype="uint8"),
    "dtype of no tensor": lambda config: config["schemes"][0].update(dtype="__name__"),
    "schemes as object": lambda config: config.update(schemes={}),
    "layers as list": lambda config: config.update(layers=[]),
    "no layers": lambda config: config.update(layers={}),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_entries_that_cannot_be_read(case: str) -> None:
    config = copy.deepcopy(LAYOUT.config([stored(UP, "mxfp4")], []))
    BAD_ENTRIES[case](config)
    with pytest.raises(CheckpointError, match="quantization_config"):
        read_layers(config)


def test_a_piece_of_a_table_is_not_written() -> None:
    """A file holds the share that the format names; a piece has what lies in it."""
    layer = stored(UP, "mxfp4+sparse10%:fp16", shape=(4, 64))
    whole = quantize(weight(layer), layer.format)
    pieces = [whole.slice_rows(0, 1), whole.slice_rows(1, 4)]
    assert LAYOUT.pack(layer, join_rows(pieces)).keys() == LAYOUT.pack(layer, whole).keys()
    piece = next(piece for piece in pieces if piece.parts["sparse_values"].numel() != round(0.1 * piece.rows * 64))
    with pytest.raises(LayoutError, match=r"sparse_values.*piece of a tensor; join"):
        LAYOUT.pack(dataclasses.replace(layer, shape=piece.shape), piece)
