"""Experts and layers that few tokens reach: counted, named, and rounded to nearest; never learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from family_models import family_model
from microscale.nn.experts import ExpertTokens
from microscale.nn.packed import PackedModule
from microscale.recipes.apply import QuantizationReport, quantize_model
from microscale.recipes.calibration import Calibration
from microscale.recipes.offload import open_store
from microscale.recipes.recipe import make_recipe
from microscale.recipes.token_counts import FEWEST_TOKENS
from tiny_models import tiny_model

WINDOWS = torch.randint(3, 90, (8, 16), generator=torch.Generator().manual_seed(1))


def lopsided() -> Any:
    """Return a model whose routers send all tokens to the same two experts of four."""
    model: Any = family_model("mixtral", dtype=torch.float32)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()
    return model


def calibrated(
    model: Any, method: str, windows: Tensor = WINDOWS, experts: ExpertTokens = ExpertTokens.ROUTED
) -> QuantizationReport:
    recipe = make_recipe(format="mxfp4", method=method)
    return quantize_model(model, recipe, calibration=Calibration(windows=windows, batch=2, experts=experts))


def codes(model: Any) -> dict[str, Tensor]:
    return {
        name: module.tensor.parts["codes"] for name, module in model.named_modules() if isinstance(module, PackedModule)
    }


def changed(model: Any) -> set[str]:
    """Return the layers whose codes are not those of plain rounding."""
    plain = lopsided()
    quantize_model(plain, make_recipe(format="mxfp4"))
    expected = codes(plain)
    return {name for name, found in codes(model).items() if not torch.equal(found, expected[name])}


def test_experts_without_tokens_are_rounded_to_nearest_and_named() -> None:
    model = lopsided()
    report = calibrated(model, "gptq")
    empty = [name for name, count in report.expert_tokens.items() if count == 0]
    assert len(empty) == 4 and sorted(report.expert_tokens.values()) == [0] * 4 + [WINDOWS.numel()] * 4
    (note,) = [note for note in report.plan.notes if note.startswith("rounded to nearest")]
    assert "fewer than 16 tokens" in note and all(f"{name}.gate_proj (0)" in note for name in empty)
    others = changed(model)
    assert others and not any(name.startswith(tuple(f"{each}." for each in empty)) for name in others)


@pytest.mark.parametrize("method", ["smoothquant+gptq", "awq", "autoround", "lowrank", "flatquant"])
def test_what_is_not_measured_by_the_rounding_is_counted_too(method: str) -> None:
    counts = calibrated(lopsided(), method).expert_tokens
    assert sorted(counts.values()) == [0] * 4 + [WINDOWS.numel()] * 4


def test_all_tokens_reach_every_expert_where_asked() -> None:
    model = lopsided()
    report = calibrated(model, "gptq", experts=ExpertTokens.ALL)
    assert set(report.expert_tokens.values()) == {WINDOWS.numel()}
    assert not any(note.startswith("rounded to nearest") for note in report.plan.notes)
    assert {name for name in changed(model) if ".experts." in name} > {
        f"model.layers.0.mlp.experts.{i}.gate_proj" for i in range(4)
    }


@pytest.mark.parametrize("tokens", [FEWEST_TOKENS - 1, FEWEST_TOKENS])
def test_any_layer_needs_enough_tokens(tokens: int) -> None:
    model = family_model("llama", dtype=torch.float32)
    plain = family_model("llama", dtype=torch.float32)
    quantize_model(plain, make_recipe(format="mxfp4"))
    notes = calibrated(model, "gptq", WINDOWS[:1, :tokens]).plan.notes
    same = all(torch.equal(found, codes(plain)[name]) for name, found in codes(model).items())
    assert same == (tokens < FEWEST_TOKENS)
    assert any("rounded to nearest" in note and "and 0 more" not in note for note in notes) == same
    assert any("saw fewer tokens than they have inputs" in note for note in notes) != same


@pytest.mark.parametrize("family", ["llama4_text", "jetmoe", "gpt_oss"])
def test_experts_of_every_form_are_counted(family: str) -> None:
    model = tiny_model(family)
    report = calibrated(model, "gptq")
    routed = report.expert_tokens
    stacks = {name.rpartition(".")[0] for name in routed}
    assert all(sum(f"{stack}.{index}" in routed for index in range(4)) == 4 for stack in stacks)
    chosen = {"llama4_text": model.config.num_experts_per_tok}.get(family, 2)
    assert all(
        sum(n for name, n in routed.items() if name.startswith(f"{s}.")) == WINDOWS.numel() * chosen for s in stacks
    )


def test_a_job_resumes_only_with_the_same_tokens_for_experts(tmp_path: Path) -> None:
    recipe = make_recipe(format="mxfp4", method="gptq")
    places = {
        open_store(tmp_path, "model", recipe, Calibration(windows=WINDOWS, experts=tokens)).path
        for tokens in ExpertTokens
    }
    assert len(places) == 2
