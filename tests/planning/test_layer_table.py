"""The table of layers and candidates: bytes, methods, and what is the same whatever is chosen."""

from __future__ import annotations

from typing import Any

from measured_models import CALIBRATION, table_of
from microscale.formats import SegmentedFormat
from microscale.nn.linear import QuantizedLinear
from microscale.planning.allocator import allocation_recipe
from microscale.planning.candidates import parse_candidates
from microscale.recipes.apply import quantize_model


def test_segments_are_measured_as_the_recipe_cuts_them(model: Any) -> None:
    """A group's layers are cut alike in every candidate, and a layer without segments needs no step that cuts."""
    candidates = parse_candidates("mxfp4,micromix:bits=6.5,wider=(mxfp6_e2m3),mxfp6_e2m3")
    _, table = table_of(model, method="gptq", candidates=candidates)
    for layer in table.layers:
        assert table.methods[layer.name][0] is None and table.methods[layer.name][2] is None
        assert table.num_bytes[layer.name][0] <= table.num_bytes[layer.name][1]
    names = [f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv"]
    methods = [table.methods[name][1] for name in names]
    assert {pipeline.text for pipeline in methods if pipeline is not None} == {
        "micromix:wider=(mxfp6_e2m3),counts=(32,32)+gptq"
    }
    chosen = {layer.name: candidates[1] for layer in table.layers}
    recipe = allocation_recipe(model, table, chosen, method="gptq", effort="fast")
    bits = {layer.name: table.num_bytes[layer.name][1] for layer in table.layers}
    harms = {name: values[1] for name, values in table.sensitivity.items()}
    assert max(harms.values()) < 3 * max(values[0] for values in table.sensitivity.values()), "outputs are mixed up"
    quantize_model(model, recipe, calibration=CALIBRATION)
    for name, size in bits.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear) and layer.num_bytes == size, name
    assert isinstance(layer := model.model.layers[0].mlp.down_proj, QuantizedLinear)
    assert isinstance(layer.format, SegmentedFormat) and layer.transforms is None  # its order is folded
