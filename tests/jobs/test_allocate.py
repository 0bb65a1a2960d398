"""The job `allocate` in Python: the recipe under a budget, its notes, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from command_line import succeed
from microscale.errors import AllocationError, CalibrationError, MicroscaleError, OptionError, QuantizationNote
from microscale.integrations.loading import load_original
from microscale.jobs.allocate import allocate
from microscale.jobs.allocate_options import AllocateOptions
from microscale.jobs.option import record_from
from microscale.jobs.printing import json_value
from microscale.jobs.reporting import ProgressReporter
from microscale.planning.budget import BudgetUnit
from microscale.recipes.recipe import load_recipe
from small_models import TOKENS, save_random_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("allocate") / "tiny")


FEW: dict[str, Any] = {"calibration": TOKENS[:2], "samples": 2, "window": 32, "points": 4}


def test_a_recipe_that_quantizes_to_the_budget(source: Path, tmp_path: Path) -> None:
    found = microscale.allocate(source, budget="5bits", output=tmp_path / "recipe.yaml", plot=tmp_path / "f.svg", **FEW)
    allocation = found.allocation
    assert (allocation.budget.amount, allocation.budget.unit) == (5.0, BudgetUnit.BITS)
    assert allocation.solution.point.cost <= 5.0005 and found.notes == ()
    assert set(allocation.solution.uniform) == {"mxfp4", "mxfp4_plus", "nvfp4", "mxfp6_e2m3", "mxfp8"}
    assert load_recipe(tmp_path / "recipe.yaml") == found.recipe
    assert (tmp_path / "f.svg").read_text().startswith("<?xml")
    model = microscale.quantize(source, found.recipe)
    layers = {name: module for name, module in model.named_modules() if name in allocation.solution.chosen}
    assert len(layers) == len(allocation.table.layers) == 14


def test_a_loaded_model_stays_as_it_is(source: Path) -> None:
    model = load_original(source)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = microscale.allocate(model, budget="5bits", **FEW)
    assert found.output is None and json_value(found)["recipe"] is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert found.recipe == microscale.allocate(source, budget="5bits", **FEW).recipe


def test_python_and_the_command_line_say_the_same(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("The harbour was quiet. " * 60)
    words: dict[str, Any] = {"calibration": text, "samples": 2, "window": 32, "points": 4}
    found = json_value(microscale.allocate(source, budget="5bits", output=tmp_path / "recipe.yaml", **words))
    options = ("--budget", "5bits", "--samples", "2", "--window", "32", "--points", "4", "--json")
    shown = succeed("allocate", source, *options, "--calibration", text, "-o", tmp_path / "recipe.yaml").json
    assert found | {"seconds": 0} == shown | {"seconds": 0}
    assert shown["layers"][0]["role"] == "attention.qkv" and set(shown["layers"][0]["candidates"]) == set(
        shown["uniform"]
    )


class Listener(ProgressReporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_the_work_is_told_before_it_begins(source: Path) -> None:
    listener = Listener()
    found = allocate(record_from(AllocateOptions, {"model": source, "budget": "5bits", **FEW}), listener)
    assert listener.notes == [found.allocation.work] and "passes over 48 tokens" in found.allocation.work


def test_a_method_that_ties_layers_is_noted(source: Path) -> None:
    with pytest.warns(QuantizationNote, match="method quarot ties layers together"):
        found = microscale.allocate(source, budget="5bits", method="quarot", **FEW)
    assert len(found.notes) == 1


def test_a_time_that_no_format_reaches(source: Path) -> None:
    """What layers take is measured first, and before their sensitivity: the budget is refused with the smallest sum."""
    with pytest.raises(AllocationError) as refused:
        microscale.allocate(source, budget="0.000001ms", **FEW)
    sums = re.search(
        r"below the smallest possible with these formats, ([0-9.]+) ms; raise it \(up to ([0-9.]+) ms is of use\)",
        str(refused.value),
    )
    assert sums is not None and 0 < float(sums[1]) <= float(sums[2])


@pytest.mark.parametrize(
    ("budget", "words", "kind", "problem"),
    [
        ("4.1bits", {}, AllocationError, "smallest possible with these formats, 4.250 bits"),
        ("1kB", {}, AllocationError, "smallest possible with these formats"),
        ("5", {}, AllocationError, "must be a number with a unit"),
        (5, {}, OptionError, "budget is a text, got 5"),
        ("5bits", {"formats": "mxfp5"}, MicroscaleError, "mxfp5"),
        ("5bits", {"sensitivity": "hessian"}, AllocationError, "possible: kl, fisher, error"),
        ("5bits", {"method": "magic"}, MicroscaleError, "unknown method or step 'magic'"),
        ("5bits", {"effort": "huge"}, MicroscaleError, "unknown effort 'huge'"),
        ("5bits", {"plot": "front.gif"}, MicroscaleError, "a plot is written as .png"),
        ("5bits", {"fix": ["norm=mxfp4"]}, AllocationError, "norms are"),
        ("5bits", {"formats": "mxfp4,int2/32:fp16:asym_pair"}, MicroscaleError, "int2/32:fp16:asym_pair"),
        ("9bits", {"formats": "mxfp4,mxfp8@micromix:bits=9"}, MicroscaleError, "must be ever finer"),
        (
            "5bits",
            {"formats": "mxfp4,micromix:bits=4"},
            MicroscaleError,
            "below the 4.25 bits of the narrowest",
        ),
        ("5bits", {"formats": "mxfp4,mxfp6_e2m3@smoothquant"}, MicroscaleError, "changes more than one layer"),
        ("5bits", {"formats": "mxfp4,mxfp6_e2m3/nvfp4@static"}, MicroscaleError, "dynamic ranges only"),
        ("5bits", {"calibration": "no such file.txt"}, MicroscaleError, "no such file.txt"),
        ("5bits", {"calibration": None}, CalibrationError, "give --calibration FILE"),
    ],
)
def test_what_is_refused(
    source: Path, tmp_path: Path, budget: Any, words: dict[str, Any], kind: type[MicroscaleError], problem: str
) -> None:
    with pytest.raises(kind, match=re.escape(problem)):
        microscale.allocate(source, budget=budget, output=tmp_path / "none.yaml", **{**FEW, **words})
    assert not (tmp_path / "none.yaml").exists()
