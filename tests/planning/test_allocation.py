"""The solver against brute force, budgets, candidates and sensitivities on a tiny model."""

from __future__ import annotations

import copy
import ctypes
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import microscale
from microscale.algorithms import GroupTask, ModelProblem
from microscale.algorithms.distill import Distill
from microscale.errors import AllocationError
from microscale.families import Batch
from microscale.formats import SegmentedFormat, format_name
from microscale.nn import QuantizedLinear
from microscale.planning import (
    Budget,
    BudgetUnit,
    Candidate,
    Choice,
    ChoiceGroup,
    Sensitivity,
    allocated_layers,
    allocation_recipe,
    amount_text,
    measure_sensitivity,
    measure_table,
    measuring_cost,
    parse_budget,
    parse_candidate,
    parse_candidates,
    parse_fixed,
    solve,
)
from microscale.planning.allocation import _quiet_output, allocate, front, largest_cost, least_cost
from microscale.planning.stand_ins import layer_method, measured_method
from microscale.recipes import Calibration, load_recipe, make_plan, quantize_model, recipe_text
from small_models import save_random_model

WINDOWS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
CALIBRATION = Calibration(windows=WINDOWS, is_sequential=False)
FORMATS = parse_candidates("mxfp4,nvfp4,mxfp6_e2m3")


def random_groups(seed: int, groups: int, *, is_whole: bool) -> list[ChoiceGroup]:
    randomness = np.random.default_rng(seed)
    found: list[ChoiceGroup] = []
    for place in range(groups):
        costs = randomness.integers(1, 40, 4) * 1024.0 if is_whole else randomness.uniform(0.001, 2.0, 4)
        harms = randomness.lognormal(-12, 3, 4)
        choices = [
            Choice(candidate=c, sensitivity=float(harms[c]), cost=float(costs[c])) for c in range(4 if place % 3 else 2)
        ]
        found.append(ChoiceGroup(names=(f"layer{place}",), choices=tuple(choices)))
    return found


def brute_force(groups: list[ChoiceGroup], budget: float) -> float:
    """Return the least summed sensitivity of all combinations within the budget."""
    sums = [
        (math.fsum(c.cost for c in combination), math.fsum(c.sensitivity for c in combination))
        for combination in itertools.product(*(group.choices for group in groups))
    ]
    return min(harm for cost, harm in sums if cost <= budget * (1 + 1e-12))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("is_whole", [True, False])
def test_the_answer_is_the_optimum(seed: int, is_whole: bool) -> None:
    groups = random_groups(seed, 6, is_whole=is_whole)
    low, high = least_cost(groups), max(largest_cost(groups), least_cost(groups))
    for share in (0.0, 0.1, 0.37, 0.5, 0.83, 1.0, 1.2):
        budget = low + share * (high - low)
        found = allocate(groups, budget)
        assert found.cost <= budget * (1 + 1e-9)
        assert found.sensitivity == pytest.approx(brute_force(groups, budget), rel=1e-9)


def test_what_the_solver_prints_is_thrown_away(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS leaves remarks on standard output, through the buffer of C; a command prints its JSON there."""
    library = ctypes.CDLL(None)
    library.puts(b"before")
    with _quiet_output():
        library.puts(b"a remark")
    library.puts(b"after")
    library.fflush(None)
    words = capfd.readouterr().out.split("\n")
    assert "before" in words and "after" in words and "a remark" not in words


def test_a_front_falls_and_has_no_point_twice() -> None:
    points = front(random_groups(1, 5, is_whole=True), 30)
    assert len(points) > 4
    for one, other in itertools.pairwise(points):
        assert other.cost > one.cost and other.sensitivity < one.sensitivity


def test_what_cannot_be_solved() -> None:
    groups = random_groups(2, 3, is_whole=True)
    with pytest.raises(AllocationError, match="smallest possible cost"):
        allocate(groups, least_cost(groups) * 0.99)
    broken = ChoiceGroup(names=("down",), choices=(Choice(candidate=0, sensitivity=math.nan, cost=1.0),))
    with pytest.raises(AllocationError, match="down is not finite"):
        allocate([*groups, broken], 1e9)


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("4.5bits", 4.5, BudgetUnit.BITS),
        ("4.5 bits", 4.5, BudgetUnit.BITS),
        ("1.2GB", 1.2e9, BudgetUnit.BYTES),
        ("3MiB", 3 * 2**20, BudgetUnit.BYTES),
        (".5kB", 500, BudgetUnit.BYTES),
        ("20ms", 20, BudgetUnit.MILLISECONDS),
        ("0.02s", 20, BudgetUnit.MILLISECONDS),
    ],
)
def test_budgets(text: str, amount: float, unit: BudgetUnit) -> None:
    assert parse_budget(text) == Budget(amount=amount, unit=unit)


@pytest.mark.parametrize("text", ["4.5", "bits", "-3GB", "0bits", "4.5furlongs", "nanbits", "infms", "", "4,5bits"])
def test_bad_budgets(text: str) -> None:
    with pytest.raises(AllocationError, match="budget"):
        parse_budget(text)


def test_amounts_are_shown_in_their_unit() -> None:
    assert amount_text(4.5, BudgetUnit.BITS) == "4.500 bits"
    assert amount_text(1.2e9, BudgetUnit.BYTES) == "1.200 GB" and amount_text(12, BudgetUnit.BYTES) == "12 B"


def words_of(candidate: Candidate) -> tuple[str | None, ...]:
    parts = (candidate.weights, candidate.activations, candidate.method)
    return tuple(None if part is None else str(part) for part in parts)


@pytest.mark.parametrize(
    ("text", "weights", "activations"),
    [
        ("mxfp4", "mxfp4", "mxfp4"),
        ("mxfp4/mxfp8", "mxfp4", "mxfp8"),
        ("mxfp4/none", "mxfp4", None),
        ("none", "none", None),
        ("int2/64:fp16:asym", "int2/64:fp16:asym", "int2/64:fp16:asym"),
        ("int2/64:fp16:asym/mxfp8", "int2/64:fp16:asym", "mxfp8"),
    ],
)
@pytest.mark.parametrize("method", [None, "micromix:bits=5.0,wider=(mxfp6_e2m3)", "rtn", "mxplus+micromix"])
def test_candidates(text: str, weights: str, activations: str | None, method: str | None) -> None:
    if method is None or weights != "none":
        found = parse_candidate(text if method is None else f"{text}@{method}")
        assert words_of(found) == (weights, activations, method)
        assert parse_candidate(found.text) == found


def test_a_method_alone_starts_from_mxfp4() -> None:
    found = parse_candidates("micromix:bits=5.0,wider=(mxfp6_e2m3,mxfp8),weights=base,mxfp8,adaptive-2-4")
    assert [words_of(candidate) for candidate in found] == [
        ("mxfp4", "mxfp4", "micromix:bits=5.0,wider=(mxfp6_e2m3,mxfp8),weights=base"),
        ("mxfp8", "mxfp8", None),
        ("mxfp4", "mxfp4", "adaptive-2-4"),
    ]
    assert found[0].text == str(found[0].method)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        ",mxfp4",
        "mxfp4,,mxfp8",
        "mxfp5",
        "mxfp4,mxfp4",
        "none/mxfp4",
        "none@rtn",
        "mxfp4@distill",
        "mxfp4@quarot",
        "mxfp4@awq",
        "mxfp4/nvfp4@static",
        "mxfp4/mxfp5",
        "mxfp4:prescale(0.75",
    ],
)
def test_bad_candidates(text: str) -> None:
    with pytest.raises(AllocationError):
        parse_candidates(text)


def test_commas_inside_of_a_format_are_its_own() -> None:
    assert [c.text for c in parse_candidates("mxfp4:prescale(0.75), mxfp8,")] == ["mxfp4:prescale(0.75)", "mxfp8"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def model(path: Path) -> Any:
    return microscale.load(path, dtype=torch.float32)


def table_of(
    model: Any,
    kind: Sensitivity = Sensitivity.FISHER,
    method: str = "rtn",
    effort: str = "fast",
    candidates: Sequence[Candidate] = FORMATS,
    **options: Any,
) -> Any:
    layers, every = allocated_layers(model, candidates, **options)
    table = measure_table(
        model,
        layers,
        every,
        calibration=CALIBRATION,
        method_text=CALIBRATION,
        sensitivity=kind,
        method=method,
        effort=effort,
        latency_tokens=None,
        progress=lambda done, total, label: None,
    )
    return layers, table


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
    assert words_of(solution.chosen["lm_head"]) == ("mxfp8", None, None)
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


@pytest.mark.parametrize("text", ["mlp.down", "=mxfp8", "norm=mxfp8", "kv_cache=mxfp4/mxfp8", "mlp.down=mxfp5"])
def test_bad_choices_by_hand(text: str) -> None:
    with pytest.raises(AllocationError):
        parse_fixed(text)


def test_a_role_that_the_model_lacks(model: Any) -> None:
    with pytest.raises(AllocationError, match=r"roles of this model: attention\.out, attention\.qkv, embedding"):
        allocated_layers(model, FORMATS, fixed=[parse_fixed("moe.gate=mxfp8")])
    with pytest.raises(AllocationError, match="leave layers alone"):
        allocated_layers(model, parse_candidates("none"))


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


@pytest.mark.parametrize(
    ("method", "chain"),
    [
        ("rtn", "micromix:bits=5+rtn"),
        ("gptq", "micromix:bits=5+gptq"),
        ("mr-gptq", "rule+micromix:bits=5+gptq"),
        ("smoothquant", "smoothquant+micromix:bits=5+rtn"),
        ("qad", "rule+micromix:bits=5+rtn"),
        ("distill:transform=none", "micromix:bits=5+distill:transform=none+rtn"),
        ("lowrank", "micromix:bits=5+rtn+lowrank"),
    ],
)
def test_what_may_stand_beside_segments_does(method: str, chain: str) -> None:
    candidate = parse_candidate("micromix:bits=5")
    assert layer_method(candidate, method, "fast").text == chain
    assert layer_method(parse_candidate("mxfp4@rtn"), method, "fast").text == "rtn"
    is_tied = method.startswith(("smoothquant", "distill"))  # folds are left out of measuring
    assert measured_method(candidate, method, "fast").text == ("micromix:bits=5+rtn" if is_tied else chain)


def test_stand_ins_follow_the_method(model: Any) -> None:
    _, plain = table_of(model)
    _, learned = table_of(model, method="gptq")
    names = list(plain.sensitivity)
    assert any(plain.sensitivity[name][0] != learned.sensitivity[name][0] for name in names)
    assert measured_method(FORMATS[0], "mr-gptq", "fast").text.endswith("gptq")
    assert measured_method(FORMATS[0], "smoothquant", "fast").text == "rtn"


def test_costs_are_told() -> None:
    assert measuring_cost(Sensitivity.KL, 63, 5, 9, 100).passes == pytest.approx(1 + 315 * 10 / 18)
    assert measuring_cost(Sensitivity.FISHER, 63, 5, 9, 100).passes == 8
    assert measuring_cost(Sensitivity.ERROR, 63, 5, 9, 100).tokens == 100


def test_embeddings_in_bfloat16_can_be_allocated(path: Path) -> None:
    """Their stand-ins give bfloat16 where the gradient is float32."""
    layers, table = table_of(microscale.load(path), include=("embedding",), candidates=parse_candidates("mxfp4,mxfp8"))
    name = next(layer.name for layer in layers if layer.role == "embedding")
    assert table.sensitivity[name][0] > table.sensitivity[name][1] > 0
