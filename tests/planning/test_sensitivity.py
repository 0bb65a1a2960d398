"""Sensitivity: the three measures against their definitions, on a tiny model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import microscale
from measured_models import FORMATS, WINDOWS, table_of
from microscale.families.batch import Batch
from microscale.planning.candidates import parse_candidates
from microscale.planning.sensitivity import Sensitivity, measure_sensitivity, measuring_cost


class Noisy(nn.Module):
    """A linear layer whose output is off by a vector."""

    def __init__(self, layer: nn.Module, offset: float) -> None:
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
    assert measuring_cost(Sensitivity.KL, 63, 5, 9, 100).passes == pytest.approx(1 + 315 * 10 / 18)
    assert measuring_cost(Sensitivity.FISHER, 63, 5, 9, 100).passes == 8
    assert measuring_cost(Sensitivity.ERROR, 63, 5, 9, 100).tokens == 100


def test_embeddings_in_bfloat16_can_be_allocated(path: Path) -> None:
    """Their stand-ins give bfloat16 where the gradient is float32."""
    layers, table = table_of(microscale.load(path), include=("embedding",), candidates=parse_candidates("mxfp4,mxfp8"))
    name = next(layer.name for layer in layers if layer.role == "embedding")
    assert table.sensitivity[name][0] > table.sensitivity[name][1] > 0
