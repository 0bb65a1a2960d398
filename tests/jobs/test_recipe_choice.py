"""From words to a recipe: made, read from a file, or yet to be found; and words that do not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from microscale.errors import AllocationError, RecipeError
from microscale.jobs.quantize_options import RecipeOptions
from microscale.jobs.recipe_choice import AutoRecipe, choose_recipe, is_auto
from microscale.planning.budget import BudgetUnit
from microscale.recipes.recipe import Recipe, make_recipe, parse_rule


@pytest.mark.parametrize(
    ("method", "is_one"), [(None, False), ("auto", True), (" auto +gptq", True), ("gptq", False), ("automatic", False)]
)
def test_auto_stands_in_the_place_of_a_method(method: str | None, is_one: bool) -> None:
    assert is_auto(method) is is_one


def test_words_make_a_recipe() -> None:
    found = choose_recipe(
        RecipeOptions(format="mxfp4", method="gptq", rules=("o_proj=mxfp8",)), default_layout="microscale"
    )
    assert found == make_recipe(format="mxfp4", method="gptq", rules=(parse_rule("o_proj=mxfp8"),), layout="microscale")


def test_a_file_says_all_but_the_layout(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("format: mxfp4\nlayout: quark\n")
    assert choose_recipe(RecipeOptions(file=path), default_layout="auto") == make_recipe(format="mxfp4", layout="quark")
    other = choose_recipe(RecipeOptions(file=path, layout="microscale"))
    assert isinstance(other, Recipe) and other.layout == "microscale"
    with pytest.raises(RecipeError, match="give either --recipe or --nan, not both"):
        choose_recipe(RecipeOptions(file=path, nan="poison"))


def test_auto_is_a_problem_to_solve() -> None:
    found = choose_recipe(RecipeOptions(method="auto+gptq", format="mxfp4,mxfp8", bits=5.0, activations="mxfp8"))
    assert isinstance(found, AutoRecipe)
    problem = found.problem
    assert (problem.method, problem.budget.amount, problem.budget.unit) == ("gptq", 5.0, BudgetUnit.BITS)
    assert len(problem.candidates) == 2 and all(str(each.activations) == "mxfp8" for each in problem.candidates)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({}, RecipeError, "name a format"),
        ({"method": "nonsense"}, RecipeError, "nonsense"),
        ({"method": "auto"}, AllocationError, "needs a budget of bits per weight: --bits 4.5"),
        ({"method": "auto", "bits": 4.5, "part": "vision"}, RecipeError, "does not reach part vision"),
        ({"format": "mxfp4", "bits": 0.0}, RecipeError, "bits is a number above 0"),
        ({"format": "mxfp4", "bits": float("inf")}, RecipeError, "bits is a number above 0"),
    ],
)
def test_words_that_do_not_go_together(words: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose_recipe(RecipeOptions(**words))
