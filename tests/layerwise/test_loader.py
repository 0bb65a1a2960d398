"""Layers that come from a source and go again: numbers, dtypes and gradients are what they were, to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import microscale
from microscale.errors import CheckpointError, NonFiniteError
from microscale.layerwise.loader import LayerLoader, float32_parameters
from small_models import save_random_model

FIRST, SECOND = "model.layers.0", "model.layers.1"


class Source:
    """Gives copies of the layers of a whole model, and notes which."""

    names = (FIRST, SECOND)

    def __init__(self, whole: Any, breaks: str = "") -> None:
        self.whole, self.breaks, self.log = whole, breaks, list[str]()

    def read(self, name: str) -> nn.Module:
        self.log.append(name)
        if name == self.breaks:
            raise CheckpointError(f"{name} is damaged")
        return copy.deepcopy(self.whole.get_submodule(name))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def source(path: Path) -> Source:
    return Source(microscale.load(path))


@pytest.fixture
def partial(path: Path) -> Any:
    model: Any = microscale.load(path)
    model.model.layers.to("meta")
    return model


def is_absent(model: Any, name: str) -> bool:
    """Whether all parameters lie on meta, in the dtype of the file."""
    found = {(parameter.is_meta, parameter.dtype) for parameter in model.get_submodule(name).parameters()}
    return found == {(True, torch.bfloat16)}


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_a_layer_comes_to_stay_once(source: Source, partial: Any) -> None:
    checked: list[str] = []
    loader = LayerLoader(partial, source, checked.append)
    assert loader.is_partial and is_absent(partial, FIRST)
    loader.load(SECOND)
    loader.load(SECOND)
    assert same(partial.get_submodule(SECOND), source.whole.get_submodule(SECOND)) and is_absent(partial, FIRST)
    loader.load_rest()
    assert source.log == checked == [SECOND, FIRST]
    assert same(partial, source.whole)


def test_a_layer_that_came_from_elsewhere_is_not_read(source: Source, partial: Any) -> None:
    loader = LayerLoader(partial, source)
    loader.restored(FIRST)
    loader.load_rest()
    assert source.log == [SECOND]


def test_a_stored_layer_is_forgotten_after_the_block(source: Source, partial: Any) -> None:
    loader = LayerLoader(partial, source)
    with pytest.raises(KeyError), loader.stored(FIRST) as module:
        assert module is partial.get_submodule(FIRST) and same(module, source.whole.get_submodule(FIRST))
        raise KeyError
    assert is_absent(partial, FIRST)


def test_a_layer_in_float32_is_forgotten_too(source: Source, partial: Any) -> None:
    loader = LayerLoader(partial, source)
    with loader.layer(FIRST) as module:
        wanted = source.whole.get_submodule(FIRST).mlp.up_proj.weight
        weight = module.get_parameter("mlp.up_proj.weight")
        assert weight.dtype == torch.float32 and torch.equal(weight, wanted.float())
    assert is_absent(partial, FIRST)  # in bfloat16 again
    loader.load(FIRST)
    assert same(partial.get_submodule(FIRST), source.whole.get_submodule(FIRST)) and source.log == [FIRST, FIRST]


def test_a_whole_model_keeps_its_layers(path: Path) -> None:
    """Without a source a layer is only seen in float32; its own numbers come back, and no gradient stays."""
    model: Any = microscale.load(path)
    before, loader = copy.deepcopy(model), LayerLoader(model, None)
    loader.load(FIRST)
    loader.load_rest()
    assert not loader.is_partial
    with loader.stored(FIRST) as module:
        assert module.get_parameter("mlp.up_proj.weight").dtype == torch.bfloat16
    with loader.layer(FIRST) as module:
        weight = module.get_parameter("mlp.up_proj.weight")
        assert weight.dtype == torch.float32 and not weight.requires_grad
        weight.requires_grad_().sum().backward()
        weight.data.mul_(2)
    parameters = dict(model.named_parameters())
    kept = {name: parameter.requires_grad for name, parameter in before.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in parameters.items()} == kept
    assert all(parameter.grad is None for parameter in parameters.values())
    changed = f"{FIRST}.mlp.up_proj.weight"  # bfloat16 numbers lie beside the float32 copy that was changed
    assert torch.equal(parameters[changed], before.get_parameter(changed)) and same(model, before)


def test_errors_of_reading_and_checking(source: Source, partial: Any) -> None:
    source.breaks = FIRST

    def check(name: str) -> None:
        raise NonFiniteError(f"{name} holds NaN")

    loader = LayerLoader(partial, source, check)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0 is damaged"):
        loader.load(FIRST)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0 is damaged"), loader.layer(FIRST):
        raise AssertionError
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1 holds NaN"):
        loader.load(SECOND)
    source.breaks = ""
    with loader.stored(FIRST) as module:  # what could not be read is still waiting
        assert not next(module.parameters()).is_meta


def test_float32_parameters_come_back_to_the_bit() -> None:
    half = nn.Parameter(torch.tensor([1.0, -0.0, float("nan"), float("inf"), 2.0**-24], dtype=torch.float16))
    whole = nn.Parameter(torch.tensor([3, 4]), requires_grad=False)
    frozen = nn.Parameter(torch.ones(2, dtype=torch.bfloat16), requires_grad=False)
    bits = half.data.view(torch.int16).clone()
    with pytest.raises(KeyError), float32_parameters([half, whole, frozen]):
        assert (half.dtype, whole.dtype, frozen.dtype) == (torch.float32, torch.int64, torch.float32)
        assert not half.requires_grad
        raise KeyError
    assert torch.equal(half.data.view(torch.int16), bits)
    assert half.requires_grad and not frozen.requires_grad and frozen.dtype == torch.bfloat16
