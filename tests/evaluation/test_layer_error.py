"""Errors of decoder layers: by hand on linear chains, on a real structure, special values, wrong pairs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from family_models import family_model
from microscale.errors import ModelError, ShapeError, TextError
from microscale.evaluation.layer_error import decoder_layers, layer_errors
from microscale.families.batch import Batch
from microscale.families.running import run_model
from small_models import save_random_model


class Scale(nn.Module):
    """Multiplies by a number; may return a tuple, as some decoder layers do."""

    def __init__(self, factor: float, as_tuple: bool) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.as_tuple = as_tuple

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, None]:
        return (self.factor * x, None) if self.as_tuple else self.factor * x


class Chain(nn.Module):
    """Embeds a token as two equal numbers and multiplies them by one factor after the other."""

    def __init__(self, factors: list[float], values: list[float], *, as_tuple: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scale(factor, as_tuple) for factor in factors])
        self.values = torch.tensor(values)

    def forward(self, batch: Batch) -> Tensor:
        x = self.values[batch.token_ids][..., None].expand(*batch.token_ids.shape, 2)
        for layer in self.layers:
            y = layer(x)
            x = y[0] if isinstance(y, tuple) else y
        return x


def call(model: nn.Module) -> Callable[[Batch], Tensor]:
    return model


@pytest.mark.parametrize("as_tuple", [False, True])
def test_a_chain_by_hand(as_tuple: bool) -> None:
    """Factor 1.1 instead of 1: the error is 0.1² of the power, and stays in all later layers."""
    values = [1.0, 10.0, 100.0]
    reference = Chain([2.0, 1.0, 3.0], values)
    model = Chain([2.0, 1.1, 3.0], values, as_tuple=as_tuple)
    found = layer_errors(model, reference, [torch.tensor([0, 1]), torch.tensor([2, 2, 1])], call, batch=2)
    assert [layer.name for layer in found] == ["layers.0", "layers.1", "layers.2"]
    assert found[0].relative_error == 0.0 and found[0].sqnr_db == math.inf and found[0].token_error == 0.0
    for layer in found[1:]:
        assert layer.relative_error == pytest.approx(0.01, rel=1e-5)
        assert layer.sqnr_db == pytest.approx(20.0, rel=1e-5)
        assert layer.token_error == pytest.approx(0.01, rel=1e-5)
        assert layer.tokens == 5


def test_one_enormous_token_decides_the_relative_error_alone() -> None:
    reference, model = Chain([1.0], [1.0, 1000.0]), Chain([1.0], [1.5, 1000.0])
    (layer,) = layer_errors(model, reference, [torch.tensor([0, 1])], call)
    assert layer.relative_error == pytest.approx(0.25 / 1_000_001)
    assert layer.token_error == pytest.approx(0.25 / 2)


@pytest.mark.parametrize(
    ("wanted", "got", "relative", "sqnr", "token"),
    [
        (0.0, 0.0, 0.0, math.inf, 0.0),
        (0.0, 1.0, math.inf, -math.inf, math.inf),
        (1.0, math.nan, math.nan, math.nan, math.nan),
        (1.0, math.inf, math.inf, -math.inf, math.inf),
    ],
)
def test_special_values(wanted: float, got: float, relative: float, sqnr: float, token: float) -> None:
    (layer,) = layer_errors(Chain([1.0], [got]), Chain([1.0], [wanted]), [torch.tensor([0, 0])], call)
    assert layer.relative_error == pytest.approx(relative, nan_ok=True)
    assert layer.sqnr_db == pytest.approx(sqnr, nan_ok=True)
    assert layer.token_error == pytest.approx(token, nan_ok=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_real_structures(family: str, tmp_path: Path) -> None:
    """A change in the second layer leaves the first one's output alone; hooks are gone afterwards."""
    path = save_random_model(tmp_path / family, family, dtype=torch.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(path)
    names = decoder_layers(reference)
    assert len(names) == 2 and names[0].endswith(".0") and "expert" not in names[0]
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in model.get_submodule(names[1]).parameters():
            parameter.mul_(1.05)

    def logits(module: nn.Module) -> Callable[[Batch], Tensor]:
        return lambda batch: run_model(module, batch).logits

    first, second = layer_errors(model, reference, [torch.arange(20), torch.arange(20, 40)], logits)
    assert first.relative_error == 0.0
    assert 0.0 < second.relative_error < 1.0 and 0.0 < second.token_error < 1.0
    assert not any(module._forward_hooks for module in model.modules())


def test_vision_larger_than_the_language_part_is_not_taken_for_it() -> None:
    """By size the blocks of this vision part would be the decoder layers; no text ever runs through them."""
    model = family_model("qwen2_5_vl")
    model.model.visual.blocks.extend(copy.deepcopy(model.model.visual.blocks[0]) for _ in range(6))
    layers, blocks = model.model.language_model.layers, model.model.visual.blocks
    assert sum(p.numel() for p in blocks.parameters()) > sum(p.numel() for p in layers.parameters())
    names = [f"model.language_model.layers.{index}" for index in range(len(layers))]
    assert decoder_layers(model) == names
    layers[0].self_attn.q_proj = nn.Identity()  # what is inside of a layer does not matter
    assert decoder_layers(model) == names


def test_a_family_whose_layers_lie_elsewhere_is_found_by_size() -> None:
    """The decoder without its head has other names than the record."""
    model = family_model("llama").model
    assert decoder_layers(model) == ["layers.0", "layers.1"]


def test_wrong_pairs() -> None:
    chain, tokens = Chain([1.0, 1.0], [1.0]), [torch.tensor([0, 0])]
    with pytest.raises(ShapeError, match="2 decoder layers, the model 1"):
        layer_errors(Chain([1.0], [1.0]), chain, tokens, call)
    with pytest.raises(ModelError, match="no list of decoder layers"):
        layer_errors(nn.Linear(2, 2), chain, tokens, call)
    with pytest.raises(TextError, match="no window"):
        layer_errors(chain, chain, [], call)
    wide = Chain([1.0, 1.0], [1.0])
    wide.layers[0].factor.data = torch.ones(3, 1, 1)  # three outputs for each batch
    with pytest.raises(ShapeError, match=r"output of layers\.0: \(1, 2, 2\) in the reference.*the model's original"):
        layer_errors(wide, chain, tokens, call)
    assert not any(module._forward_hooks for module in chain.modules())


def test_a_layer_that_gives_no_hidden_states_is_named() -> None:
    """The hooks are gone afterwards all the same."""

    class Words(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "no numbers"

    class Talking(Chain):
        def forward(self, batch: Batch) -> Tensor:
            self.layers[0](batch.token_ids)
            return torch.zeros(1)

    model = Talking([1.0], [1.0])
    model.layers[0] = Words()
    model.layers[0].register_buffer("size", torch.zeros(1))
    with pytest.raises(ModelError, match=r"layers\.0 returns a str, not hidden states"):
        layer_errors(model, model, [torch.tensor([0, 0])], call)
    assert not any(module._forward_hooks for module in model.modules())
