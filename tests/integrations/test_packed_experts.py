"""Stacks of packed experts become packed layers of their own: the rows of the file, in whatever order they lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import microscale
from microscale.formats import parse_format
from microscale.integrations.packed_experts import PackedStack, joined_stacks, packed_stacks
from microscale.integrations.saving import stored_layers_of
from microscale.kernels import dequantize, quantize
from microscale.layer_spec import LayerSpec
from microscale.nn.experts import Experts
from microscale.nn.packed import PackedModule
from tiny_models import tiny_model

PLACE = "model.layers.0.mlp.experts"


def stack_of(module: Any, name: str) -> LayerSpec:
    shape = tuple(module.get_parameter(name).shape)
    is_transposed = bool(getattr(module, "is_transposed", False))
    rows, cols = shape[:0:-1] if is_transposed else shape[1:]
    return LayerSpec(
        name=f"{PLACE}.{name}",
        format=parse_format("mxfp4"),
        shape=(shape[0], rows, cols),
        dtype=torch.float32,
        kind="experts",
    )


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_layers_of_each_expert_are_rows_of_the_stack(family: str) -> None:
    """mixtral has gate and up one behind the other, gpt-oss in turn and transposed."""
    module: Any = tiny_model(family).get_submodule(PLACE)
    apart = Experts.from_stacked(tiny_model(family).get_submodule(PLACE))
    for name in ("gate_up_proj", "down_proj"):
        layer = stack_of(module, name)
        values = module.get_parameter(name).detach().float()
        packed = quantize((values.mT if family == "gpt_oss" else values).contiguous(), layer.format)
        stack = PackedStack(layer=layer, module=module)
        tensors, layers = stack.tensors(packed), stack.layers()
        assert tensors.keys() == layers.keys() and len(layers) == 4 * (2 if name == "gate_up_proj" else 1)
        for place, tensor in tensors.items():
            weight = apart.get_submodule(place.removeprefix(f"{PLACE}.")).get_parameter("weight")
            assert layers[place].shape == tuple(weight.shape) == tensor.shape and layers[place].kind == "linear"
            assert torch.equal(dequantize(tensor), dequantize(quantize(weight.float(), layer.format)))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_joining_undoes_taking_apart(family: str) -> None:
    module: Any = tiny_model(family).get_submodule(PLACE)
    model = quantize_model_of(family)
    layers = stored_layers_of(model)
    for packed in model.modules():
        if isinstance(packed, PackedModule):
            packed.set_layout("row_major")
    first, second = [stack for stack in joined_stacks(model, layers) if stack.layer.name.startswith(PLACE)]
    for joined, name in ((first, "gate_up_proj"), (second, "down_proj")):
        layer = stack_of(module, name)
        assert (joined.layer.name, joined.layer.shape, joined.layer.kind) == (layer.name, layer.shape, "experts")
        apart = PackedStack(layer=layer, module=module).tensors(joined.tensor())
        assert sorted(apart) == sorted(joined.members)
        for place, tensor in apart.items():
            assert torch.equal(dequantize(tensor), model.get_submodule(place).weight)
        bias = joined.bias()
        assert (bias is None) == (family == "mixtral")
        if bias is not None:
            assert torch.equal(bias, module.get_parameter(f"{name}_bias"))


def quantize_model_of(family: str) -> Any:
    return microscale.quantize(tiny_model(family), "mxfp4", include=["*.experts.*"], exclude=["self_attn.*"])


def test_stacks_are_taken_apart_only_as_a_whole() -> None:
    config = tiny_model("mixtral").config
    module = tiny_model("mixtral").get_submodule(PLACE)
    both = {f"{PLACE}.{name}": stack_of(module, name) for name in ("gate_up_proj", "down_proj")}
    assert packed_stacks(config, both).keys() == both.keys()
    assert packed_stacks(config, {f"{PLACE}.down_proj": both[f"{PLACE}.down_proj"]}) == {}
    assert packed_stacks(config, {}) == {}
