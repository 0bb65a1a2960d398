"""From a table and a budget to a recipe: groups, the optimum, the front around it, the rules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import microscale
from measured_models import CALIBRATION, FORMATS, table_of
from microscale.algorithms.contract import GroupProblem, LayerFunction, ModelProblem
from microscale.algorithms.distill import Distill
from microscale.algorithms.refine import Refine
from microscale.errors import AllocationError
from microscale.formats import format_name
from microscale.nn.sizes import Size
from microscale.planning.allocated_layers import AllocatedLayer, Grouping, allocated_layers, parse_fixed
from microscale.planning.allocator import allocation_recipe, check_budget, check_reachable, choice_groups, solve
from microscale.planning.budget import Budget, BudgetUnit, amount_text, parse_budget
from microscale.planning.candidates import parse_candidates
from microscale.planning.layer_table import LayerTable
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
    smallest = table.others.num_bytes + sum(min(sizes) for sizes in table.num_bytes.values())
    solution = solve(table, Budget(amount=smallest, unit=BudgetUnit.BYTES), points=2)
    assert solution.point.cost == smallest and {c.text for c in solution.chosen.values()} == {"mxfp4"}
    with pytest.raises(AllocationError, match=r"below the smallest possible with these formats, .* kB"):
        solve(table, Budget(amount=smallest - 1, unit=BudgetUnit.BYTES))
    with pytest.raises(AllocationError, match=r"smallest possible with these formats, 4\.250 bits"):
        solve(table, Budget(amount=4.2, unit=BudgetUnit.BITS))


def test_fused_layers_get_one_format(model: Any) -> None:
    _, table = table_of(model, grouping=Grouping.FUSED)
    for amount in (4.4, 4.7, 5.3):
        chosen = solve(table, Budget(amount=amount, unit=BudgetUnit.BITS), points=2).chosen
        for layer in ("model.layers.0", "model.layers.1"):
            assert len({chosen[f"{layer}.self_attn.{name}_proj"] for name in "qkv"}) == 1
            assert len({chosen[f"{layer}.mlp.{name}_proj"] for name in ("gate", "up")}) == 1
    layers, _ = allocated_layers(model, FORMATS, fixed=[parse_fixed("q_proj=mxfp8")], grouping=Grouping.FUSED)
    assert next(layer for layer in layers if layer.name.endswith("q_proj")).candidates == (3,)


def test_layers_fixed_apart_cannot_be_fused(model: Any) -> None:
    fixed = [parse_fixed("q_proj=mxfp4"), parse_fixed("k_proj=nvfp4")]
    _, table = table_of(model, grouping=Grouping.FUSED, fixed=fixed)
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

    def learn(step: Distill, problem: ModelProblem) -> tuple[GroupProblem, ...]:
        assert step.epochs == (2.0 if effort == "good" else 8.0)
        calls.append({layer.name: format_name(layer.format) for group in problem.groups for layer in group.layers})
        return problem.groups

    def refine(step: Refine, problem: ModelProblem, rounded: Mapping[str, LayerFunction]) -> None:
        assert set(rounded) == set(solution.chosen)
        calls.append({layer.name: format_name(layer.format) for group in problem.groups for layer in group.layers})

    monkeypatch.setattr(Distill, "learn", learn)
    monkeypatch.setattr(Refine, "refine", refine)
    quantize_model(model, recipe, calibration=CALIBRATION)
    assert len(calls) == (2 if method == "best" and effort == "max" else 1)
    assert all(set(call) == set(solution.chosen) for call in calls)
    assert len(set(calls[0].values())) > 1


PLAIN = parse_candidates("mxfp4,mxfp8,none")


def made_up(
    *rows: tuple[str, int, tuple[float, ...], tuple[int, ...]],
    candidates: tuple[int, ...] = (0, 1, 2),
    fused: tuple[str, ...] | None = None,
    milliseconds: dict[str, list[float]] | None = None,
) -> LayerTable:
    """A table of layers (name, weights, sensitivities, bytes) without a model; 1000 bytes lie besides them."""
    layers = tuple(
        AllocatedLayer(
            name=name, role="r", kind="linear", shape=(1, num), fused=fused or (name,), candidates=candidates
        )
        for name, num, _, _ in rows
    )
    return LayerTable(
        layers=layers,
        candidates=PLAIN,
        sensitivity={name: list(harms) for name, _, harms, _ in rows},
        num_bytes={name: list(sizes) for name, _, _, sizes in rows},
        milliseconds=milliseconds,
        others=Size(num_weights=500, num_bytes=1000),
        methods={name: [None] * 3 for name, _, _, _ in rows},
    )


A, B = ("a", 100, (8.0, 2.0, 0.0), (50, 100, 200)), ("b", 300, (1.0, 0.5, 0.0), (150, 300, 600))


@pytest.mark.parametrize(
    ("text", "chosen", "cost", "harm"),
    [
        ("4bits", ("mxfp4", "mxfp4"), 4.0, 9.0),
        ("5bits", ("mxfp8", "mxfp4"), 5.0, 3.0),  # 100 + 150 bytes for 400 weights
        ("7bits", ("none", "mxfp4"), 7.0, 1.0),
        ("15.9bits", ("none", "mxfp8"), 10.0, 0.5),
        ("1GB", ("none", "none"), 1800.0, 0.0),
        ("1.25kB", ("mxfp8", "mxfp4"), 1250.0, 3.0),
        ("6ms", ("mxfp8", "mxfp8"), 5.0, 2.5),
    ],
)
def test_optima_by_hand(text: str, chosen: tuple[str, str], cost: float, harm: float) -> None:
    table = made_up(A, B, milliseconds={"a": [1.0, 2.0, 9.0], "b": [6.0, 3.0, 9.0]})
    found = solve(table, parse_budget(text), points=3)
    assert tuple(found.chosen[name].text for name in "ab") == chosen
    assert (found.point.cost, found.point.sensitivity) == (cost, harm)
    sizes = [table.num_bytes[name][PLAIN.index(found.chosen[name])] for name in "ab"]
    assert found.point.bits_per_weight == 8 * sum(sizes) / 400
    assert sum(found.point.counts.values()) == 2
    assert found.point in found.front


def test_formats_for_all_layers_stand_beside_the_optimum() -> None:
    found = solve(made_up(A, B), parse_budget("5bits"), points=2)
    assert {name: (one.cost, one.sensitivity) for name, one in found.uniform.items()} == {
        "mxfp4": (4.0, 9.0),
        "mxfp8": (8.0, 2.5),
        "none": (16.0, 0.0),
    }
    assert found.uniform["mxfp8"].counts == {"mxfp8": 2}
    costs = [one.cost for one in found.front]
    assert costs == sorted(set(costs)) and {4.0, 5.0, 16.0} <= set(costs)


def test_three_decimals_of_a_bit_are_given() -> None:
    """A scale of the whole tensor must not cost a layer its format: 4.0005 bits are met by 4 and a little."""
    table = made_up(("a", 16_000, (1.0, 0.5, 0.0), (8001, 16_000, 32_000)))
    assert solve(table, Budget(amount=4.0, unit=BudgetUnit.BITS)).point.cost == pytest.approx(4.0005)
    with pytest.raises(
        AllocationError, match=r"budget 3\.999 bits is below .*4\.000 bits; raise it \(up to 16\.000 bits"
    ):
        solve(table, Budget(amount=3.999, unit=BudgetUnit.BITS))


def test_fused_layers_count_together() -> None:
    (group,) = choice_groups(made_up(A, B, fused=("a", "b")), BudgetUnit.BITS)
    assert group.names == ("a", "b")
    assert [(one.candidate, one.sensitivity, one.cost) for one in group.choices] == [
        (0, 9.0, 1600.0),
        (1, 2.5, 3200.0),
        (2, 0.0, 6400.0),
    ]
    one, other = choice_groups(made_up(A, B), BudgetUnit.BYTES)
    assert [choice.cost for choice in one.choices] == [50.0, 100.0, 200.0] and other.names == ("b",)


def test_times_must_have_been_measured() -> None:
    with pytest.raises(AllocationError, match="a budget in milliseconds needs measured times"):
        solve(made_up(A), parse_budget("1ms"))


@pytest.mark.parametrize(("text", "smallest"), [("3.9bits", "4.000 bits"), ("1.1kB", "1.200 kB"), ("6ms", "6.500 ms")])
def test_budgets_that_no_choice_meets(text: str, smallest: str) -> None:
    table = made_up(A, B, milliseconds={"a": [0.5, 2.0, 9.0], "b": [6.0, 7.0, 9.0]})
    with pytest.raises(AllocationError, match=f"below the smallest possible with these formats, {smallest}; raise it"):
        check_reachable(table, parse_budget(text))
    check_reachable(table, parse_budget(smallest.replace(" ", "")))


def test_a_budget_is_checked_before_anything_is_measured(model: Any) -> None:
    layers, every = allocated_layers(model, FORMATS)
    check_budget(model, layers, every, parse_budget("4.25bits"))
    check_budget(model, layers, every, parse_budget("0.001ms"))  # times are not known yet
    with pytest.raises(AllocationError, match=r"formats, 4\.250 bits; raise it, allow a smaller format or fix fewer"):
        check_budget(model, layers, every, parse_budget("4.2bits"))
    weights = sum(layer.num_weights for layer in layers)
    everything = sum(parameter.numel() * 4 for parameter in model.parameters())
    rest = everything - 4 * weights + sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    least = weights * 17 // 32 + rest  # 17 bytes for 32 weights
    check_budget(model, layers, every, parse_budget(f"{least}B"))
    with pytest.raises(AllocationError, match=amount_text(least, BudgetUnit.BYTES)):
        check_budget(model, layers, every, parse_budget(f"{least - 1}B"))


def test_a_recipe_needs_something_to_quantize(model: Any) -> None:
    table = made_up(A)
    with pytest.raises(AllocationError, match="every layer stays as it is; there is nothing to quantize"):
        allocation_recipe(model, table, {"a": PLAIN[2]}, method="rtn", effort="fast")


def test_the_commonest_format_is_the_base_and_others_are_rules(model: Any) -> None:
    layers, every = allocated_layers(model, PLAIN)
    names = [layer.name for layer in layers]
    table = LayerTable(
        layers=layers,
        candidates=every,
        sensitivity={},
        num_bytes={},
        milliseconds=None,
        others=Size(num_weights=0, num_bytes=0),
        methods={name: [None] * 3 for name in names},
    )
    picks = {name: PLAIN[place if place in (1, 2) else 0] for place, name in enumerate(names)}
    recipe = allocation_recipe(model, table, picks, method="gptq", effort="good")
    assert (str(recipe.format), recipe.effort) == ("mxfp4", "good") and recipe.exclude == recipe.include == ()
    assert [(rule.match, str(rule.weights), str(rule.activations)) for rule in recipe.rules] == [
        (names[1], "mxfp8", "mxfp8"),
        (names[2], "none", "None"),
    ]
