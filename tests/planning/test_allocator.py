"""From a table and a budget to a recipe: groups, the optimum, the front around it, the rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import microscale
from measured_models import CALIBRATION, FORMATS, table_of
from microscale.algorithms.contract import GroupTask, ModelProblem
from microscale.algorithms.distill import Distill
from microscale.errors import AllocationError
from microscale.formats import format_name
from microscale.planning.allocated_layers import allocated_layers, parse_fixed
from microscale.planning.allocator import allocation_recipe, solve
from microscale.planning.budget import Budget, BudgetUnit
from microscale.recipes.apply import quantize_model
from microscale.recipes.plan import make_plan
from microscale.recipes.recipe import load_recipe
from microscale.recipes.writing import recipe_text


def test_the_recipe_gives_what_was_solved(model: Any, path: Path, tmp_path: Path) -> None:
    _, table = table_of(model, fixed=[parse_fixed("mlp.down=mxfp8"), parse_fixed("lm_head=mxfp8/none")])
    solution = solve(table, Budget(amount=6.0, unit=BudgetUnit.BITS), points=4)
    assert len({candidate.text for candidate in solution.chosen.values()}) > 2
    recipe = allocation_recipe(model, table, solution.chosen, method="rtn", effort="fast")
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe, ["by a test"]))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    plan = make_plan(model, recipe)
    assert {layer.name: layer.requested_weights for layer in plan.layers} == {
        name: candidate.weights for name, candidate in solution.chosen.items()
    }
    assert solution.chosen["model.layers.1.mlp.down_proj"].text == "mxfp8"
    assert solution.chosen["lm_head"].text == "mxfp8/none"
    report = quantize_model(microscale.load(path), recipe)
    assert report.bits_per_weight == pytest.approx(solution.point.bits_per_weight) and report.bits_per_weight <= 6.0


def test_bytes_are_those_of_the_whole_model(model: Any) -> None:
    _, table = table_of(model)
    smallest = table.other_bytes + sum(min(sizes) for sizes in table.num_bytes.values())
    solution = solve(table, Budget(amount=smallest, unit=BudgetUnit.BYTES), points=2)
    assert solution.point.cost == smallest and {c.text for c in solution.chosen.values()} == {"mxfp4"}
    with pytest.raises(AllocationError, match=r"below the smallest possible with these formats, .* kB"):
        solve(table, Budget(amount=smallest - 1, unit=BudgetUnit.BYTES))
    with pytest.raises(AllocationError, match=r"smallest possible with these formats, 4\.250 bits"):
        solve(table, Budget(amount=4.2, unit=BudgetUnit.BITS))


def test_fused_layers_get_one_format(model: Any) -> None:
    _, table = table_of(model, is_fused=True)
    for amount in (4.4, 4.7, 5.3):
        chosen = solve(table, Budget(amount=amount, unit=BudgetUnit.BITS), points=2).chosen
        for layer in ("model.layers.0", "model.layers.1"):
            assert len({chosen[f"{layer}.self_attn.{name}_proj"] for name in "qkv"}) == 1
            assert len({chosen[f"{layer}.mlp.{name}_proj"] for name in ("gate", "up")}) == 1
    layers, _ = allocated_layers(model, FORMATS, fixed=[parse_fixed("q_proj=mxfp8")], is_fused=True)
    assert next(layer for layer in layers if layer.name.endswith("q_proj")).candidates == (3,)


def test_layers_fixed_apart_cannot_be_fused(model: Any) -> None:
    fixed = [parse_fixed("q_proj=mxfp4"), parse_fixed("k_proj=nvfp4")]
    _, table = table_of(model, is_fused=True, fixed=fixed)
    with pytest.raises(AllocationError, match="fixed to different formats"):
        solve(table, Budget(amount=6, unit=BudgetUnit.BITS))


@pytest.mark.parametrize("effort", ["good", "max"])
@pytest.mark.parametrize("segments", [None, "micromix:bits=6.5,wider=(mxfp6_e2m3)"])
def test_a_whole_model_is_learned_once_whatever_the_formats(
    model: Any, segments: str | None, effort: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers in different formats and segments learn together: one call with all of them, none left for another."""
    fixed = [parse_fixed(f"mlp.{role}={segments}") for role in ("gate_up", "down")] if segments else []
    method = f"rule+distill:epochs={2 if effort == 'good' else 8},transform=none" if segments else "best"
    _, table = table_of(model, method=method, effort=effort, fixed=fixed)
    solution = solve(table, Budget(amount=6.0, unit=BudgetUnit.BITS), points=2)
    assert len(set(solution.chosen.values())) > 1
    recipe = allocation_recipe(model, table, solution.chosen, method=method, effort=effort)
    if segments:
        assert len({rule.method for rule in recipe.rules if rule.method}) > 1
    calls: list[dict[str, str]] = []

    def learn(step: Distill, problem: ModelProblem) -> tuple[GroupTask, ...]:
        assert step.epochs == (2.0 if effort == "good" else 8.0)
        calls.append({layer.name: format_name(layer.format) for group in problem.groups for layer in group.layers})
        return problem.groups

    monkeypatch.setattr(Distill, "learn", learn)
    quantize_model(model, recipe, calibration=CALIBRATION)
    assert len(calls) == 1 and set(calls[0]) == set(solution.chosen)
    assert len(set(calls[0].values())) > 1
