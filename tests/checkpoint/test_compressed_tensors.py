"""The layout of compressed-tensors: golden bytes and config, refusals, groups, and damaged files.

Its own library is the oracle in tests/integrations/test_stock_compressed_tensors.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from microscale.checkpoint.compressed_tensors import CompressedTensorsLayout, is_held_by_scheme
from microscale.checkpoint.registry import rule_of_file
from microscale.checkpoint.schema import TensorInfo
from microscale.errors import CheckpointError
from microscale.formats import format_name, parse_activation, parse_format
from microscale.kernels import quantize
from microscale.layer_spec import LayerSpec

LAYOUT = CompressedTensorsLayout()
Q, UP, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def stored(name: str, spec: str, activations: str | None = None, **fields: Any) -> LayerSpec:
    values: dict[str, Any] = {"shape": (4, 64), "dtype": torch.bfloat16} | fields
    act = None if activations is None else parse_activation(activations)
    return LayerSpec(name=name, format=parse_format(spec), activations=act, **values)


def row(width: int, *values: float) -> Tensor:
    result = torch.zeros(1, width)
    result[0, : len(values)] = torch.tensor(values)
    return result


def test_golden_bytes_of_mxfp4() -> None:
    layer = stored(UP, "mxfp4", shape=(1, 32))
    tensors = LAYOUT.pack(layer, quantize(row(32, 0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -6), layer.format))
    assert set(tensors) == {f"{UP}.weight_packed", f"{UP}.weight_scale"} == set(LAYOUT.tensor_names(layer))
    assert tensors[f"{UP}.weight_packed"].dtype == torch.uint8
    assert tensors[f"{UP}.weight_packed"][0].tolist() == [0x10, 0x32, 0x54, 0x76, 0xF9, *[0] * 11]
    assert tensors[f"{UP}.weight_scale"].tolist() == [[127]]


def test_golden_bytes_of_mxfp8() -> None:
    layer = stored(UP, "mxfp8", shape=(1, 32))
    tensors = LAYOUT.pack(layer, quantize(row(32, 1, -448, 2.0**-9, 0.5) * 2.0**-20, layer.format))
    assert set(tensors) == {f"{UP}.weight", f"{UP}.weight_scale"} == set(LAYOUT.tensor_names(layer))
    assert tensors[f"{UP}.weight"].dtype == torch.float8_e4m3fn
    assert tensors[f"{UP}.weight"].view(torch.uint8)[0].tolist() == [0x38, 0xFE, 0x01, 0x30, *[0] * 28]
    assert tensors[f"{UP}.weight_scale"].tolist() == [[107]]


def test_golden_bytes_of_nvfp4() -> None:
    """amax 6: the divisor of the tensor is 448 * 6 / 6, and the scale of its block 448, E4M3 code 0x7E."""
    layer = stored(UP, "nvfp4", shape=(1, 32))
    tensors = LAYOUT.pack(layer, quantize(row(32, 6, -3, 0.5), layer.format))
    names = {f"{UP}.weight_packed", f"{UP}.weight_scale", f"{UP}.weight_global_scale"}
    assert set(tensors) == names == set(LAYOUT.tensor_names(layer))
    assert tensors[f"{UP}.weight_packed"][0].tolist()[:2] == [0xD7, 0x01]
    assert tensors[f"{UP}.weight_scale"].dtype == torch.float8_e4m3fn
    assert tensors[f"{UP}.weight_scale"].view(torch.uint8)[0, 0] == 0x7E
    assert tensors[f"{UP}.weight_global_scale"].dtype == torch.float32
    assert tensors[f"{UP}.weight_global_scale"].tolist() == [448.0]


GROUP32 = {"strategy": "group", "group_size": 32, "symmetric": True, "type": "float", "scale_dtype": "torch.uint8"}
GROUP16 = {
    "strategy": "tensor_group",
    "group_size": 16,
    "symmetric": True,
    "type": "float",
    "scale_dtype": "torch.float8_e4m3fn",
}


def test_golden_config() -> None:
    fields = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": "0.20.0",
    }
    one = {
        "format": "mxfp4-pack-quantized",
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "dynamic": False, **GROUP32},
        "input_activations": {"num_bits": 8, "dynamic": True, **GROUP32},
        "output_activations": None,
    }
    layers = [stored(name, "mxfp4:rceil", "mxfp8:even(1)") for name in (Q, UP)]
    assert LAYOUT.config(layers, ["lm_head"]) == fields | {
        "format": "mxfp4-pack-quantized",
        "config_groups": {"group_0": one},
    }
    nv = {
        "format": "nvfp4-pack-quantized",
        "targets": [DOWN],
        "weights": {"num_bits": 4, "dynamic": False, **GROUP16},
        "input_activations": None,
        "output_activations": None,
    }
    assert LAYOUT.config([*layers, stored(DOWN, "nvfp4")], ["lm_head"]) == fields | {
        "format": "mixed-precision",
        "config_groups": {"group_0": one | {"targets": [Q, UP]}, "group_1": nv},
    }


HELD = [
    "mxfp4",
    "mxfp4:even",
    "mxfp4:rceil",
    "mxfp4:stochastic(1)",
    "mxfp4:nearest_away",
    "mxfp4:std(2.9)",
    "mxfp8:floor",
    *("nvfp4", "nvfp4:mse", "e2m1/32:e8m0:mse(-2,2)", "mxfp8:percentile(99)", "mxfp4:nan_raise"),
]
REFUSED = [
    *("mxfp6_e2m3", "mxfp8_e5m2", "mxint8", "mxfp4_plus", "mxfp4_sparse", "adaptive_2_4", "int4_asym"),
    *("e2m1/16:e8m0", "e2m1/64:e8m0", "e2m1/32:e5m0:nan_raise", "e2m1/32:e4m3", "e2m1/16:e4m3", "e2m1/16x16:e8m0"),
    *("mxfp4:prescale(0.75)", "mxfp8:nonfinite", "e2m1/32:e8m0:sub(8,2,pow2)", "e4m3-ieee/32:e8m0", "nvfp4_plus"),
]


def test_what_it_holds() -> None:
    for spec in HELD:
        assert LAYOUT.refusal(stored(UP, spec)) is None, spec
    for spec in REFUSED:
        assert format_name(parse_format(spec)) in str(LAYOUT.refusal(stored(UP, spec))), spec
    for kind in ("embedding", "conv1d", "experts"):
        assert kind in str(LAYOUT.refusal(stored(UP, "mxfp4", kind=kind)))
    assert "linear layers" in str(LAYOUT.refusal(stored(UP, "mxfp4", shape=(2, 4, 64))))
    for spec, width in (("mxfp4", 48), ("nvfp4", 40), ("mxfp8", 1)):
        assert f"width {width} is not a multiple" in str(LAYOUT.refusal(stored(UP, spec, shape=(4, width))))
    assert LAYOUT.refusal(stored(UP, "nvfp4", shape=(4, 48))) is None
    for activations in ("mxfp4:even", "mxfp8:even(1)", "mxfp4:even@dynamic", "nvfp4@static"):
        assert LAYOUT.refusal(stored(UP, "mxfp4", activations)) is None
    for activations in ("mxfp4", "mxfp8", "mxfp8:even", "nvfp4", "mxfp6_e2m3", "mxfp4:even:nan_raise"):
        assert "own rules" in str(LAYOUT.refusal(stored(UP, "mxfp4", activations)))


def written(*layers: LayerSpec) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    tensors = {"lm_head.weight": torch.zeros(4, 64)}
    for layer in layers:
        tensors.update(LAYOUT.pack(layer, quantize(torch.randn(layer.shape), layer.format)))
    headers = {name: TensorInfo(dtype=part.dtype, shape=tuple(part.shape)) for name, part in tensors.items()}
    return copy.deepcopy(LAYOUT.config(layers, ["lm_head"])), headers


@pytest.mark.parametrize("spec", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("activations", [None, "mxfp4:even", "mxfp8:even(1)"])
def test_what_is_written_is_read(spec: str, activations: str | None) -> None:
    layer = stored(UP, spec, activations, shape=(6, 96))
    config, headers = written(layer)
    (found,) = LAYOUT.stored_layers(config, headers, torch.float16).values()
    assert (found.name, found.shape, found.dtype, found.kind) == (UP, (6, 96), torch.float16, "linear")
    assert found.activations == layer.activations
    assert rule_of_file(found.format, layer.format, is_held_by_scheme) == layer.format
    tensor = quantize(torch.randn(6, 96, dtype=torch.bfloat16), layer.format)
    parts = LAYOUT.unpack(layer, LAYOUT.pack(layer, tensor).__getitem__).parts
    assert all(torch.equal(part, parts[name]) for name, part in tensor.parts.items())


def test_a_rule_of_another_format_contradicts_the_file() -> None:
    for recorded in ("mxfp8", "nvfp4", "mxfp4_plus", "e2m1/16:e8m0"):
        with pytest.raises(CheckpointError, match="microscale object"):
            rule_of_file(parse_format("mxfp4:even"), parse_format(recorded), is_held_by_scheme)


Edit = Callable[[dict[str, Any], dict[str, TensorInfo]], Any]
DAMAGE: dict[str, tuple[Edit, str]] = {
    "not compressed": (lambda config, _: config.update(quantization_status="frozen"), "'frozen'"),
    "no status": (lambda config, _: config.pop("quantization_status"), "None"),
    "no groups": (lambda config, _: config.update(config_groups={}), "no config_groups"),
    "groups as list": (lambda config, _: config.update(config_groups=[]), "no config_groups"),
    "a preset": (lambda config, _: config.update(config_groups={"MXFP4": ["Linear"]}), "'MXFP4'"),
    "no targets": (lambda config, _: config["config_groups"]["group_0"].pop("targets"), "targets"),
    "targets as text": (lambda config, _: config["config_groups"]["group_0"].update(targets="Linear"), "targets"),
    "other targets": (lambda config, _: config["config_groups"]["group_0"].update(targets=["Conv2d"]), UP),
    "a broken pattern": (lambda config, _: config["config_groups"]["group_0"].update(targets=["re:("]), "re:("),
    "another format": (
        lambda config, _: config["config_groups"]["group_0"].update(format="pack-quantized"),
        "does not read",
    ),
    "a wrong format": (
        lambda config, _: config["config_groups"]["group_0"].update(format="mxfp8-quantized"),
        "contradict",
    ),
    "no weights": (lambda config, _: config["config_groups"]["group_0"].update(weights=None), "contradict"),
    "another group": (
        lambda config, _: config["config_groups"]["group_0"]["weights"].update(group_size=64),
        "contradict",
    ),
    "int activations": (
        lambda config, _: config["config_groups"]["group_0"].update(input_activations={"num_bits": 8, "type": "int"}),
        "not read",
    ),
    "activations as text": (
        lambda config, _: config["config_groups"]["group_0"].update(input_activations="fp8"),
        "not read",
    ),
    "no weight": (lambda _, headers: headers.pop(f"{UP}.weight_packed"), UP),
    "no scales at all": (lambda _, headers: headers.pop(f"{UP}.weight_scale"), "not quantized"),
    "a flat weight": (
        lambda _, headers: headers.update({f"{UP}.weight_packed": TensorInfo(dtype=torch.uint8, shape=(128,))}),
        "two-dimensional",
    ),
    "a wider weight": (
        lambda _, headers: headers.update({f"{UP}.weight_packed": TensorInfo(dtype=torch.uint8, shape=(4, 64))}),
        "do not fit",
    ),
    "a ragged weight": (
        lambda _, headers: headers.update({f"{UP}.weight_packed": TensorInfo(dtype=torch.uint8, shape=(4, 31))}),
        "do not fit",
    ),
    "words as codes": (
        lambda _, headers: headers.update({f"{UP}.weight_packed": TensorInfo(dtype=torch.int32, shape=(4, 32))}),
        "as bytes",
    ),
    "floats as scales": (
        lambda _, headers: headers.update({f"{UP}.weight_scale": TensorInfo(dtype=torch.bfloat16, shape=(4, 2))}),
        "as bytes",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_file_that_cannot_be_read(case: str) -> None:
    edit, words = DAMAGE[case]
    config, headers = written(stored(UP, "mxfp4"))
    LAYOUT.stored_layers(config, headers, torch.bfloat16)
    edit(config, headers)
    with pytest.raises(CheckpointError) as caught:
        LAYOUT.stored_layers(config, headers, torch.bfloat16)
    assert words in str(caught.value)


def test_nvfp4_needs_its_global_scale() -> None:
    config, headers = written(stored(UP, "nvfp4"))
    del headers[f"{UP}.weight_global_scale"]
    with pytest.raises(CheckpointError, match="weight_global_scale is missing"):
        LAYOUT.stored_layers(config, headers, torch.bfloat16)
