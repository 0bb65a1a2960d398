"""Quantizing on another device than the one where the model lies: one layer at a time, with the same result."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from microscale.nn.packed import PackedModule
from microscale.recipes.apply import quantize_model
from microscale.recipes.calibration import Calibration, Feed
from microscale.recipes.recipe import make_recipe
from pretend_device import DEVICE, PretendDevice
from tiny_models import logits, tiny_model

WINDOWS = torch.randint(3, 150, (4, 16), generator=torch.Generator().manual_seed(0))


def quantized(model: Any, method: str, device: torch.device | None, feed: Feed = Feed.QUANTIZED) -> Any:
    recipe = make_recipe(format="mxfp4", activations="mxfp4", method=method, include=("lm_head",))
    calibration = None if method == "rtn" else Calibration(windows=WINDOWS, batch=2, feed=feed)
    quantize_model(model, recipe, calibration=calibration, device=device)
    return model


def layers_there(model: Any, device: PretendDevice) -> list[int]:
    """The decoder layers that lie on the device."""
    tensors = [next(layer.parameters()) for layer in model.model.layers]
    return [place for place, tensor in enumerate(tensors) if device.is_there(tensor)]


def assert_same(one: Any, other: Any) -> None:
    for name, module in one.named_modules():
        if isinstance(module, PackedModule):
            found = other.get_submodule(name)
            for part, tensor in module.tensor.parts.items():
                assert torch.equal(tensor, found.tensor.parts[part]), (name, part)
    assert torch.equal(logits(one), logits(other))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "feed"),
    [
        ("rtn", Feed.QUANTIZED),
        ("gptq", Feed.QUANTIZED),
        ("gptq", Feed.ORIGINAL),
        ("autoround:steps=2", Feed.QUANTIZED),
        pytest.param("autoround:steps=2", Feed.ORIGINAL, marks=SLOW),
        pytest.param("awq+hadamard:seed=1+gptq", Feed.QUANTIZED, marks=SLOW),
    ],
)
def test_layers_come_to_the_device_one_at_a_time(method: str, feed: Feed) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    expected = quantized(copy.deepcopy(model), method, None, feed)
    device, seen = PretendDevice(), list[list[int]]()
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(lambda *_: seen.append(layers_there(model, device)))
    with device:
        quantized(model, method, DEVICE, feed)
    assert device.peak > 0 and not any(device.is_there(t) for t in (*model.parameters(), *model.buffers()))
    assert {tuple(places) for places in seen} == (set() if method == "rtn" else {(), (0,), (1,), (2,)})
    assert_same(expected, model)


@pytest.mark.parametrize(
    "method",
    ["gptq+refine:epochs=1", *(pytest.param(m, marks=SLOW) for m in ("distill:epochs=1", "spinquant:steps=1"))],
)
def test_what_sees_the_whole_model_has_it_there_whole(method: str) -> None:
    model = tiny_model("llama")
    device, seen = PretendDevice(), list[list[int]]()
    model.model.norm.register_forward_pre_hook(lambda *_: seen.append(layers_there(model, device)))
    with device:
        quantized(model, method, DEVICE)
    assert [0, 1] in seen and not any(device.is_there(t) for t in (*model.parameters(), *model.buffers()))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3_text", "gpt2", "mamba"])
def test_other_families(family: str) -> None:
    """Masks for each kind of layer, experts, transposed weights, layers without attention."""
    model = tiny_model(family)
    expected = quantized(copy.deepcopy(model), "gptq", None)
    with PretendDevice():
        quantized(model, "gptq", DEVICE)
    assert_same(expected, model)
