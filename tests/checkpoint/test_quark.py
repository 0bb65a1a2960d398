"""The Quark layout: golden bytes and config, round trips through its tensors, refusals, damaged files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from microscale.checkpoint.quark import QuarkLayout, is_held_by_entry
from microscale.checkpoint.registry import rule_of_file
from microscale.checkpoint.schema import TensorInfo
from microscale.errors import CheckpointError
from microscale.formats import parse_activation, parse_format
from microscale.kernels import dequantize, quantize
from microscale.layer_spec import LayerSpec

LAYOUT = QuarkLayout()
Q, K, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"


def stored(name: str, fmt: str, activations: str | None = None, shape: tuple[int, ...] = (8, 64)) -> LayerSpec:
    spec = None if activations is None else parse_activation(activations)
    return LayerSpec(name=name, format=parse_format(fmt), shape=shape, dtype=torch.bfloat16, activations=spec)


def weights(layer: LayerSpec, seed: int = 0) -> Tensor:
    return torch.randn(layer.shape, generator=torch.Generator().manual_seed(seed)).to(layer.dtype)


def write(layers: list[LayerSpec]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of a file with these layers, filled with random weights, and an unquantized head."""
    tensors = {"lm_head.weight": torch.zeros(4, 64, dtype=torch.bfloat16)}
    for layer in layers:
        assert LAYOUT.refusal(layer) is None
        tensors.update(LAYOUT.pack(layer, quantize(weights(layer), layer.format)))
    return LAYOUT.config(layers, ["lm_head"]), tensors


def read(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, LayerSpec]:
    infos = {name: TensorInfo(dtype=value.dtype, shape=tuple(value.shape)) for name, value in tensors.items()}
    return LAYOUT.stored_layers(config, infos, torch.bfloat16)


GOLDEN_ROWS = {
    # Two codes a byte, the first in the low nibble; codes 0 to 7 are 0 .5 1 1.5 2 3 4 6, bit 3 is the sign.
    "fp4": ("mxfp4:even", [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -6], [0x10, 0x32, 0x54, 0x76, 0xF9]),
    # Four codes in three bytes, the first in the lowest bits: 1 | 2 << 6 | 3 << 12 | 0x3F << 18 = 0xFC3081.
    "fp6_e2m3": ("mxfp6_e2m3:even", [0.125, 0.25, 0.375, -7.5], [0x81, 0x30, 0xFC]),
    "fp6_e3m2": ("mxfp6_e3m2:even", [0.0625, 0.125, 0.1875, -28], [0x81, 0x30, 0xFC]),
    "fp8_e4m3": ("mxfp8:even", [1, -448, 2.0**-9, 0.5], [0x38, 0xFE, 0x01, 0x30]),
}


@pytest.mark.parametrize("word", GOLDEN_ROWS)
@pytest.mark.parametrize(("factor", "scale"), [(1.0, 127), (2.0**-20, 107), (2.0**30, 157)])
def test_golden_bytes(word: str, factor: float, scale: int) -> None:
    spec, values, expected = GOLDEN_ROWS[word]
    row = torch.zeros(1, 32)
    row[0, : len(values)] = torch.tensor(values) * factor
    layer = stored(Q, spec, shape=(1, 32))
    tensors = LAYOUT.pack(layer, quantize(row, layer.format))
    assert set(tensors) == {f"{Q}.weight", f"{Q}.weight_scale"} == set(LAYOUT.tensor_names(layer))
    data = tensors[f"{Q}.weight"]
    assert data.dtype == (torch.float8_e4m3fn if word == "fp8_e4m3" else torch.uint8)
    assert data.view(torch.uint8)[0].tolist()[: len(expected)] == expected
    assert data.view(torch.uint8)[0].tolist()[len(expected) :] == [0] * (data.shape[1] - len(expected))
    assert tensors[f"{Q}.weight_scale"].tolist() == [[scale]]
    assert LAYOUT.config([layer], [])["global_quant_config"]["weight"]["dtype"] == word


def test_golden_config() -> None:
    mx = {
        "dtype": "fp4",
        "is_dynamic": False,
        "qscheme": "per_group",
        "ch_axis": -1,
        "group_size": 32,
        "block_size": None,
        "symmetric": None,
        "round_method": "half_even",
        "scale_type": "float",
        "zero_point_type": "int32",
        "scale_format": "e8m0",
        "scale_calculation_mode": "floor",
        "mx_element_dtype": None,
        "observer_cls": "PerBlockMXObserver",
        "is_scale_quant": False,
    }
    fp8 = mx | {"dtype": "fp8_e4m3", "scale_calculation_mode": "ceil"}
    config = LAYOUT.config(
        [stored(Q, "mxfp4", "mxfp4:even"), stored(K, "mxfp4", "mxfp4:even"), stored(UP, "mxfp8:ceil", "mxfp8:ceil")],
        ["lm_head"],
    )
    assert config["global_quant_config"] == {
        "weight": mx,
        "input_tensors": mx | {"is_dynamic": True, "scale_calculation_mode": "even"},
        "output_tensors": None,
        "bias": None,
        "target_device": None,
    }
    assert list(config["layer_quant_config"]) == [UP]
    assert config["layer_quant_config"][UP]["input_tensors"] == fp8 | {"is_dynamic": True}
    # Quark and vLLM both read MXFP8 weights as blocks of 1x32.
    assert config["layer_quant_config"][UP]["weight"] == fp8 | {
        "qscheme": "per_block",
        "group_size": None,
        "block_size": [1, 32],
        "symmetric": True,
        "scale_type": "float8_e8m0fnu",
        "observer_cls": "PerBlock2DMinMaxObserver",
    }
    del config["global_quant_config"], config["layer_quant_config"]
    assert config == {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "version": "0.13",
        "algo_config": None,
        "softmax_quant_spec": None,
        "exclude": ["lm_head"],
        "layer_type_quant_config": {},
        "kv_cache_quant_config": {},
        "kv_cache_post_rope": False,
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
    }


ELEMENTS = ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3")


@pytest.mark.parametrize("rule", ["even", "floor", "ceil"])
@pytest.mark.parametrize("activations", [None, *ELEMENTS])
@pytest.mark.parametrize("element", ELEMENTS)
def test_round_trip(element: str, activations: str | None, rule: str) -> None:
    spec = None if activations is None else f"{activations}:{rule}"
    layers = [stored(Q, f"{element}:{rule}", spec), stored(K, "mxfp4:even"), stored(UP, "mxfp6_e3m2:ceil", "mxfp4")]
    config, tensors = write(layers)
    found = read(config, tensors)
    assert list(found.values()) == sorted((replace(layer, method="unknown") for layer in layers), key=lambda x: x.name)
    for layer in layers:
        tensor = LAYOUT.unpack(found[layer.name], tensors.__getitem__)
        assert torch.equal(dequantize(tensor), dequantize(quantize(weights(layer), layer.format)))


@pytest.mark.parametrize(
    "spec", ["mxfp4:rceil", "mxfp4:mse(-1,1)", "mxfp8:rceil", "mxfp4:stochastic(3)", "mxfp4:even(0)"]
)
def test_weights_of_any_rule_are_held_and_the_rule_comes_back_from_our_note(spec: str) -> None:
    layer = stored(Q, spec)
    config, tensors = write([layer])
    entry = config["global_quant_config"]["weight"]
    assert None in (entry["scale_calculation_mode"], entry["round_method"])
    found = read(config, tensors)[Q]
    assert rule_of_file(found.format, layer.format, is_held_by_entry) == layer.format
    tensor = LAYOUT.unpack(found, tensors.__getitem__)
    assert torch.equal(dequantize(tensor), dequantize(quantize(weights(layer), layer.format)))
    with pytest.raises(CheckpointError, match="the microscale object says mxfp6_e2m3"):
        rule_of_file(found.format, parse_format("mxfp6_e2m3"), is_held_by_entry)


def test_even_at_the_element_width_is_quarks_even() -> None:
    layer = stored(Q, "mxfp4:even(1)", "mxfp8:even(3)")
    assert LAYOUT.refusal(layer) is None
    entry = LAYOUT.config([layer], [])["global_quant_config"]
    assert entry["weight"]["scale_calculation_mode"] == entry["input_tensors"]["scale_calculation_mode"] == "even"


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (stored(Q, "mxint8"), "quark holds MXFP4, MXFP6 and MXFP8 E4M3 with blocks of 32, not mxint8"),
        (stored(Q, "mxfp8_e5m2"), "not mxfp8_e5m2"),
        (stored(Q, "e2m1/16:e8m0"), "not e2m1/16:e8m0"),
        (stored(Q, "nvfp4"), "not nvfp4"),
        (stored(Q, "mxfp4_plus"), "not mxfp4_plus"),
        (stored(Q, "mxfp4_sparse"), "not mxfp4_sparse"),
        (stored(Q, "adaptive_2_4"), "not adaptive_2_4"),
        (stored(Q, "mxfp4:prescale(0.75)"), "not mxfp4:prescale(0.75)"),
        (stored(Q, "mxfp8:nonfinite"), "not mxfp8_e4m3:nonfinite"),
        (stored(Q, "mxfp4", shape=(8, 48)), "the width 48 is not a multiple of 32"),
        (stored(Q, "mxfp4", shape=(2, 8, 64)), "linear layers, not a quantized linear of shape"),
        (replace(stored(Q, "mxfp4"), kind="embedding"), "not a quantized embedding"),
        (stored(Q, "mxfp4", "mxfp8"), "scale rules are even, floor, ceil, not rceil; name one"),
        (stored(Q, "mxfp4", "mxfp4:threshold(7)"), "not threshold(7)"),
        (stored(Q, "mxfp4", "mxfp8:even(1)"), "not even(1)"),
        (stored(Q, "mxfp4", "mxfp4:nearest_away"), "rounds activations to nearest even"),
        (stored(Q, "mxfp4", "mxfp4:stochastic(1)"), "rounds activations to nearest even"),
        (stored(Q, "mxfp4", "mxfp4:nan_raise"), "passes NaN and Inf on as NaN"),
        (stored(Q, "mxfp4", "mxfp4:inf_saturate"), "passes NaN and Inf on as NaN"),
        (stored(Q, "mxfp4", "e4m3/tensor:fp32@static"), "dynamically to MXFP4, MXFP6 or MXFP8 E4M3"),
        (stored(Q, "mxfp4", "mxint8"), "dynamically to MXFP4, MXFP6 or MXFP8 E4M3"),
    ],
)
def test_refusals(layer: LayerSpec, reason: str) -> None:
    refusal = LAYOUT.refusal(layer)
    assert refusal is not None
    assert reason in refusal


def entry_of(word: str, mode: str | None = "even", *, dynamic: bool = False) -> dict[str, Any]:
    """What amd-quark 0.13 writes for one tensor."""
    return {
        "block_size": None,
        "ch_axis": -1,
        "dtype": word,
        "enable_buffer_reuse": False,
        "group_size": 32,
        "is_dynamic": dynamic,
        "is_scale_quant": False,
        "max_input_numel": 4194304,
        "mx_element_dtype": None,
        "observer_cls": "PerBlockMXObserver",
        "qscheme": "per_group",
        "round_method": "half_even",
        "scale_calculation_mode": mode,
        "scale_format": "e8m0",
        "scale_type": "float",
        "symmetric": None,
        "zero_point_type": "int32",
    }


def layer_entry(weight: dict[str, Any], inputs: dict[str, Any] | list[dict[str, Any]] | None) -> dict[str, Any]:
    return {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None, "target_device": None}


def quark_file() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config of an amd-quark 0.13 export (patterns, a list of one spec, a null rule) and fitting tensors."""
    config = {
        "quant_method": "quark",
        "algo_config": [{"name": "awq"}],
        "exclude": ["lm_head", "*.router"],
        "export": {"pack_method": "reorder", "weight_format": "real_quantized", "kv_cache_group": []},
        "global_quant_config": layer_entry(entry_of("fp4", None), entry_of("fp4", dynamic=True)),
        "layer_quant_config": {
            "*k_proj": layer_entry(entry_of("fp6_e2m3", "floor"), [entry_of("fp8_e4m3", "ceil", dynamic=True)]),
            "*_proj": layer_entry(entry_of("fp6_e3m2"), None),
            UP: layer_entry(entry_of("fp8_e4m3"), None),
        },
        "layer_type_quant_config": {},
        "kv_cache_quant_config": {},
        "softmax_quant_spec": None,
    }
    layers = [stored(Q, "mxfp6_e3m2"), stored(K, "mxfp6_e2m3"), stored(UP, "mxfp8"), stored("model.mixer", "mxfp4")]
    return config, write(layers)[1]


def test_reads_what_quark_writes() -> None:
    found = read(*quark_file())
    assert {name: (layer.format, layer.activations) for name, layer in found.items()} == {
        Q: (parse_format("mxfp6_e3m2:even"), None),
        K: (parse_format("mxfp6_e2m3:floor"), parse_activation("mxfp8:ceil")),
        UP: (parse_format("mxfp8:even"), None),
        "model.mixer": (parse_format("mxfp4:even"), parse_activation("mxfp4:even")),
    }
    assert {layer.shape for layer in found.values()} == {(8, 64)}


Damage = Callable[[dict[str, Any], dict[str, Tensor]], object]


def put(*path: str, value: Any) -> Damage:
    """Return a change of one value in the config."""

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del tensors
        target = config
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


def put_tensor(name: str, value: Tensor) -> Damage:
    return lambda config, tensors: tensors.update({name: value})


GLOBAL = "global_quant_config"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda config, tensors: tensors.pop(f"{Q}.weight_scale"), "q_proj.weight_scale is missing"),
        (lambda config, tensors: tensors.pop(f"{Q}.weight"), "a matrix of torch.uint8, got no tensor"),
        (lambda config, tensors: tensors.clear(), "the file is not quantized"),
        (put_tensor(f"{Q}.weight", torch.zeros(8, 47, dtype=torch.uint8)), "needs scales for whole blocks"),
        (put_tensor(f"{Q}.weight", torch.zeros(8, 0, dtype=torch.uint8)), "needs scales for whole blocks"),
        (put_tensor(f"{Q}.weight", torch.zeros(8, 2, 24, dtype=torch.uint8)), "a matrix of torch.uint8, got"),
        (put_tensor(f"{Q}.weight", torch.zeros(8, 48)), "got torch.float32"),
        (put_tensor(f"{UP}.weight", torch.zeros(8, 64, dtype=torch.uint8)), "a matrix of torch.float8_e4m3fn"),
        (put_tensor(f"{Q}.weight_scale", torch.zeros(8, 3, dtype=torch.uint8)), r"got \[8, 3\]"),
        (put_tensor(f"{Q}.weight_scale", torch.zeros(2, 8, dtype=torch.uint8)), r"got \[2, 8\]"),
        (put_tensor(f"{Q}.weight_scale", torch.zeros(8, 2)), "E8M0 scales are stored as uint8"),
        (put_tensor(f"{Q}.input_scale", torch.ones(1)), "weights, scales and biases only"),
        (put_tensor(f"{Q}.input_rotation", torch.ones(1)), "rotations"),
        (put(GLOBAL, "weight", "dtype", value="mx6"), "microscale reads fp4, fp6_e2m3"),
        (put(GLOBAL, "weight", "dtype", value=["fp4"]), "are not read"),
        (put(GLOBAL, "weight", "dtype", value="int8"), "are not read"),
        (put(GLOBAL, "weight", "group_size", value=16), "groups of 32"),
        (put(GLOBAL, "weight", "qscheme", value="per_channel"), "are not read"),
        (put(GLOBAL, "weight", "scale_format", value="e4m3"), "are not read"),
        (put(GLOBAL, "weight", "ch_axis", value=0), "are not read"),
        (put(GLOBAL, "weight", "is_dynamic", value=True), r"are not read.*\(static\)"),
        (put(GLOBAL, "weight", "scale_calculation_mode", value="sideways"), "possible: even, floor, ceil"),
        (put(GLOBAL, "input_tensors", "round_method", value="round"), "'round' of the activations are not read"),
        (put(GLOBAL, "input_tensors", "is_dynamic", value=False), r"are not read.*\(dynamic\)"),
        (put(GLOBAL, "input_tensors", value=[entry_of("fp4"), entry_of("fp8_e4m3")]), "are not read"),
        (put(GLOBAL, "weight", value=None), "the weights None of quark are not read"),
        (put(GLOBAL, "output_tensors", value=entry_of("fp8_e4m3")), "quantized output_tensors of quark are not read"),
        (put(GLOBAL, "bias", value=entry_of("fp8_e4m3")), "quantized bias of quark are not read"),
        (put(GLOBAL, value=None), "has no scheme for the quantized layer 'model.mixer'"),
        (put(GLOBAL, value="fp4"), "has no scheme for the quantized layer 'model.mixer', got 'fp4'"),
        (put("layer_quant_config", value=["fp4"]), "layer_quant_config must be an object"),
        (put("exclude", value="lm_head"), "exclude must be a list"),
        (put("exclude", value=["*.q_proj"]), "excludes layer 'model.layers.0.self_attn.q_proj'"),
        (put("exclude", value=[UP]), "excludes layer 'model.layers.0.mlp.up_proj'"),
        (put("export", "weight_format", value="fake_quantized"), "weight_format 'fake_quantized' is not read"),
        (put("kv_cache_quant_config", value={"*k_proj": {}}), "a quantized KV cache"),
        (put("softmax_quant_spec", value=entry_of("fp8_e4m3")), "a quantized softmax"),
        (put("algo_config", value=[{"name": "rotation", "r1": True, "r4": True}]), "rotation changes activations"),
        (put("algo_config", value={"name": "svdquant"}), "svdquant changes activations"),
    ],
)
def test_damaged_or_unknown_files(damage: Damage, message: str) -> None:
    config, tensors = quark_file()
    config = copy.deepcopy(config)
    damage(config, tensors)
    with pytest.raises(CheckpointError, match=message):
        read(config, tensors)


def test_rotations_that_are_part_of_the_weights_are_read() -> None:
    config, tensors = quark_file()
    config["algo_config"] = [{"name": "rotation", "r1": True, "r2": True, "r3": False, "r4": False}]
    assert Q in read(config, tensors)


def test_e8m0_dtype_of_scales_is_read() -> None:
    config, tensors = quark_file()
    expected = dequantize(LAYOUT.unpack(read(config, tensors)[Q], tensors.__getitem__))
    tensors[f"{Q}.weight_scale"] = tensors[f"{Q}.weight_scale"].view(torch.float8_e8m0fnu)
    assert torch.equal(dequantize(LAYOUT.unpack(read(config, tensors)[Q], tensors.__getitem__)), expected)
