"""Sensitivity: the three measures against their definitions, on a tiny model."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import microscale
from measured_models import FORMATS, WINDOWS, table_of
from microscale.errors import AllocationError
from microscale.families.batch import Batch
from microscale.planning.candidates import parse_candidates
from microscale.planning.sensitivity import Sensitivity, measure_sensitivity, measuring_cost, parse_sensitivity


class Noisy(nn.Module):
    """A linear layer whose output is off by a vector."""

    def __init__(self, layer: nn.Module, offset: float | torch.Tensor) -> None:
        super().__init__()
        self.layer, self.offset = layer, offset

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs) + self.offset


def test_kl_is_that_of_the_whole_model_and_the_model_stays(model: Any) -> None:
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj", "lm_head"]
    stand_ins = {name: [Noisy(copy.deepcopy(model.get_submodule(name)), 0.05), None] for name in names}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    blocks = ["model.layers.0", "model.layers.1"]
    found = measure_sensitivity(
        model, stand_ins, blocks, Batch(token_ids=WINDOWS), Sensitivity.KL, progress=lambda done, total, label: None
    )
    for name in names:
        with torch.no_grad():
            reference = model(input_ids=WINDOWS).logits.double().log_softmax(-1)
            handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, output: output + 0.05)
            other = model(input_ids=WINDOWS).logits.double().log_softmax(-1)
            handle.remove()
        wanted = float((reference.exp() * (reference - other)).sum(-1).mean())
        assert found[name] == [pytest.approx(wanted, rel=1e-3, abs=1e-9), 0.0]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_fisher_is_near_kl_for_small_errors(model: Any) -> None:
    _, fisher = table_of(model)
    _, divergence = table_of(model, Sensitivity.KL)
    for place in range(len(FORMATS)):
        one = sum(values[place] for values in fisher.sensitivity.values())
        other = sum(values[place] for values in divergence.sensitivity.values())
        assert 0.3 < one / other < 3.0


@pytest.mark.parametrize("kind", list(Sensitivity))
def test_more_bits_hurt_less(model: Any, kind: Sensitivity) -> None:
    _, table = table_of(model, kind)
    sums = [sum(values[place] for values in table.sensitivity.values()) for place in range(len(FORMATS))]
    assert sums[0] > sums[1] > sums[2] > 0


def test_costs_are_told() -> None:
    assert measuring_cost(Sensitivity.KL, 63, 5, 9, 100).passes == pytest.approx(2 + 315 * 10 / 18)
    assert measuring_cost(Sensitivity.FISHER, 63, 5, 9, 100).passes == 9
    assert measuring_cost(Sensitivity.ERROR, 63, 5, 9, 100).tokens == 100


def test_embeddings_in_bfloat16_can_be_allocated(path: Path) -> None:
    """Their stand-ins give bfloat16 where the gradient is float32."""
    layers, table = table_of(microscale.load(path), include=("embedding",), candidates=parse_candidates("mxfp4,mxfp8"))
    name = next(layer.name for layer in layers if layer.role == "embedding")
    assert table.sensitivity[name][0] > table.sensitivity[name][1] > 0


def measure(model: Any, stand_ins: dict[str, Any], kind: Sensitivity, **options: Any) -> dict[str, list[float]]:
    blocks = ["model.layers.0", "model.layers.1"]
    batch = Batch(token_ids=WINDOWS)
    return measure_sensitivity(model, stand_ins, blocks, batch, kind, progress=lambda *step: None, **options)


def test_errors_of_outputs_by_their_definition(model: Any) -> None:
    """Σ |e|² / Σ |y|², with e 0.05 in each of 64 numbers of a token."""
    name = "model.layers.0.mlp.down_proj"
    outputs: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(input_ids=WINDOWS)
    handle.remove()
    power = float(outputs[0].double().square().sum())
    stand_in = Noisy(copy.deepcopy(model.get_submodule(name)), 0.05)
    found = measure(model, {name: [stand_in, None]}, Sensitivity.ERROR)
    assert found[name] == [pytest.approx(0.05**2 * 64 * WINDOWS.numel() / power, rel=1e-4), 0.0]


def test_fisher_of_the_head_is_that_of_its_predictions(model: Any) -> None:
    """For the head g = p - onehot(target) of its own draws; an error on all logits alike changes nothing."""
    same = Noisy(copy.deepcopy(model.lm_head), 0.5)
    one = Noisy(copy.deepcopy(model.lm_head), torch.eye(model.lm_head.out_features)[7] * 0.1)
    found = measure(model, {"lm_head": [same, one]}, Sensitivity.FISHER)["lm_head"]
    with torch.no_grad():
        share = model(input_ids=WINDOWS).logits[:, :-1].double().softmax(-1)[..., 7]
    assert found[0] < 1e-9 < found[1]
    # Where 7 was not drawn g is p, where it was p - 1: the sum of squares exceeds that of p by 1 - 2 p for each draw.
    draws = found[1] * 2 * share.numel() / 0.1**2 - float(share.square().sum())
    assert -1e-3 < draws < share.numel() / 4 and abs(draws - round(draws)) < 0.05
    again = measure(model, {"lm_head": [same, one]}, Sensitivity.FISHER)["lm_head"]
    assert again == found != measure(model, {"lm_head": [same, one]}, Sensitivity.FISHER, seed=1)["lm_head"]


@pytest.mark.parametrize("kind", list(Sensitivity))
def test_an_exact_stand_in_does_no_harm_and_the_model_stays(model: Any, kind: Sensitivity) -> None:
    name = "model.layers.1.self_attn.v_proj"
    model.train()
    model.lm_head.weight.requires_grad_(False)
    needed = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    found = measure(model, {name: [copy.deepcopy(model.get_submodule(name)), None]}, kind)
    assert found == {name: [pytest.approx(0.0, abs=1e-9), 0.0]}
    assert model.training and {key: parameter.requires_grad for key, parameter in model.named_parameters()} == needed
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_submodule(name)._forward_hooks and "forward" not in model.get_submodule(name).__dict__


@pytest.mark.parametrize("kind", [Sensitivity.KL, Sensitivity.ERROR])
def test_outputs_that_overflow_give_such_a_number(model: Any, kind: Sensitivity) -> None:
    name = "model.layers.0.mlp.up_proj"
    found = measure(model, {name: [Noisy(copy.deepcopy(model.get_submodule(name)), math.inf)]}, kind)
    assert not math.isfinite(found[name][0])


def test_words_of_measures() -> None:
    assert [parse_sensitivity(word) for word in ("kl", "fisher", "error")] == list(Sensitivity)
    with pytest.raises(AllocationError, match="unknown sensitivity 'hessian'; possible: kl, fisher, error"):
        parse_sensitivity("hessian")
