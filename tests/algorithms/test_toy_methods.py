"""Two methods that are written here alone: a class and its line in the registry are all that the house must know."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import microscale
from command_line import succeed
from family_models import family_model
from method_problems import layer_problem
from microscale.algorithms import registry
from microscale.algorithms.contract import FormatStep, LayerProblem, RoundStep
from microscale.algorithms.pipeline import parse_method
from microscale.calibration.statistics import Wanted
from microscale.errors import RecipeError
from microscale.formats import ActivationSpec, BlockFormat, Format, parse_format
from microscale.kernels import dequantize, quantize
from microscale.nn.linear import QuantizedLinear
from microscale.planning.candidates import parse_candidate
from microscale.planning.stand_ins import repeating_method
from microscale.recipes.plan import make_plan
from microscale.recipes.recipe import make_recipe
from microscale.tensor import QuantizedTensor
from small_models import same_bits
from step_checks import check_algorithm

WINDOWS = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunken(RoundStep):
    """Every weight, or ``share`` of its range, by the error of the outputs."""

    name: ClassVar[str] = "shrunken"
    source: ClassVar[str] = "this test"

    share: float = 0.9

    @property
    def wanted(self) -> Wanted | None:
        return Wanted.SECOND_MOMENT

    def quantize(self, layer: LayerProblem) -> QuantizedTensor:
        target = layer.target if layer.clip is None else layer.target.clamp(-layer.clip, layer.clip)
        bound = self.share * target.abs().max()
        found = [quantize(weight, layer.format) for weight in (target, target.clamp(-bound, bound))]
        moment = layer.second_moment
        if moment is None:
            return found[0]
        errors = [(dequantize(tensor, torch.float32) - layer.target).to(torch.float64) for tensor in found]
        losses = [float(((error @ moment.to(torch.float64)) * error).sum()) for error in errors]
        return found[int(losses[1] < losses[0])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Widest(FormatStep):
    """The widest of three formats that ``bits`` pay for."""

    name: ClassVar[str] = "widest"
    source: ClassVar[str] = "this test"
    has_budget: ClassVar[bool] = True

    bits: float = 0.0

    @property
    def budget(self) -> float | None:
        return self.bits or None

    def with_budget(self, bits: float) -> Widest:
        return dataclasses.replace(self, bits=bits)

    def adapt(self, fmt: Format, activations: ActivationSpec | None) -> tuple[Format, ActivationSpec | None]:
        wider = [parse_format(name) for name in ("mxfp4", "mxfp6_e2m3", "mxfp8")]
        paid = [one for one in wider if one.bits_per_value() <= self.bits]
        return (paid[-1] if paid and isinstance(fmt, BlockFormat) else fmt), activations


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    for toy in (Shrunken, Widest):
        monkeypatch.setitem(registry.REGISTERED, toy.name, toy)


@pytest.mark.parametrize("text", ["shrunken", "shrunken:share=0.7", "widest:bits=5"])
def test_they_meet_the_conformance_suite(text: str) -> None:
    check_algorithm(text)


def test_they_are_parsed() -> None:
    chain = parse_method("rule+hadamard+shrunken:share=0.8")
    assert chain.text == "rule+hadamard+shrunken:share=0.8" and chain.rounding == Shrunken(share=0.8)
    assert parse_method("widest:bits=5.5").text == "widest:bits=5.5+rtn", "what rounds is added"
    assert chain.needs_calibration and not parse_method("widest").needs_calibration
    with pytest.raises(RecipeError, match=r"options and defaults: share=0\.9"):
        parse_method("shrunken:shares=1")
    with pytest.raises(RecipeError, match="must come in the order widest then shrunken"):
        parse_method("shrunken+widest")


def test_they_are_planned() -> None:
    model = family_model("llama", dtype=torch.float32)
    rules = ({"match": "*.down_proj", "method": "widest:bits=7+shrunken"},)
    plan = make_plan(model, make_recipe(format="mxfp4", method="shrunken", rules=rules))
    chains = {layer.name.rpartition(".")[2]: layer.pipeline.text for layer in plan.layers}
    assert chains["down_proj"] == "widest:bits=7+shrunken" and chains["q_proj"] == "shrunken"
    formats = {layer.name.rpartition(".")[2]: layer.format for layer in plan.layers}
    assert (formats["down_proj"], formats["q_proj"]) == (parse_format("mxfp6_e2m3"), parse_format("mxfp4"))


def test_a_model_is_quantized_by_them() -> None:
    original = family_model("llama", dtype=torch.float32)
    name = "model.layers.0.self_attn.q_proj"
    weight = original.get_submodule(name).weight.detach().clone()
    model = microscale.quantize(original, "mxfp4", method="widest+shrunken:share=0.5", bits=7, calibration=WINDOWS)
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantizedLinear)
    assert (layer.format, layer.method) == (parse_format("mxfp6_e2m3"), "widest:bits=7+shrunken:share=0.5")
    bound = 0.5 * weight.abs().max()
    ways = [quantize(each, layer.format) for each in (weight, weight.clamp(-bound, bound))]
    assert any(same_bits(dequantize(layer.tensor), dequantize(way)) for way in ways)


def test_they_are_candidates_of_an_allocation() -> None:
    candidate = parse_candidate("mxfp4@widest:bits=7+shrunken")
    assert parse_candidate("shrunken").text == "shrunken"
    problem = layer_problem()
    layer = QuantizedLinear.from_tensor(quantize(problem.weight, problem.format))
    repeated = repeating_method(layer, candidate, "rtn", "fast")
    assert repeated is not None and repeated.text == "widest:bits=7+shrunken"


def test_they_are_listed() -> None:
    found = succeed("methods", "--json").json
    steps = {step["name"]: step for step in found["steps"]}
    assert steps["shrunken"]["options"] == {"share": 0.9} and steps["widest"]["source"] == "this test"
    assert steps["widest"]["summary"] == "The widest of three formats that ``bits`` pay for."
    assert succeed("methods", "shrunken", "--json").json["methods"] == {"shrunken": "shrunken"}
