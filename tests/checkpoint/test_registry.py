"""Which layout is written and read, and the object that says what decided the bits."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from microscale.checkpoint.registry import choose_layout, describe_layers, layout_named, layout_of
from microscale.errors import CheckpointError, LayoutError
from microscale.formats import parse_activation, parse_format
from microscale.layer_spec import LayerSpec

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def stored(name: str, spec: str, activations: str | None = None, **fields: Any) -> LayerSpec:
    values: dict[str, Any] = {"shape": (4, 64), "dtype": torch.bfloat16} | fields
    act = None if activations is None else parse_activation(activations)
    return LayerSpec(name=name, format=parse_format(spec), activations=act, **values)


def test_layouts_by_name() -> None:
    ct, native, plus = stored(UP, "mxfp4", "mxfp8:even(1)"), stored(UP, "mxfp4", "mxfp8"), stored(UP, "mxfp4_plus")
    assert choose_layout("auto", [ct, ct]).name == "compressed-tensors"
    assert choose_layout("auto", [ct, native]).name == choose_layout("auto", [plus]).name == "microscale"
    assert choose_layout("microscale", [ct]).name == "microscale"
    assert choose_layout("auto", [ct], "because").name == "microscale"
    for layers, obstacle, word in (([native], None, UP), ([plus], None, UP), ([ct], "because", "because")):
        with pytest.raises(LayoutError, match=word):
            choose_layout("compressed-tensors", layers, obstacle)
    with pytest.raises(LayoutError, match="possible: auto, compressed-tensors, quark, gpt-oss, microscale"):
        layout_named("gguf")
    for method, name in (
        ("microscale", "microscale"),
        ("compressed-tensors", "compressed-tensors"),
        ("quark", "quark"),
    ):
        assert layout_of({"quant_method": method}).name == name
    for method in ("gptq", None, 3, ["microscale"]):
        with pytest.raises(CheckpointError, match="not one that microscale reads"):
            layout_of({"quant_method": method})


def test_the_object_says_everything_that_decided_the_bits() -> None:
    layers = [
        stored(UP, "mxfp4:mse(-1,1):stochastic(3):inf_saturate", "mxfp8"),
        stored(DOWN, "adaptive_2_4"),
        stored("a", "mxfp4:mse(-1,1):stochastic(3):inf_saturate", "mxfp8", shape=(8, 32)),
    ]
    found = describe_layers(layers, "microscale", "9.8.7", torch.float16)
    assert json.loads(json.dumps(found)) == found
    assert (found["version"], found["layout"], found["dtype"]) == ("9.8.7", "microscale", "float16")
    first, second = found["schemes"]
    assert first["layers"] == [UP, "a"] and second["layers"] == [DOWN]
    assert (first["scale_rule"], first["rounding"], first["seed"]) == ("mse(-1,1)", "stochastic", 3)
    assert (first["overflow"], first["nan_policy"], first["inf_policy"]) == ("saturate", "nan_poison", "inf_saturate")
    assert (first["activations"], first["method"]) == ("mxfp8_e4m3", "rtn")
    assert parse_format(first["format"]) == layers[0].format
    assert second["low"]["scale_rule"] == second["high"]["scale_rule"] == "minmax"
